"""Lowering: a task's graph as one flat ATen graph for a runtime: forward, training step, or training step with update."""

from .decompositions import runtime_decompositions
from .exported import exported_program
from .graph import Lowered, lower_forward, lower_program
from .pairs import real_valued
from .places import Kind, Place, mark_places, places_of
from .restored import captured_form
from .step import OPTIMIZERS, Optimizer, lower_train_step, lower_update_step

__all__ = [
    "OPTIMIZERS",
    "Kind",
    "Lowered",
    "Optimizer",
    "Place",
    "captured_form",
    "exported_program",
    "lower_forward",
    "lower_program",
    "lower_train_step",
    "lower_update_step",
    "mark_places",
    "places_of",
    "real_valued",
    "runtime_decompositions",
]

"""Lowering: a task's graph as one flat ATen graph for a runtime: forward, training step, or training step with update."""

from .decompositions import runtime_decompositions
from .graph import Lowered, lower_forward, lower_program
from .places import Kind, Place, find_places
from .step import OPTIMIZERS, Optimizer, lower_train_step, lower_update_step

__all__ = [
    "OPTIMIZERS",
    "Kind",
    "Lowered",
    "Optimizer",
    "Place",
    "find_places",
    "lower_forward",
    "lower_program",
    "lower_train_step",
    "lower_update_step",
    "runtime_decompositions",
]

"""Measurements of captured models on batches: where attention goes, how redundant visual rows are."""

from .attention import Allocation, attention_allocation
from .redundancy import Redundancy, effective_rank, visual_redundancy
from .segments import find_segments
from .task import ForwardMeasures, measure_forward

__all__ = [
    "Allocation",
    "ForwardMeasures",
    "Redundancy",
    "attention_allocation",
    "effective_rank",
    "find_segments",
    "measure_forward",
    "visual_redundancy",
]

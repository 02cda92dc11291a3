"""Measurements of captured models on batches: where attention goes, how redundant visual rows are, what gradients flow
through them.
"""

from .attention import Allocation, attention_allocation
from .gradients import BlockCosine, GradientNorms, GradientSplit, gradient_cosines, measure_gradients
from .measurements import ImageAttention, Measurements, TaskMeasures, image_attention, image_mass, measure
from .rates import measure_rates, program_rates
from .redundancy import Redundancy, effective_rank, visual_redundancy
from .segments import find_segments
from .task import ForwardMeasures, measure_forward

__all__ = [
    "Allocation",
    "BlockCosine",
    "ForwardMeasures",
    "GradientNorms",
    "GradientSplit",
    "ImageAttention",
    "Measurements",
    "Redundancy",
    "TaskMeasures",
    "attention_allocation",
    "effective_rank",
    "find_segments",
    "gradient_cosines",
    "image_attention",
    "image_mass",
    "measure",
    "measure_forward",
    "measure_gradients",
    "measure_rates",
    "program_rates",
    "visual_redundancy",
]

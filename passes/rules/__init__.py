"""Token-axis rules: for each operator, which output axis is computed row by row from which input axes."""

from . import attention, contraction, indexing, normalization, pointwise, shape
from .registry import AxisMap, Group, Mix, Traits, axis_map, has_rule, rule, ruled_operators, traits

__all__ = [
    "AxisMap",
    "Group",
    "Mix",
    "Traits",
    "attention",
    "axis_map",
    "contraction",
    "has_rule",
    "indexing",
    "normalization",
    "pointwise",
    "rule",
    "ruled_operators",
    "shape",
    "traits",
]

"""Simplification: small exact passes over a graph whose selections have been pushed down, or that is only captured."""

from .causal import CausalAttention
from .duplicates import ShareDuplicates
from .grouped import GroupedHeads
from .orders import JoinRows
from .ranges import RangeRows
from .restores import MergeRestores
from .taken import TakeRoutedRows
from .uniform import UniformRows

__all__ = [
    "CausalAttention",
    "GroupedHeads",
    "JoinRows",
    "MergeRestores",
    "RangeRows",
    "ShareDuplicates",
    "TakeRoutedRows",
    "UniformRows",
]

"""Rewriting: seeds write the semantics, sinking removes the dead work."""

from .cleanup import RemoveAssertions, RemoveNoOps, SplitToSlices, TypeAsToCast, ViewToReshape
from .layout import KeepBatchAxis
from .seed import ExplicitCausalMask, SeedSites
from .sink import Sink

__all__ = [
    "ExplicitCausalMask",
    "KeepBatchAxis",
    "RemoveAssertions",
    "RemoveNoOps",
    "SeedSites",
    "Sink",
    "SplitToSlices",
    "TypeAsToCast",
    "ViewToReshape",
]

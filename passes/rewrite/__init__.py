"""Rewriting: seeds write the semantics, sinking removes the dead work."""

from .cleanup import RemoveAssertions, RemoveNoOps, SplitToSlices, ViewToReshape
from .seed import ExplicitCausalMask, SeedSites
from .sink import Sink

__all__ = [
    "ExplicitCausalMask",
    "RemoveAssertions",
    "RemoveNoOps",
    "SeedSites",
    "Sink",
    "SplitToSlices",
    "ViewToReshape",
]

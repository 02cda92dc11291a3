"""Rewriting: seeds write the semantics of a plan, pushing selections down removes the dead work."""

from .pushdown import PushDown
from .realise import rewrite_passes, seeds
from .seed import ExplicitCausalMask, SeedSites

__all__ = ["ExplicitCausalMask", "PushDown", "SeedSites", "rewrite_passes", "seeds"]

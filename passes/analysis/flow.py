"""What is computed from values: tensors that read them, and not their shapes alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from tokgraph.ir.node import descendants, tensor

from ..rules import traits


def reads_values(user: fx.Node) -> bool:
    """Whether a node that reads a value computes a tensor from it, and not from its shape alone."""
    return tensor(user) is not None and not traits(user.target).shape_only


def computed_from(nodes: Iterable[fx.Node], until: fx.Node | None = None) -> set[fx.Node]:
    """The given nodes and every tensor computed from their values, as far as it stands at or before ``until``."""
    return descendants(nodes, until, reads_values)

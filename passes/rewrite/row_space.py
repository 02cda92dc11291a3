"""Row spaces: the rows that a drop site keeps, and which of them are padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.ir.node import rank
from tokgraph.ir.plan import DropSite

from ..emitter import Emitter

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


@dataclass(frozen=True)
class RowSpace:
    """A row space: the rows that a site keeps, in the space around it.

    Args:
        site: the drop site.
        index: ``[batch, rows]`` positions in the enclosing space.
        dropped: rows dropped by this site.
        visual: visual rows that are left.
        lost: ``[batch, enclosing rows]`` bool, the rows that this site or one around it drops, where samples drop different
            numbers of them: some stay among the kept, as padding. ``None``: all of the kept count.
    """

    site: DropSite
    index: fx.Node
    dropped: int
    visual: int
    lost: fx.Node | None = None

    def padding(self, emit: Emitter) -> fx.Node | None:
        """``[batch, rows]`` bool: the kept rows that are padding."""
        return None if self.lost is None else emit.select(self.lost, self.index)


def indices(spaces: Sequence[RowSpace]) -> list[fx.Node]:
    """The spaces' indices."""
    return [space.index for space in spaces]


def frozen_rows(emit: Emitter, spaces: Sequence[RowSpace]) -> fx.Node:
    """``[batch, tokens]`` bool: the positions that are dropped where samples drop different numbers; outermost space first."""
    first, *inner = spaces
    assert first.lost is not None
    if not inner:
        return first.lost
    rows = frozen_rows(emit, inner)
    return emit.call(tokgraph.restore.default, first.lost, rows, first.index, origin=first.lost)


def unpadded(emit: Emitter, spaces: Sequence[RowSpace], hidden: Sequence[RowSpace]) -> fx.Node | None:
    """``[batch, 1, tokens, keys]`` bool: who may see whom where padding lies among the keys, ``None`` where none does.

    A row that counts sees no padding. A frozen row, whose result nobody uses, sees everything: a softmax over no key at all
    would be NaN, and so would gradients.

    Args:
        emit: where nodes go.
        spaces: the spaces open in the block.
        hidden: those of them, outermost first, whose dropped rows are no keys.
    """
    padding = hidden[-1].padding(emit) if hidden else None
    if padding is None:
        return None
    keys = emit.call(aten.logical_not.default, padding, origin=padding)
    for axis in (1, 1):
        keys = emit.call(aten.unsqueeze.default, keys, axis, origin=padding)
    rows = frozen_rows(emit, spaces)
    for axis in (1, 3):
        rows = emit.call(aten.unsqueeze.default, rows, axis, origin=padding)
    return emit.call(aten.logical_or.default, rows, keys, origin=padding)


def laid_out(emit: Emitter, seen: fx.Node, ndim: int, batch: int) -> fx.Node:
    """``[batch, 1, tokens, keys]`` with the batch at an axis of scores of ``ndim`` dimensions: they broadcast."""
    if ndim < rank(seen):
        return emit.call(aten.squeeze.dim, seen, 1, origin=seen)
    for _ in range(ndim - rank(seen)):
        seen = emit.call(aten.unsqueeze.default, seen, 1, origin=seen)
    return seen if batch == 0 else emit.call(aten.transpose.int, seen, 0, batch, origin=seen)

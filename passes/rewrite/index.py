"""Index building: the rows that drop sites keep, the rows that a loss reads, the positions of a slice."""

from __future__ import annotations

import operator

import torch
from torch import fx

from tokgraph.errors import IllegalRewriteError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.plan import DropSite

from ..emitter import VISUAL_ROWS, Emitter
from .masks import Masks
from .row_space import RowSpace
from .scores import Seen
from .site_rows import EqualRows, RaggedRows

tokgraph = torch.ops.tokgraph


class IndexBuilder:
    """Emits indices for one task.

    Args:
        emit: where nodes go.
        facts: the task's facts.
    """

    def __init__(self, emit: Emitter, facts: TaskFacts) -> None:
        self._emit = emit
        self._facts = facts
        self._masks = Masks(emit, facts)
        self.entry = self._masks.entry
        self._sites = (RaggedRows if facts.visual.ragged else EqualRows)(emit, facts, self._masks)

    @property
    def visual_count(self) -> int:
        """Visual tokens of each sample."""
        return self._facts.visual.count

    @property
    def visual(self) -> fx.Node:
        """``[batch, tokens]`` bool: the visual tokens."""
        return self._masks.visual

    @property
    def demanded(self) -> fx.Node:
        """``[batch, tokens]`` bool: the demanded rows."""
        return self._masks.demanded

    def _call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self._emit.call(target, *args, origin=self.entry, **kwargs)

    def site(self, site: DropSite, around: tuple[RowSpace, ...], seen: Seen) -> RowSpace:
        """The rows that ``site`` keeps (:meth:`.SiteRows.kept`)."""
        return self._sites.kept(site, around, seen)

    def demand(self, around: tuple[RowSpace, ...], window: tuple[fx.Node, int, int] | None = None) -> fx.Node | None:
        """The demanded rows, in the space of ``around`` (and of ``window``, an index of a slice of the token axis).

        Args:
            around: spaces still open where the rows are read.
            window: ``(index, length in the example batch, demanded rows of it)`` of a slice.

        Returns:
            ``[batch, rows]`` int64, or ``None`` when every row is demanded.
        """
        demand = self._facts.demand
        outer = [space.index for space in around]
        tokens, wanted = demand.tokens - sum(space.dropped for space in around), demand.rows
        if window is not None:
            outer.append(window[0])
            tokens, wanted = window[1], window[2]
        if demand.reads == "all" or wanted >= tokens:
            return None
        mask = self._emit.chain(self._masks.demanded, outer)
        length = self._emit.size(mask, 1)
        if demand.reads == "text" and not isinstance(length, int):  # text may grow: what is left out stays the same
            count: fx.Node | int = self._call(operator.sub, length, tokens - wanted)
        else:
            count = wanted
        index = self._call(tokgraph.rows.default, mask, count, False)
        index.meta[VISUAL_ROWS] = demand.visual
        return index

    def demanded_before_last(self, chosen: tuple[fx.Node, ...]) -> fx.Node:
        """``[batch, rows]`` int64, into demanded rows: those before the last row of the sample, which is one of them.

        Args:
            chosen: indices from the token axis to the demanded rows; a sample with fewer than others has more rows in it.
        """
        demanded = self._masks.demanded
        before = self._call(torch.ops.aten.slice.Tensor, demanded, 1, 0, -1)
        last = self._call(torch.ops.aten.slice.Tensor, demanded, 1, -1, 2**63 - 1)
        none = self._call(torch.ops.aten.zeros_like.default, last)  # a pad would fix sizes that are open
        before = self._call(torch.ops.aten.cat.default, [before, none], 1)
        mask = self._emit.chain(before, chosen)
        wanted = self._emit.size(mask, 1)
        return self._call(tokgraph.rows.default, mask, self._emit.add(wanted, -1, self.entry), False)

    def window(self, start: fx.Node | int, stop: fx.Node | int | None) -> fx.Node:
        """``[batch, stop - start]`` int64: the positions that a slice of the token axis takes."""
        tokens = self._emit.size(self.entry, 1)
        low = self._emit.add(tokens, start, self.entry) if isinstance(start, int) and start < 0 else start
        if stop is None or (isinstance(stop, int) and stop >= 2**62):
            high: fx.Node | int = tokens
        else:
            high = self._emit.add(tokens, stop, self.entry) if isinstance(stop, int) and stop < 0 else stop
        low, high = (max(x, 0) if isinstance(x, int) else x for x in (low, high))  # slices may begin before the axis
        return self._call(tokgraph.range_rows.default, self.visual, low, high)


def check_disjoint_or_nested(sites: tuple[DropSite, ...]) -> None:
    """Raise :class:`IllegalRewriteError` where two spans of one task overlap and neither holds the other."""
    for i, a in enumerate(sites):
        for b in sites[i + 1 :]:
            assert a.end is not None
            assert b.end is not None
            if b.start < a.end < b.end and a.start < b.start:
                raise IllegalRewriteError(
                    f"task {a.task!r}: spans [{a.start}, {a.end}) and [{b.start}, {b.end}) overlap",
                    help="spans of one task must be nested or disjoint; a site without restore reaches the last block",
                )

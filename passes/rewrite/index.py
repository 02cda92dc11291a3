"""Index building: from visual tokens to the rows that a drop site keeps and the rows that a loss reads."""

from __future__ import annotations

import operator

import torch
from torch import fx

from tokgraph.errors import IllegalRewriteError, PlanError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import by_name, rank
from tokgraph.ir.plan import DropSite

from ..emitter import VISUAL_ROWS, Emitter
from .row_space import Frame
from .scores import Scores, Seen

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


class IndexBuilder:
    """Emits masks and indices for one task.

    Args:
        emit: where nodes go.
        facts: the task's facts.
    """

    def __init__(self, emit: Emitter, facts: TaskFacts) -> None:
        self._emit = emit
        self._facts = facts
        self._nodes = by_name(emit.graph)
        self.entry = self._nodes[facts.entry]
        self._visual: fx.Node | None = None
        self._scores = Scores(emit, facts, self.entry)

    @property
    def visual_count(self) -> int:
        """Visual tokens of each sample."""
        return self._facts.visual.count

    @property
    def visual(self) -> fx.Node:
        """``[batch, tokens]`` bool: the visual tokens."""
        if self._visual is None:
            self._visual = self._make_visual()
        return self._visual

    @property
    def demanded(self) -> fx.Node:
        """``[batch, tokens]`` bool: the demanded rows."""
        return self._call(tokgraph.demand_mask.default, self.visual, self._facts.demand.reads)

    def _call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self._emit.call(target, *args, origin=self.entry, **kwargs)

    def _make_visual(self) -> fx.Node:
        flow = self._facts.visual
        if flow.kind == "range":
            tokens = self._emit.size(self.entry, 1)
            offset: fx.Node | int = 0
            for name, axis in flow.before:
                offset = self._emit.add(offset, self._emit.size(self._nodes[name], axis), self.entry)
            bounds = [tokens if b is None else self._bound(b, offset, tokens) for b in (flow.start, flow.stop)]
            return self._call(tokgraph.range_mask.default, self.entry, *bounds)
        assert flow.source is not None
        source = self._nodes[flow.source]
        if flow.kind == "ids":
            if flow.low == flow.high:
                return self._call(aten.eq.Scalar, source, flow.low)
            low, high = self._call(aten.ge.Scalar, source, flow.low), self._call(aten.le.Scalar, source, flow.high)
            return self._call(aten.logical_and.default, low, high)
        if rank(source) == 3:
            source = self._call(aten.squeeze.dim, source, -1)
        return self._call(aten._to_copy.default, source, dtype=torch.bool)

    def _bound(self, bound: int, offset: fx.Node | int, tokens: fx.Node | int) -> fx.Node | int:
        return self._emit.add(tokens if bound < 0 else offset, bound, self.entry)

    def site(self, site: DropSite, around: tuple[Frame, ...], seen: Seen) -> Frame:
        """The rows that ``site`` keeps.

        Args:
            site: a resolved drop site.
            around: the frames of the sites that enclose it.
            seen: what selectors may look at.

        Raises:
            PlanError: demanded rows must stay, and samples hold different numbers of them.
        """
        if self._facts.visual.ragged:
            return self._ragged_site(site, around, seen)
        outer = [frame.index for frame in around]
        alive = around[-1].visual if around else self._facts.visual.count
        free = self._emit.chain(self.visual, outer)
        protected = 0
        if not site.restore and self._facts.demand.visual:
            protected = self._protected()
            free = self._and_not(free, self._emit.chain(self.demanded, outer))
        width = alive - protected
        keep = min(max(site.kept(self._facts.visual.count) - protected, 0), width)
        candidates = self._call(tokgraph.rows.default, free, width, True)
        candidates.meta[VISUAL_ROWS] = width
        score = self._scores.equal(site, candidates, keep, seen)
        index = self._call(tokgraph.keep_rows.default, candidates, score, keep, self._emit.size(free, 1))
        index.meta[VISUAL_ROWS] = alive - (width - keep)
        return Frame(site, index, width - keep, alive - (width - keep))

    def _ragged_site(self, site: DropSite, around: tuple[Frame, ...], seen: Seen) -> Frame:
        """The rows that ``site`` keeps where samples hold different numbers of visual tokens.

        As many leave every sample as may leave the one that has the fewest. With ``ragged="pad"`` a sample drops its own
        share: what it drops beyond these rows stays as padding, which no row sees and no block changes.
        """
        flow, demand = self._facts.visual, self._facts.demand
        outer, gone = [frame.index for frame in around], sum(frame.dropped for frame in around)
        here, least = self._emit.chain(self.visual, outer), flow.count - gone
        padding = around[-1].padding(self._emit) if around else None
        alive = here if padding is None else self._and_not(here, padding)
        free = alive
        if not site.restore and demand.visual:
            free = self._and_not(alive, self._emit.chain(self.demanded, outer))
            least = demand.free - gone
        dropped = max(0, min(flow.count - gone - site.kept(flow.count), least))
        droppable = free if padding is None else self._call(aten.logical_or.default, free, padding)
        width = flow.most - gone
        candidates = self._call(tokgraph.ragged_rows.default, droppable, width, dropped)
        valid = self._call(aten.gather.default, free, 1, candidates)
        drop, lowest = self._drop_counts(site, here, padding, free, dropped)
        score = self._scores.ragged(site, candidates, valid, drop, seen)
        if padding is not None:  # what is lost already goes first
            first = self._call(aten.gather.default, padding, 1, candidates)
            score = self._call(aten.masked_fill.Scalar, score, first, -torch.inf)
        tokens = self._emit.size(here, 1)
        index = self._call(tokgraph.keep_rows.default, candidates, score, width - dropped, tokens)
        index.meta[VISUAL_ROWS] = flow.mean - gone - dropped
        lost = None
        if site.ragged == "pad":
            lost = self._call(tokgraph.lost_rows.default, candidates, score, lowest, tokens)
        return Frame(site, index, dropped, flow.count - gone - dropped, lost)

    def _drop_counts(
        self, site: DropSite, here: fx.Node, padding: fx.Node | None, free: fx.Node, dropped: int
    ) -> tuple[fx.Node, fx.Node]:
        """``[batch]``, or ``[1]`` for all samples: visual tokens that the site drops, and rows that go, padding included."""
        if site.ragged == "min":
            each = self._call(aten.full.default, [1], dropped, dtype=torch.int64, device=here.meta["val"].device)
            return each, each
        if padding is None:
            padding = self._call(aten.zeros_like.default, here)
        drop = self._call(tokgraph.drop_counts.default, self.visual, here, padding, free, site.keep, dropped)
        return drop, self._call(aten.add.Tensor, drop, self._call(aten.sum.dim_IntList, padding, [1]))

    def _and_not(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self._call(aten.logical_and.default, a, self._call(aten.logical_not.default, b))

    def _protected(self) -> int:
        if not self._facts.demand.even:
            raise PlanError(
                f"task {self._facts.name!r}: a site without restore must keep the demanded visual tokens, and the samples "
                "of the example batch hold different numbers of them",
                help="use restore=True, or give every sample the same number of images",
            )
        return self._facts.demand.visual

    def demand(self, around: tuple[Frame, ...], window: tuple[fx.Node, int, int] | None = None) -> fx.Node | None:
        """The demanded rows, in the space of ``around`` (and of ``window``, an index of a slice of the token axis).

        Args:
            around: frames still open where the rows are read.
            window: ``(index, length in the example batch, demanded rows of it)`` of a slice.

        Returns:
            ``[batch, rows]`` int64, or ``None`` when every row is demanded.
        """
        demand = self._facts.demand
        outer = [frame.index for frame in around]
        tokens, wanted = demand.tokens - sum(f.dropped for f in around), demand.rows
        if window is not None:
            outer.append(window[0])
            tokens, wanted = window[1], window[2]
        if demand.reads == "all" or wanted >= tokens:
            return None
        mask = self._emit.chain(self.demanded, outer)
        length = self._emit.size(mask, 1)
        if demand.reads == "text" and not isinstance(length, int):  # text may grow: what is left out stays the same
            count: fx.Node | int = self._call(operator.sub, length, tokens - wanted)
        else:
            count = wanted
        index = self._call(tokgraph.rows.default, mask, count, False)
        index.meta[VISUAL_ROWS] = demand.visual
        return index

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

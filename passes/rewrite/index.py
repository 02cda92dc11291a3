"""Index building: from visual tokens to the rows that a drop site keeps and the rows that a loss reads."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.errors import IllegalRewriteError, InternalError, PlanError
from tokgraph.facts import Attention, TaskFacts
from tokgraph.fxnode import argument, rank
from tokgraph.plan import DropSite
from tokgraph.program import STEP
from tokgraph.selectors import scorer, selectors

from ..rules.registry import is_one
from .nodes import VISUAL_ROWS, Emitter, hoist

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


PIVOTS = 8
"""Pivots of the ``"similarity"`` selector."""


@dataclass(frozen=True)
class Frame:
    """A row space: the rows that a site keeps, in the space of the frames around it.

    Args:
        site: the drop site.
        index: ``[batch, rows]`` positions in the enclosing space.
        dropped: rows dropped by this site.
        visual: visual rows that are left.
    """

    site: DropSite
    index: fx.Node
    dropped: int
    visual: int


class IndexBuilder:
    """Emits masks and indices for one task.

    Args:
        emit: where nodes go.
        facts: the task's facts.
    """

    def __init__(self, emit: Emitter, facts: TaskFacts) -> None:
        self._emit = emit
        self._facts = facts
        self._nodes = {node.name: node for node in emit.graph.nodes}
        self.entry = self._nodes[facts.entry]
        self._visual: fx.Node | None = None

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

    def site(
        self, site: DropSite, around: tuple[Frame, ...], stream: fx.Node, attention: Attention | None = None
    ) -> Frame:
        """The rows that ``site`` keeps.

        Args:
            site: a resolved drop site.
            around: the frames of the sites that enclose it.
            stream: the residual stream at the start of its span, in the space of ``around``.
            attention: the attention of the block before the span, which the ``"attention"`` selector reads.

        Raises:
            PlanError: demanded rows must stay, and samples hold different numbers of them.
        """
        if self._facts.visual.ragged:
            return self._ragged_site(site, around, stream, attention)
        outer = [frame.index for frame in around]
        alive = around[-1].visual if around else self._facts.visual.count
        free = self._emit.chain(self.visual, outer)
        protected = 0
        if not site.restore and self._facts.demand.visual:
            protected = self._protected()
            read = self._emit.chain(self.demanded, outer)
            free = self._call(aten.logical_and.default, free, self._call(aten.logical_not.default, read))
        width = alive - protected
        keep = min(max(site.kept(self._facts.visual.count) - protected, 0), width)
        candidates = self._call(tokgraph.rows.default, free, width, True)
        candidates.meta[VISUAL_ROWS] = width
        score = self._score(site, candidates, keep, stream, around, attention)
        index = self._call(tokgraph.keep_rows.default, candidates, score, keep, self._emit.size(free, 1))
        index.meta[VISUAL_ROWS] = alive - (width - keep)
        return Frame(site, index, width - keep, alive - (width - keep))

    def _ragged_site(
        self, site: DropSite, around: tuple[Frame, ...], stream: fx.Node, attention: Attention | None
    ) -> Frame:
        """The rows that ``site`` keeps where samples hold different numbers of visual tokens: each loses as many as the
        sample that has the fewest.
        """
        flow, demand = self._facts.visual, self._facts.demand
        outer, gone = [frame.index for frame in around], sum(frame.dropped for frame in around)
        free, least = self._emit.chain(self.visual, outer), flow.count - gone
        if not site.restore and demand.visual:
            read = self._emit.chain(self.demanded, outer)
            free = self._call(aten.logical_and.default, free, self._call(aten.logical_not.default, read))
            least = demand.free - gone
        dropped = max(0, min(flow.count - gone - site.kept(flow.count), least))
        candidates = self._call(tokgraph.ragged_rows.default, free, flow.most, dropped)
        valid = self._call(aten.gather.default, free, 1, candidates)
        score = self._ragged_score(site, candidates, valid, dropped, stream, around, attention)
        index = self._call(tokgraph.keep_rows.default, candidates, score, flow.most - dropped, self._emit.size(free, 1))
        index.meta[VISUAL_ROWS] = flow.count - gone - dropped
        return Frame(site, index, dropped, flow.count - gone - dropped)

    def _ragged_score(
        self,
        site: DropSite,
        candidates: fx.Node,
        valid: fx.Node,
        dropped: int,
        stream: fx.Node,
        around: tuple[Frame, ...],
        attention: Attention | None,
    ) -> fx.Node:
        """Scores of candidates; positions that are none score infinity, which no candidate does, and stay."""
        if site.selector == "uniform":
            score = self._call(tokgraph.spread_score.default, valid, dropped)
        elif site.selector == "similarity":  # rows of zeros are no pivots, unless all candidates are
            rows = self._call(tokgraph.select.default, stream, candidates, 1, 0)
            there = self._call(aten.unsqueeze.default, valid, -1)
            rows = self._call(aten.mul.Tensor, self._call(aten.detach.default, rows), there)
            score = self._call(tokgraph.similarity_score.default, rows, PIVOTS)
        else:
            score = self._score(site, candidates, 0, stream, around, attention)
        if site.selector == "random":
            score = self._call(aten.gather.default, score, 1, self._call(tokgraph.ranks.default, valid))
        score = self._call(aten._to_copy.default, score, dtype=torch.float64)
        score = self._call(aten.clamp.default, score, None, torch.finfo(torch.float32).max)
        none = self._call(aten.logical_not.default, valid)
        return self._call(aten.masked_fill.Scalar, score, none, torch.inf)

    def _protected(self) -> int:
        if not self._facts.demand.even:
            raise PlanError(
                f"task {self._facts.name!r}: a site without restore must keep the demanded visual tokens, and the samples "
                "of the example batch hold different numbers of them",
                help="use restore=True, or give every sample the same number of images",
            )
        return self._facts.demand.visual

    def _score(
        self,
        site: DropSite,
        candidates: fx.Node,
        keep: int,
        stream: fx.Node,
        around: tuple[Frame, ...],
        attention: Attention | None,
    ) -> fx.Node:
        if site.selector == "uniform":
            return self._call(tokgraph.uniform_score.default, candidates, keep)
        if site.selector == "random":
            step = self._emit.state(STEP, torch.zeros((), dtype=torch.int64), self.entry)
            return self._call(tokgraph.random_score.default, candidates, site.seed, step)
        if site.selector == "norm":
            rows = self._call(tokgraph.select.default, stream, candidates, 1, 0)
            return self._call(aten.linalg_vector_norm.default, rows, 2, [-1])
        if site.selector == "similarity":
            rows = self._call(tokgraph.select.default, stream, candidates, 1, 0)
            return self._call(tokgraph.similarity_score.default, self._call(aten.detach.default, rows), PIVOTS)
        if site.selector == "attention":
            mass = self._call(aten.mean.dim, self._prompt_weights(site, around, attention), [1, 2])
            return self._call(aten.gather.default, mass, 1, candidates)
        known = selectors().get(site.selector)
        if known is not None and known.score is not None:
            seen = [] if known.causal else [self._call(tokgraph.select.default, stream, candidates, 1, 0)]
            return self._call(scorer(known), candidates, *seen)
        raise InternalError(f"selector {site.selector!r} passed the plan's check but has no scores")

    def _prompt_weights(self, site: DropSite, around: tuple[Frame, ...], attention: Attention | None) -> fx.Node:
        """``[batch, heads, 1, keys]``: weights of the last prompt token in the block before the span."""
        prompt = self._facts.prompt
        if prompt is None or attention is None:
            missing = "its loss shows no labels" if prompt is None else f"block {site.start} has no block before it"
            raise PlanError(
                f"task {site.task!r}: selector 'attention' scores by the last prompt token at the block before the span, "
                f"but {missing}",
                help="start the span at block 1 or later, and compute the loss by cross entropy over [batch, tokens] labels",
            )
        targets = self._nodes[prompt.targets]
        hoist(self._emit.graph, targets)  # labels are read by the loss only, at the graph's end
        mask = self._call(tokgraph.prompt_mask.default, targets, self.entry, prompt.ignore_index, prompt.first)
        outer = [frame.index for frame in around]
        row = self._call(tokgraph.rows.default, self._emit.chain(mask, outer), 1, True)
        node = self._nodes[attention.node]
        if attention.kind == "eager":
            return self._emit.chain(node, [*outer, row], rank(node) - 2, 0)
        query, seen = argument(node, "query"), argument(node, "attn_mask")
        query = self._emit.chain(query, [*outer, row], rank(query) - 2, 0)
        if seen is not None and not is_one(seen, rank(seen) - 2):
            seen = self._emit.with_batch(seen, rank(query), 0, row)
            seen = self._emit.chain(seen, [*outer, row], rank(query) - 2, 0)
        query, key = (self._call(aten.detach.default, x) for x in (query, argument(node, "key")))  # no gradient flows
        return self._call(tokgraph.prompt_attention.default, query, key, seen, argument(node, "scale"))

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

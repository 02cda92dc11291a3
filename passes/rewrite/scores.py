"""Scores of the visual tokens that a site may drop, by selector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.errors import InternalError, PlanError
from tokgraph.ir.blocks import Attention
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.names import STEP
from tokgraph.ir.node import argument, by_name, rank, where
from tokgraph.ir.plan import DropSite
from tokgraph.planning.selectors import scorer, selectors

from ..emitter import VISUAL_ROWS, Emitter, hoist
from ..rules.registry import is_one
from .masks import Masks
from .row_space import RowSpace, indices

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph

PIVOTS = 8
"""Pivots of the ``"similarity"`` selector."""


@dataclass(frozen=True)
class Seen:
    """What selectors may look at.

    Args:
        stream: the residual stream at the start of the span, in the space of ``around``.
        around: the spaces of the sites that enclose the span.
        attention: the attention of the block before the span.
        spaces: the spaces open in that block.
        hidden: those of them, outermost first, whose dropped rows are no keys there.
    """

    stream: fx.Node
    around: tuple[RowSpace, ...] = ()
    attention: Attention | None = None
    spaces: tuple[RowSpace, ...] = ()
    hidden: tuple[RowSpace, ...] = ()


class Scores:
    """Emits scores for one task; candidates of the highest stay.

    Args:
        emit: where nodes go.
        facts: the task's facts.
        masks: the task's masks.
    """

    def __init__(self, emit: Emitter, facts: TaskFacts, masks: Masks) -> None:
        self._emit = emit
        self._facts = facts
        self._nodes = by_name(emit.graph)
        self._masks = masks
        self._entry = masks.entry

    def _call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self._emit.call(target, *args, origin=self._entry, **kwargs)

    def equal(self, site: DropSite, candidates: fx.Node, keep: int, seen: Seen) -> fx.Node:
        """``[batch, m]`` scores where every sample has ``m`` candidates, of which ``keep`` stay."""
        if site.selector == "uniform":
            return self._call(tokgraph.uniform_score.default, candidates, keep)
        if site.selector == "random":
            step = self._emit.state(STEP, torch.zeros((), dtype=torch.int64), self._entry)
            return self._call(tokgraph.random_score.default, candidates, site.seed, step)
        if site.selector == "norm":
            rows = self._call(tokgraph.select.default, seen.stream, candidates, 1, 0)
            return self._call(aten.linalg_vector_norm.default, rows, 2, [-1])
        if site.selector == "similarity":
            rows = self._call(tokgraph.select.default, seen.stream, candidates, 1, 0)
            return self._call(tokgraph.similarity_score.default, self._call(aten.detach.default, rows), PIVOTS)
        if site.selector == "attention":
            return self._call(aten.gather.default, self._prompt_mass(site, seen), 1, candidates)
        known = selectors().get(site.selector)
        if known is not None and known.score is not None:
            looked = [] if known.causal else [self._call(tokgraph.select.default, seen.stream, candidates, 1, 0)]
            return self._call(scorer(known), candidates, *looked)
        raise InternalError(f"selector {site.selector!r} passed the plan's check but has no scores")

    def ragged(self, site: DropSite, candidates: fx.Node, valid: fx.Node, drop: fx.Node, seen: Seen) -> fx.Node:
        """``[batch, m]`` scores where samples have different numbers of candidates.

        Args:
            site: the drop site.
            candidates: ``[batch, m]``, other positions among them.
            valid: ``[batch, m]`` bool: those that are candidates. The others score infinity, which no candidate does.
            drop: ``[batch]`` or ``[1]``, how many candidates go.
            seen: what selectors may look at.
        """
        if site.selector == "uniform":
            score = self._call(tokgraph.spread_score.default, valid, drop)
        elif site.selector == "similarity":  # rows of zeros are no pivots, unless all candidates are
            rows = self._call(tokgraph.select.default, seen.stream, candidates, 1, 0)
            there = self._call(aten.unsqueeze.default, valid, -1)
            rows = self._call(aten.mul.Tensor, self._call(aten.detach.default, rows), there)
            score = self._call(tokgraph.similarity_score.default, rows, PIVOTS)
        else:
            score = self.equal(site, candidates, 0, seen)
        if site.selector == "random":
            score = self._call(aten.gather.default, score, 1, self._call(tokgraph.ranks.default, valid))
        score = self._call(aten._to_copy.default, score, dtype=torch.float64)
        score = self._call(aten.clamp.default, score, None, torch.finfo(torch.float32).max)
        none = self._call(aten.logical_not.default, valid)
        return self._call(aten.masked_fill.Scalar, score, none, torch.inf)

    def _prompt_mass(self, site: DropSite, seen: Seen) -> fx.Node:
        """``[batch, rows]``: what the last prompt token pays the rows of the space around the site, the mean over heads, in
        the block before the span; 0 where the row was no key. It must see all visual rows that were.
        """
        visual = self._emit.chain(self._masks.visual, indices(seen.hidden))
        padding = seen.hidden[-1].padding(self._emit) if seen.hidden else None
        if padding is not None:
            counts = self._call(aten.logical_not.default, padding)
            visual = self._call(aten.logical_and.default, visual, counts)
        mass = self._call(tokgraph.prompt_mass.default, self._prompt_weights(site, seen), visual)
        same = next(
            (i for i, (a, b) in enumerate(zip(seen.hidden, seen.around, strict=False)) if a is not b),
            min(len(seen.hidden), len(seen.around)),
        )
        for depth in reversed(range(same, len(seen.hidden))):
            space = self._emit.chain(self._entry_mask(), indices(seen.hidden[:depth]))
            none = self._call(aten.zeros_like.default, space, dtype=mass.meta["val"].dtype)
            mass = self._call(tokgraph.restore.default, none, mass, seen.hidden[depth].index)
        return self._emit.chain(mass, indices(seen.around[same:]))

    def _entry_mask(self) -> fx.Node:
        """``[batch, tokens]`` bool, for its shape."""
        return self._call(tokgraph.range_mask.default, self._entry, 0, 0)

    def _prompt_weights(self, site: DropSite, seen: Seen) -> fx.Node:
        """``[batch, heads, 1, keys]``: weights of the last prompt token in the block before the span."""
        prompt, attention = self._facts.prompt, seen.attention
        if prompt is None or attention is None:
            missing = "its loss shows no labels" if prompt is None else f"block {site.start} has no block before it"
            raise PlanError(
                f"task {site.task!r}: selector 'attention' scores by the last prompt token at the block before the span, "
                f"but {missing}",
                help="start the span at block 1 or later, and compute the loss by cross entropy over [batch, tokens] labels",
            )
        targets = self._nodes[prompt.targets]
        hoist(self._emit.graph, targets)  # labels are read by the loss only, at the graph's end
        mask = self._call(tokgraph.prompt_mask.default, targets, self._entry, prompt.ignore_index, prompt.first)
        outer = indices(seen.spaces)  # a prompt whose last token was dropped before pays nothing: no row, an error
        row = self._call(tokgraph.rows.default, self._emit.chain(mask, outer), 1, True)
        row.meta[VISUAL_ROWS] = 0
        node = self._nodes[attention.node]
        if attention.batch != 0 or rank(node) != 4:
            raise PlanError(
                f"task {site.task!r}: selector 'attention' reads weights of shape [batch, heads, tokens, keys] at the block "
                f"before the span, and this attention works on {tuple(node.meta['val'].shape)}"
                + ("" if attention.batch in (0, None) else f" with its samples on axis {attention.batch}"),
                where=where(node),
                help="use another selector, or start the span after another block",
            )
        return self._weights_of(node, attention.kind, [*outer, row])

    def _weights_of(self, node: fx.Node, kind: str, rows: Sequence[fx.Node]) -> fx.Node:
        """The weights of an attention at some of its query rows."""
        if kind == "eager":
            return self._call(aten.detach.default, self._emit.chain(node, rows, rank(node) - 2, 0))
        query, seen = argument(node, "query"), argument(node, "attn_mask")
        query = self._emit.chain(query, rows, rank(query) - 2, 0)
        if seen is not None and not is_one(seen, rank(seen) - 2):
            seen = self._emit.with_batch(seen, rank(query), 0, rows[-1])
            seen = self._emit.chain(seen, rows, rank(query) - 2, 0)
        query, key = (self._call(aten.detach.default, x) for x in (query, argument(node, "key")))  # no gradient flows
        return self._call(tokgraph.prompt_attention.default, query, key, seen, argument(node, "scale"))

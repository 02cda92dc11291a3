"""The rows that a drop site keeps: where samples hold as many visual tokens each, and where they do not."""

from __future__ import annotations

import abc

import torch
from torch import fx

from tokgraph.errors import PlanError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.plan import DropSite

from ..emitter import VISUAL_ROWS, Emitter
from .masks import Masks
from .row_space import RowSpace, indices
from .scores import Scores, Seen

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


class SiteRows(abc.ABC):
    """Emits, for one task, the indices of the rows that sites keep.

    Args:
        emit: where nodes go.
        facts: the task's facts.
        masks: the task's masks.
    """

    def __init__(self, emit: Emitter, facts: TaskFacts, masks: Masks) -> None:
        self._emit = emit
        self._facts = facts
        self._masks = masks
        self._scores = Scores(emit, facts, masks)

    @abc.abstractmethod
    def kept(self, site: DropSite, around: tuple[RowSpace, ...], seen: Seen) -> RowSpace:
        """The rows that ``site`` keeps.

        Args:
            site: a resolved drop site.
            around: the spaces of the sites that enclose it.
            seen: what selectors may look at.

        Raises:
            PlanError: demanded rows must stay, and samples hold different numbers of them; or a site around it may have
                dropped some.
        """

    def _call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self._emit.call(target, *args, origin=self._masks.entry, **kwargs)

    def _and_not(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self._call(aten.logical_and.default, a, self._call(aten.logical_not.default, b))

    def _protects(self, site: DropSite) -> bool:
        """Whether demanded rows must stay, because what leaves does not come back."""
        return not site.restore and bool(self._facts.demand.visual)

    def _refuse_inside(self, site: DropSite, around: tuple[RowSpace, ...]) -> None:
        """Refuse a site that must leave demanded rows where one around it may have taken some of them already."""
        outer = next((space.site for space in around if space.site.restore and space.dropped), None)
        if outer is not None and self._protects(site):
            raise PlanError(
                f"task {self._facts.name!r}: the site [{site.start}, {site.end}) does not restore, and lies in a site "
                f"[{outer.start}, {outer.end}) that does: demanded visual tokens, which may not go for good, may be among "
                "those that it puts back, and how many are left to the inner site depends on the batch",
                help="give both restore=True, or both restore=False",
            )

    def _free(self, alive: fx.Node, site: DropSite, around: tuple[RowSpace, ...]) -> fx.Node:
        """``[batch, rows]`` bool: those of the rows ``alive`` that may go."""
        if not self._protects(site):
            return alive
        return self._and_not(alive, self._emit.chain(self._masks.demanded, indices(around)))

    def _index(
        self, candidates: fx.Node, score: fx.Node, keep: fx.Node | int, tokens: fx.Node | int, visual: float
    ) -> fx.Node:
        """``[batch, rows]``: all rows but candidates, and ``keep`` of these; ``visual`` of them are visual tokens."""
        index = self._call(tokgraph.keep_rows.default, candidates, score, keep, tokens)
        index.meta[VISUAL_ROWS] = visual
        return index


class EqualRows(SiteRows):
    """Where every sample holds as many visual tokens: all candidates are valid, and numbers are known."""

    def kept(self, site: DropSite, around: tuple[RowSpace, ...], seen: Seen) -> RowSpace:
        """As many rows of every sample."""
        self._refuse_inside(site, around)
        count = self._facts.visual.count
        alive = around[-1].visual if around else count
        protected = self._protected() if self._protects(site) else 0
        free = self._free(self._emit.chain(self._masks.visual, indices(around)), site, around)
        width = alive - protected
        keep = min(max(site.kept(count) - protected, 0), width)
        candidates = self._call(tokgraph.rows.default, free, width, True)
        candidates.meta[VISUAL_ROWS] = width
        score = self._scores.equal(site, candidates, keep, seen)
        left = alive - (width - keep)
        index = self._index(candidates, score, keep, self._emit.size(free, 1), left)
        return RowSpace(site, index, width - keep, left)

    def _protected(self) -> int:
        if not self._facts.demand.even:
            raise PlanError(
                f"task {self._facts.name!r}: a site without restore must keep the demanded visual tokens, and the samples "
                "of the example batch hold different numbers of them",
                help="use restore=True, or give every sample the same number of images",
            )
        return self._facts.demand.visual


class RaggedRows(SiteRows):
    """Where samples hold different numbers of visual tokens: not all candidates are valid, and numbers are data.

    As many rows leave every sample as may leave the one that has the fewest visual tokens. With ``ragged="pad"`` a sample
    drops its own share: what it drops beyond these rows stays as padding, which no row sees and no block changes.
    """

    def kept(self, site: DropSite, around: tuple[RowSpace, ...], seen: Seen) -> RowSpace:
        """As many rows of every sample, some of them padding."""
        self._refuse_inside(site, around)
        flow, gone = self._facts.visual, sum(space.dropped for space in around)
        here = self._emit.chain(self._masks.visual, indices(around))
        padding = around[-1].padding(self._emit) if around else None
        free = self._free(here if padding is None else self._and_not(here, padding), site, around)
        least = (self._facts.demand.free if self._protects(site) else flow.count) - gone
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
        wide = self._emit.size(candidates, 1)  # a later batch may be shorter than the most visual tokens here
        keep = self._emit.add(wide, -dropped, candidates)
        index = self._index(candidates, score, keep, tokens, flow.mean - gone - dropped)
        lost = None
        if site.ragged == "pad":
            lost = self._call(tokgraph.lost_rows.default, candidates, score, lowest, tokens)
        return RowSpace(site, index, dropped, flow.count - gone - dropped, lost)

    def _drop_counts(
        self, site: DropSite, here: fx.Node, padding: fx.Node | None, free: fx.Node, dropped: int
    ) -> tuple[fx.Node, fx.Node]:
        """``[batch]``, or ``[1]`` for all samples: visual tokens that the site drops, and rows that go, padding included."""
        if site.ragged == "min":
            each = self._call(aten.full.default, [1], dropped, dtype=torch.int64, device=here.meta["val"].device)
            return each, each
        if padding is None:
            padding = self._call(aten.zeros_like.default, here)
        drop = self._call(tokgraph.drop_counts.default, self._masks.visual, here, padding, free, site.keep, dropped)
        return drop, self._call(aten.add.Tensor, drop, self._call(aten.sum.dim_IntList, padding, [1]))

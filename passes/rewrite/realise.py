"""The passes that realise a plan on one task, in order."""

from __future__ import annotations

from collections.abc import Sequence

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.plan import DropSite

from ..contract import GraphPass
from ..simplify import (
    CausalAttention,
    GroupedHeads,
    JoinRows,
    MergeRestores,
    RangeRows,
    ShareDuplicates,
    TakeRoutedRows,
    UniformRows,
)
from .part_rows import PartRows
from .pushdown import PushDown
from .seed import ExplicitCausalMask, SeedSites, only_projects

REWRITE: tuple[type[GraphPass], ...] = (
    ExplicitCausalMask,
    SeedSites,
    UniformRows,
    PushDown,
    PartRows,
    JoinRows,
    ShareDuplicates,
    MergeRestores,
    CausalAttention,
    GroupedHeads,
    RangeRows,
    TakeRoutedRows,
)
"""The passes of :func:`rewrite_passes`, in order."""


def seeds(facts: TaskFacts, sites: Sequence[DropSite], exact: bool) -> list[GraphPass]:
    """The passes that write the semantics of ``sites`` (resolved, outer spans first) and of demand."""
    touched = {
        block
        for s in sites
        if not only_projects(s, facts)
        for block in range(s.start, len(facts.blocks) if not s.restore or s.end is None else s.end)
    }
    touched |= {s.start - 1 for s in sites if s.selector == "attention" and s.start}
    if exact and facts.demand.reads != "all":
        touched.add(len(facts.blocks) - 1)
    return [
        ExplicitCausalMask(facts.name, tuple(sorted(touched))),
        SeedSites(facts.name, tuple(sites), exact),
    ]


def rewrite_passes(facts: TaskFacts, sites: Sequence[DropSite], exact: bool) -> list[GraphPass]:
    """The passes that turn a captured graph into the one that a plan asks for; an empty plan asks for a simpler one."""
    name = facts.name
    shared = [ShareDuplicates(name), MergeRestores(name), CausalAttention(name), GroupedHeads(name)]
    if not (sites or exact):
        return [*shared, TakeRoutedRows(name)]
    pushed = [UniformRows(name), PushDown(name), PartRows(name), JoinRows(name)]
    return [*seeds(facts, sites, exact), *pushed, *shared, RangeRows(name), TakeRoutedRows(name)]

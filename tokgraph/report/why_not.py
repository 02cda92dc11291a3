"""Why not further: what keeps the selections of a plan from moving further towards the inputs, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from tokgraph.errors import Where
from tokgraph.ir.facts import Facts
from tokgraph.ir.node import where
from tokgraph.ir.plan import Plan
from tokgraph.passes.pipeline import Pipeline
from tokgraph.passes.rewrite.realise import seeds
from tokgraph.passes.rewrite.stops import Stop, stops
from tokgraph.planning.check import check_plan

EXACT = Plan(exact=True)


def why_not(facts: Facts, plan: Plan = EXACT) -> dict[str, list[dict[str, Any]]]:
    """What keeps selections where push-down leaves them.

    Args:
        facts: facts of a captured program.
        plan: the plan whose selections are followed; the default selects the rows that the tasks' losses read.

    Returns:
        Task -> groups of ``operator`` (what is in the way), ``reason``, ``end`` (nothing lies further up), ``count`` and
        ``at``, a list of places: ``value`` from which the rows are selected, ``operator`` that computes it, ``blockers``
        (nodes in the way, the nearest to letting the selection pass first), ``module`` and ``source`` where known. The
        nearest miss comes first: the group in which the fewest nodes are in the way; ends of the road come last.

    Raises:
        PlanError: the plan does not fit the program.
        IllegalRewriteError: a block in a span mixes tokens in a way that rules out dropping them.
    """
    plan = check_plan(plan, facts)
    found = {}
    for name, graph in facts.program.items():
        task = facts[name]
        passes = seeds(task, plan.for_task(name), plan.exact) if plan.sites or plan.exact else []
        seeded = Pipeline(passes).run_task(graph, task)
        found[name] = _grouped(stops(seeded.graph))
    return found


def _grouped(found: Iterable[Stop]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, bool], list[Stop]] = {}
    for stop in found:
        groups.setdefault((_operator(stop.blockers[0]), stop.reason, stop.end), []).append(stop)
    nearest_first = sorted(groups.items(), key=lambda group: (group[0][2], min(len(s.blockers) for s in group[1])))
    return [
        {
            "operator": operator,
            "reason": reason,
            "end": end,
            "count": len(group),
            "at": [_place(stop) for stop in group],
        }
        for (operator, reason, end), group in nearest_first
    ]


def _operator(node: fx.Node) -> str:
    return str(where(node).op)


def _place(stop: Stop) -> dict[str, Any]:
    """Where a selection stops: the place of what is in the way, or of the value where export did not record that one."""
    places: list[Where] = [where(stop.blockers[0]), where(stop.value)]
    return {
        "value": stop.value.name,
        "operator": _operator(stop.value),
        "blockers": [node.name for node in stop.blockers],
        "module": next((p.module for p in places if p.module), None),
        "source": next((p.source for p in places if p.source), None),
    }

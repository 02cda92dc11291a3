"""What a task costs at several sizes, before and after a plan, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from tokgraph.ir.cost import TaskCost
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.program import TaskGraph

from .published_flops import FORMULAS, Rows, Shape, whole
from .published_shape import planned_rows, published_shape


def cost_summary(
    task: TaskFacts, graph: TaskGraph, sizes: Iterable[Mapping[str, int]], convention: str
) -> dict[str, Any]:
    """What a task costs at some sizes.

    Args:
        task: the task's facts.
        graph: its captured graph.
        sizes: sizes to give the cost at; those of the example batch where one is empty.
        convention: whose formula to give beside the exact count.

    Raises:
        AnalysisError: the graph fixes a size to another value.
    """
    cost = task.cost
    total = cost.total()
    assert cost.sizes is not None
    return {
        "sizes": {name: cost.sizes.example_of(name) for name in cost.sizes.names},
        "symbols": {name: str(expression) for name, expression in cost.sizes.names.items()},
        "symbolic": {"forward_flops": str(total.forward_flops), "backward_flops": str(total.backward_flops)},
        "assumed": list(cost.sizes.assumed),
        "uncounted": sorted({op for _, op in cost.uncounted}),
        "at": [_cost_at(task, graph, cost, asked, convention) for asked in sizes],
    }


def _cost_at(
    task: TaskFacts, graph: TaskGraph, symbolic: TaskCost, asked: Mapping[str, int], convention: str
) -> dict[str, Any]:
    cost = symbolic.at(**asked)
    assert symbolic.sizes is not None
    values = symbolic.sizes.values(**asked)
    named = {name: int(expression.xreplace(values)) for name, expression in symbolic.sizes.names.items()}
    found = {"sizes": named, **cost.rollups()}
    if convention != "exact":
        shape = published_shape(task, graph, named["tokens"], named["visual"])
        found["convention"] = _as_published(convention, shape, whole(shape))
    return found


def add_after(
    data: dict[str, Any],
    after: TaskCost,
    task: TaskFacts,
    rewritten: TaskGraph,
    sizes: Iterable[Mapping[str, int]],
    convention: str,
) -> None:
    """Write beside every cost of :func:`cost_summary` what a plan makes of it, as ``after``."""
    data["uncounted"] = sorted({*data["uncounted"], *(op for _, op in after.uncounted)})
    for found, asked in zip(data["at"], sizes, strict=True):
        found["after"] = after.at(**asked).rollups()
        if convention != "exact":
            shape = Shape(**found["convention"]["of"])
            rows = planned_rows(task, rewritten, shape)
            found["after"]["convention"] = _as_published(convention, shape, rows)


def _as_published(convention: str, shape: Shape, rows: Rows) -> dict[str, Any]:
    flops = FORMULAS[convention](
        shape, rows_per_layer=rows.rows, keys_per_layer=rows.keys, visual_per_layer=rows.visual
    )
    return {"name": convention, "forward_flops": flops, "of": asdict(shape)}

"""Facts as plain data, for people and programs: what ``tokgraph inspect`` prints and ``facts.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import fx

from .conventions import CONVENTIONS, Shape, whole
from .cost import TaskCost, Work
from .errors import AnalysisError
from .facts import Facts, TaskFacts, known_cost
from .fxnode import argument, dims
from .measure import Measurements, TaskMeasures
from .program import Program, TaskGraph

SCHEMA = 2
LINEAR = "aten.linear.default"


def summarise(
    program: Program,
    facts: Facts,
    measured: Measurements | None = None,
    *,
    sizes: Iterable[Mapping[str, int]] = (),
    convention: str = "exact",
) -> dict[str, Any]:
    """The facts as plain data (schema 2).

    Args:
        program: the captured program.
        facts: its facts.
        measured: what was measured of it.
        sizes: sizes beside those of the example batch at which to give the cost, as ``{"batch": 8, "tokens": 2048}``.
        convention: whose formula to give beside the exact count (:data:`tokgraph.conventions.NAMES`).

    Raises:
        AnalysisError: a captured graph fixes a size to another value.
    """
    elements = {name: p.numel() for name, p in program.model.named_parameters(remove_duplicate=False)}
    shared = facts.shared_parameters()
    tasks = {}
    for name, task in facts.items():
        tasks[name] = _task(task, program[name])
        tasks[name]["cost"] = _cost(task, program[name], [{}, *sizes], convention)
        tasks[name]["measured"] = None if measured is None else _measured(measured.tasks[name])
    return {
        "schema": SCHEMA,
        "shared_parameters": {"names": list(shared), "elements": sum(elements[name] for name in shared)},
        "tasks": tasks,
        "gradient_cosines": None if measured is None else [_plain(asdict(c)) for c in measured.cosines],
    }


def with_nodes(summary: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """A summary with the cost of every node and the profile of every parameter: the content of ``facts.json``."""
    tasks = {}
    for name, task in facts.items():
        tasks[name] = {**summary["tasks"][name], "profile": dict(task.profile), "nodes": _nodes(task)}
    return {**summary, "tasks": tasks}


def _task(task: TaskFacts, graph: TaskGraph) -> dict[str, Any]:
    flow = task.visual
    return {
        "nodes": len(graph.graph.nodes),
        "dimensions": {f"{d.input}[{d.dim}]": d.name if d.symbol else d.size for d in task.dimensions},
        "visual": {key: getattr(flow, key) for key in ("kind", "entry", "source", "count", "runs")},
        "demand": {"reads": task.demand.reads, "rows": task.demand.rows, "tokens": task.demand.tokens},
        "blocks": [
            {
                "index": block.index,
                "module": block.module,
                "start": block.start,
                "end": block.end,
                "nodes": len(block.nodes),
                "attention": [a.kind for a in block.attention],
            }
            for block in task.blocks
        ],
        "exits": list(task.exits),
        "operators_without_rule": sorted({op for _, op in task.unruled}),
    }


def _cost(task: TaskFacts, graph: TaskGraph, sizes: Iterable[Mapping[str, int]], convention: str) -> dict[str, Any]:
    cost = known_cost(task)
    total = cost.total()
    assert cost.sizes is not None
    return {
        "sizes": {name: cost.sizes.example_of(name) for name in cost.sizes.names},
        "symbols": {name: str(expression) for name, expression in cost.sizes.names.items()},
        "symbolic": {"forward_flops": str(total.forward_flops), "backward_flops": str(total.backward_flops)},
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
    found = {
        "sizes": named,
        "total": _work(cost.total()),
        "by_kind": {name: _work(work) for name, work in cost.by_kind().items()},
        "by_region": {name: _work(work) for name, work in cost.by_region().items()},
        "by_module": {name: _work(work) for name, work in cost.by_module().items()},
    }
    if convention != "exact":
        shape = convention_shape(task, graph, named["tokens"], named["visual"])
        rows = whole(shape)
        flops = CONVENTIONS[convention](
            shape, rows_per_layer=rows.rows, keys_per_layer=rows.keys, visual_per_layer=rows.visual
        )
        found["convention"] = {"name": convention, "forward_flops": flops, "of": asdict(shape)}
    return found


def convention_shape(task: TaskFacts, graph: TaskGraph, tokens: int, visual: int) -> Shape:
    """The dimensions that published formulas read; the feed-forward width is what the block's last linear layer takes.

    Raises:
        AnalysisError: a block has no linear layer.
    """
    nodes: dict[str, fx.Node] = {node.name: node for node in graph.graph.nodes}
    linear = [n for name in task.blocks[0].nodes if str((n := nodes[name]).target) == LINEAR]
    if not linear:
        raise AnalysisError(
            f"task {task.name!r}: block 0 has no linear layer, so published formulas do not fit it",
            help="use --flops-convention exact",
        )
    hidden, intermediate = dims(nodes[task.entry])[-1], dims(argument(linear[-1], "weight"))[1]
    return Shape(len(task.blocks), int(hidden), int(intermediate), tokens, visual)


def _nodes(task: TaskFacts) -> list[dict[str, Any]]:
    cost = known_cost(task).at()
    return [
        {"node": n.node, "op": n.op, "module": n.module, "region": n.region, "block": n.block}
        | {"visual": float(n.visual), "text": float(n.text)}
        | _work(n.work)
        for n in cost.nodes
    ]


def _work(work: Work) -> dict[str, int]:
    return {name: int(amount) for name, amount in asdict(work).items()}


def _measured(task: TaskMeasures) -> dict[str, Any]:
    allocation = task.allocation
    found: dict[str, Any] = _plain(
        {
            "allocation": {
                "queries": list(allocation.queries),
                "keys": list(allocation.keys),
                "rows": list(allocation.rows),
                "mass": allocation.mass.tolist(),
            },
            "redundancy": asdict(task.redundancy),
            "gradients": {name: asdict(norms) for name, norms in task.gradients.items()},
        }
    )
    return found


def _plain(x: Any) -> Any:
    """JSON has no NaN: what was not there to measure is ``null``."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(item) for item in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x

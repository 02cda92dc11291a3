"""Facts as plain data, for people and programs: what ``tokgraph inspect`` prints and ``facts.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from tokgraph.ir.facts import Facts, TaskFacts, facts_before, shared_parameters
from tokgraph.ir.program import Program, TaskGraph
from tokgraph.measurement.measurements import Measurements, TaskMeasures, image_attention
from tokgraph.passes.cost.attribution import task_cost
from tokgraph.passes.cost.moves import drop_overhead
from tokgraph.runtime import Accelerated

from .cost_summary import add_after, cost_summary
from .groups import Pathways, group_pathways
from .taken_for_granted import taken_for_granted

SCHEMA = 2


def summarise(
    program: Program | Facts,
    facts: Facts | Measurements | None = None,
    measured: Measurements | None = None,
    *,
    sizes: Iterable[Mapping[str, int]] = (),
    convention: str = "exact",
    accelerated: Accelerated | None = None,
) -> dict[str, Any]:
    """The facts as plain data (schema 2).

    Args:
        program: facts of a captured program, or the program.
        facts: its facts, where the program comes first.
        measured: what was measured of it.
        sizes: sizes beside those of the example batch at which to give the cost, as ``{"batch": 8, "tokens": 2048}``.
        convention: whose formula to give beside the exact count (:data:`tokgraph.report.published_flops.NAMES`).
        accelerated: the program with a plan applied, to give every cost ``after`` it as well.

    Raises:
        AnalysisError: a captured graph fixes a size to another value, or a plan fixes the number of visual tokens.
    """
    facts, measured = facts_before(program, facts, measured)
    program = facts.program
    rewritten = {} if accelerated is None else accelerated.program
    after = {name: task_cost(graph, facts[name]) for name, graph in rewritten.items()}
    sizes = [{}, *sizes]
    tasks = {}
    for name, task in facts.items():
        tasks[name] = _task(task, program[name], program.model)
        tasks[name]["cost"] = cost_summary(task, program[name], sizes, convention)
        if accelerated is not None:
            add_after(tasks[name]["cost"], after[name], task, accelerated.program[name], sizes, convention)
            tasks[name]["drop_overhead"] = drop_overhead(accelerated.program[name])
        tasks[name]["measured"] = None if measured is None else _measured(measured.tasks[name])
    return {
        "schema": SCHEMA,
        **of_all_tasks(program.model, facts, measured),
        "tasks": tasks,
        "image_attention": None
        if measured is None
        else [_plain(asdict(found)) for found in image_attention(measured, facts)],
        "gradient_cosines": None if measured is None else [_plain(asdict(c)) for c in measured.cosines],
    }


def of_all_tasks(
    model: nn.Module, tasks: Mapping[str, Pathways], measured: Measurements | None = None
) -> dict[str, Any]:
    """What a summary says of the parameters that the tasks share: of their facts, or of what is known of them elsewhere."""
    elements = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    shared = shared_parameters(tasks.values())
    return {
        "shared_parameters": {"names": list(shared), "elements": sum(elements[name] for name in shared)},
        "pathways": group_pathways(elements, tasks, measured),
    }


def batches_of(facts: Facts) -> list[tuple[bool, bool]]:
    """Of each task whose cost is symbolic: whether its graph leaves the batch open, and whether the example has one sample."""
    sizes = [known.sizes for task in facts.values() if (known := task.cost).sizes is not None]
    return [(bool(x.names["batch"].free_symbols), x.example_of("batch") == 1) for x in sizes]


def one_sample(batches: Iterable[tuple[bool, bool]]) -> tuple[dict[str, int], ...]:
    """``batch=1``, where the example batch is larger and every task's graph leaves the batch open (:func:`batches_of`)."""
    batches = list(batches)
    free = all(is_open for is_open, _ in batches)
    return ({"batch": 1},) if free and not all(single for _, single in batches) else ()


def with_nodes(summary: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """A summary with the cost of every node and the profile of every parameter: the content of ``facts.json``."""
    tasks = {}
    for name, task in facts.items():
        tasks[name] = {**summary["tasks"][name], "profile": dict(task.profile), "nodes": _nodes(task)}
    return {**summary, "tasks": tasks}


def _task(task: TaskFacts, graph: TaskGraph, model: nn.Module) -> dict[str, Any]:
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
        "attention_outside_blocks": [
            {"node": found.node, "module": found.module, "block": found.block} for found in task.unplaced
        ],
        "between_blocks": [{"node": found.node, "module": found.module} for found in task.between],
        "exits": list(task.exits),
        "taken_for_granted": taken_for_granted(graph, model),
        "capture_check": None if graph.check is None else graph.check.to_data(),
        "operators_without_rule": sorted({op for _, op in task.unruled}),
    }


def _nodes(task: TaskFacts) -> list[dict[str, Any]]:
    cost = task.cost.at()
    return [
        {"node": n.node, "op": n.op, "module": n.module, "region": n.region, "block": n.block}
        | {"visual": float(n.visual), "text": float(n.text)}
        | {name: int(amount) for name, amount in asdict(n.work).items()}
        for n in cost.nodes
    ]


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

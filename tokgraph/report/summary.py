"""Facts as plain data, for people and programs: what ``tokgraph inspect`` prints and ``facts.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.cost import TaskCost
from tokgraph.ir.facts import Facts, TaskFacts
from tokgraph.ir.node import argument, by_name, dims
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.sizes import expression
from tokgraph.measurement.measurements import Measurements, TaskMeasures, image_attention
from tokgraph.passes.cost.attribution import task_cost
from tokgraph.passes.cost.pathways import pathways
from tokgraph.runtime import Accelerated

from .published_flops import CONVENTIONS, Rows, Shape, whole

SCHEMA = 2
LINEAR = "aten.linear.default"


def summarise(
    facts: Facts,
    measured: Measurements | None = None,
    *,
    sizes: Iterable[Mapping[str, int]] = (),
    convention: str = "exact",
    accelerated: Accelerated | None = None,
) -> dict[str, Any]:
    """The facts as plain data (schema 2).

    Args:
        facts: facts of a captured program.
        measured: what was measured of it.
        sizes: sizes beside those of the example batch at which to give the cost, as ``{"batch": 8, "tokens": 2048}``.
        convention: whose formula to give beside the exact count (:data:`tokgraph.conventions.NAMES`).
        accelerated: the program with a plan applied, to give every cost ``after`` it as well.

    Raises:
        AnalysisError: a captured graph fixes a size to another value, or a plan fixes the number of visual tokens.
    """
    program = facts.program
    elements = {name: p.numel() for name, p in program.model.named_parameters(remove_duplicate=False)}
    shared = facts.shared_parameters()
    rewritten = {} if accelerated is None else accelerated.program
    after = {name: task_cost(graph, facts[name]) for name, graph in rewritten.items()}
    sizes = [{}, *sizes]
    tasks = {}
    for name, task in facts.items():
        tasks[name] = _task(task, program[name])
        tasks[name]["cost"] = _cost(task, program[name], sizes, convention)
        if accelerated is not None:
            _add_after(tasks[name]["cost"], after[name], task, accelerated.program[name], sizes, convention)
        tasks[name]["measured"] = None if measured is None else _measured(measured.tasks[name])
    return {
        "schema": SCHEMA,
        "shared_parameters": {"names": list(shared), "elements": sum(elements[name] for name in shared)},
        "pathways": _pathways(elements, facts, measured),
        "tasks": tasks,
        "image_attention": None
        if measured is None
        else [_plain(asdict(found)) for found in image_attention(measured, facts)],
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
    cost = task.cost
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
    found = {"sizes": named, **cost.rollups()}
    if convention != "exact":
        shape = convention_shape(task, graph, named["tokens"], named["visual"])
        found["convention"] = _as_published(convention, shape, whole(shape))
    return found


def _add_after(
    data: dict[str, Any],
    after: TaskCost,
    task: TaskFacts,
    rewritten: TaskGraph,
    sizes: Iterable[Mapping[str, int]],
    convention: str,
) -> None:
    """What a plan makes of each cost."""
    data["uncounted"] = sorted({*data["uncounted"], *(op for _, op in after.uncounted)})
    for found, asked in zip(data["at"], sizes, strict=True):
        found["after"] = after.at(**asked).rollups()
        if convention != "exact":
            shape = Shape(**found["convention"]["of"])
            rows = _planned_rows(task, rewritten, shape)
            found["after"]["convention"] = _as_published(convention, shape, rows)


def _as_published(convention: str, shape: Shape, rows: Rows) -> dict[str, Any]:
    flops = CONVENTIONS[convention](
        shape, rows_per_layer=rows.rows, keys_per_layer=rows.keys, visual_per_layer=rows.visual
    )
    return {"name": convention, "forward_flops": flops, "of": asdict(shape)}


def _planned_rows(task: TaskFacts, rewritten: TaskGraph, shape: Shape) -> Rows:
    """Rows that the blocks of a rewritten graph work on: text counts whole, as in the papers."""
    visual = pathways(rewritten, task).tokens_per_block
    nodes = by_name(rewritten.graph)
    lengths = [_keys(nodes[block.attention[0].node], task, shape) for block in task.blocks if block.attention]
    rows = tuple(shape.text + found for found in visual)
    keys = lengths if len(lengths) == len(rows) else [float(shape.tokens)] * len(rows)
    return Rows(rows, tuple(max(k, r) for k, r in zip(keys, rows, strict=True)), visual)


def _keys(attention: fx.Node, task: TaskFacts, shape: Shape) -> float:
    """Keys of an attention: the example's, and the text that other sizes have more."""
    assert task.cost.sizes is not None
    fused = attention.target is torch.ops.aten.scaled_dot_product_attention.default
    size = expression(dims(argument(attention, "key"))[-2] if fused else dims(attention)[-1])
    return float(size.xreplace(task.cost.sizes.values(tokens=shape.tokens)))


def _pathways(elements: Mapping[str, int], facts: Facts, measured: Measurements | None) -> list[dict[str, Any]]:
    """Group of parameters -> share of the visual tokens that it transforms, task by task, weighted by size.

    Groups are blocks, and modules two levels deep outside of them. What was measured is the share of the gradient's norm
    that flows through visual rows, ``null`` where a task has no gradient.
    """
    blocks = {block.module: block.index for task in facts.values() for block in task.blocks if block.module}
    used = {name for task in facts.values() for name in task.profile}
    groups: dict[str, list[str]] = {}
    for name in elements:
        if name in used:
            groups.setdefault(_group(name, blocks), []).append(name)
    found = []
    for group, names in groups.items():
        size = sum(elements[name] for name in names)
        profile = {
            task: sum(elements[name] * of.profile.get(name, 0.0) for name in names) / size for task, of in facts.items()
        }
        entry: dict[str, Any] = {"group": group, "elements": size, "profile": profile, "visual_gradient": None}
        if measured is not None:
            entry["visual_gradient"] = {task: _visual_part(of, names) for task, of in measured.tasks.items()}
        found.append(entry)
    return found


def _group(parameter: str, blocks: Mapping[str, int]) -> str:
    path = parameter.rpartition(".")[0]
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        if (module := ".".join(parts[:depth])) in blocks:
            return f"block {blocks[module]}"
    return ".".join(parts[:2]) or parameter


def _visual_part(task: TaskMeasures, names: Iterable[str]) -> float | None:
    norms = [task.gradients[name] for name in names if name in task.gradients]
    visual, text = (math.sqrt(sum(getattr(n, kind) ** 2 for n in norms)) for kind in ("visual", "text"))
    return visual / (visual + text) if visual + text > 0 else None


def convention_shape(task: TaskFacts, graph: TaskGraph, tokens: int, visual: int) -> Shape:
    """The dimensions that published formulas read; the feed-forward width is what the block's last linear layer takes.

    Raises:
        AnalysisError: a block has no linear layer.
    """
    nodes: dict[str, fx.Node] = by_name(graph.graph)
    linear = [n for name in task.blocks[0].nodes if str((n := nodes[name]).target) == LINEAR]
    if not linear:
        raise AnalysisError(
            f"task {task.name!r}: block 0 has no linear layer, so published formulas do not fit it",
            help="use --flops-convention exact",
        )
    hidden, intermediate = dims(nodes[task.entry])[-1], dims(argument(linear[-1], "weight"))[1]
    return Shape(len(task.blocks), int(hidden), int(intermediate), tokens, visual)


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

"""``tokgraph inspect``: what analysis finds in a model."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tokgraph.analyze import analyze
from tokgraph.capture import capture
from tokgraph.facts import Facts, TaskFacts
from tokgraph.passes.analysis.flops import Flops, count_flops
from tokgraph.program import Program

from .common import load_model, model_options, progress
from .optimize import amount


@click.command()
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(model: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Show where the visual tokens of MODEL flow: entry, blocks, demand, cost, and what the tasks share."""
    with progress() as stage:
        stage("load")
        spec = load_model(model, settings)
        stage("capture")
        program = capture(spec)
        stage("analyse")
        facts = analyze(program)
        stage("count")
        flops = {name: count_flops(graph) for name, graph in program.items()}
    summary = summarise(program, facts, flops)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print(summary, facts, Console())


def summarise(program: Program, facts: Facts, flops: dict[str, Flops]) -> dict[str, Any]:
    """The facts as plain data (schema 1)."""
    sizes = {name: p.numel() for name, p in program.model.named_parameters(remove_duplicate=False)}
    shared = facts.shared_parameters()
    return {
        "schema": 1,
        "shared_parameters": {"names": list(shared), "elements": sum(sizes[name] for name in shared)},
        "tasks": {name: _summary(facts[name], program, flops[name]) for name in facts},
    }


def _summary(task: TaskFacts, program: Program, flops: Flops) -> dict[str, Any]:
    flow = task.visual
    return {
        "nodes": len(program[task.name].graph.nodes),
        "dimensions": {f"{d.input}[{d.dim}]": d.name if d.symbol else d.size for d in task.dimensions},
        "visual": {
            "kind": flow.kind,
            "entry": flow.entry,
            "source": flow.source,
            "count": flow.count,
            "runs": flow.runs,
        },
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
        "flops": {"forward": flops.forward, "backward": flops.backward},
    }


def _print(summary: dict[str, Any], facts: Facts, console: Console) -> None:
    table = Table(title="tasks")
    table.add_column("")
    for name in facts:
        table.add_column(name, overflow="fold")
    tasks = list(summary["tasks"].values())
    rows = {
        "nodes": [str(t["nodes"]) for t in tasks],
        "dynamic": [", ".join(sorted({str(v) for v in t["dimensions"].values() if isinstance(v, str)})) for t in tasks],
        "fixed by the model": [
            ", ".join(f"{k} = {v}" for k, v in t["dimensions"].items() if isinstance(v, int)) or "-" for t in tasks
        ],
        "visual tokens": [f"{t['visual']['count']} of {t['demand']['tokens']}" for t in tasks],
        "found as": [_source(t["visual"]) for t in tasks],
        "enter at": [t["visual"]["entry"] for t in tasks],
        "blocks": [_blocks(t["blocks"]) for t in tasks],
        "leave at": [", ".join(t["exits"]) for t in tasks],
        "loss reads": [f"{t['demand']['reads']}: {t['demand']['rows']} of {t['demand']['tokens']} rows" for t in tasks],
        "FLOPs, forward": [amount(t["flops"]["forward"]) for t in tasks],
        "FLOPs, backward": [amount(t["flops"]["backward"]) for t in tasks],
        "operators without a rule": [", ".join(t["operators_without_rule"]) or "-" for t in tasks],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)
    shared = summary["shared_parameters"]
    console.print(
        f"{len(shared['names'])} parameters ({amount(shared['elements'])} elements) transform visual tokens of every task"
    )


def _source(visual: dict[str, Any]) -> str:
    return visual["kind"] if visual["source"] is None else f"{visual['kind']} of {visual['source']}"


def _blocks(blocks: list[dict[str, Any]]) -> str:
    first, last = blocks[0], blocks[-1]
    kinds = sorted({kind for block in blocks for kind in block["attention"]})
    return f"{len(blocks)} ({', '.join(kinds)}): {first['module'] or first['end']} .. {last['module'] or last['end']}"

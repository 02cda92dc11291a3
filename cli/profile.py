"""``tokgraph profile``: where the time of a program goes, by block, phase and kind of work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from tokgraph.errors import BatchError
from tokgraph.export.files import ExportedFile
from tokgraph.profile import profile_exported, profile_programs, write_trace

from .common import model_options, plain_console, policy_options, progress
from .target import Batches, accelerated_program, batches_in, example_of, holds_onnx, is_folder, names


@click.command()
@model_options
@policy_options
@click.option(
    "--plan", "plan_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A plan file to apply."
)
@click.option(
    "--runtime", type=click.Choice(["onnxruntime", "torch"]), help="[default: onnxruntime for exported graphs]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--graph",
    "kinds",
    callback=names,
    default="forward,train-step,update-step",
    help="Of forward,train-step,update-step.",
)
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True, help="Runs that count.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Runs before them.")
@click.option(
    "--threads", type=click.IntRange(0), default=0, help="Threads of an operator in ONNX Runtime.  [default: all]"
)
@click.option(
    "--batch", "batch", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Inputs.  [default: example]"
)
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write a Chrome/Perfetto trace here.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def profile(
    model: str,
    settings: tuple[str, ...],
    policy: str | None,
    plan_file: Path | None,
    runtime: str | None,
    device: Any,
    kinds: tuple[str, ...],
    runs: int,
    warmup: int,
    threads: int,
    batch: Path | None,
    trace: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time MODEL (exported graphs, a saved program, or a model file), and say where the time goes.

    Baseline and accelerated graphs, where both are there, run in turns. Exported graphs run in ONNX Runtime, programs and
    models in PyTorch.
    """
    folder = Path(model)
    exported = is_folder(model) and holds_onnx(folder) and runtime != "torch"
    if runtime == "onnxruntime" and not exported:
        raise click.UsageError(f"{model} holds no exported graphs: make some with `tokgraph export`")
    given = None if batch is None else batches_in(batch)
    with progress() as stage:
        if exported:
            batches = given or example_of(folder)
            found, profiles = profile_exported(
                folder,
                lambda file: exported_inputs(file, batches),
                device=device,
                threads=threads,
                runs=runs,
                warmup=warmup,
                kinds=kinds,
                progress=stage,
            )
        else:
            accelerated = accelerated_program(model, settings, policy, plan_file, False, options, stage, device)
            inputs = {name: graph.example() | first(given, name) for name, graph in accelerated.program.items()}
            found, profiles = profile_programs(
                accelerated.variants(accelerated.captured is not None, run=True),
                inputs,
                kinds=kinds,
                device=device,
                runs=runs,
                warmup=warmup,
                progress=stage,
            )
    if trace is not None:
        write_trace(trace, profiles)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_profile(found, plain_console())


def exported_inputs(file: ExportedFile, batches: Batches) -> dict[str, torch.Tensor]:
    """The inputs of an exported graph, from the batches in a file; inputs of other kinds start from the file itself."""
    return {**file.initial(), **first(batches, file.task)}


def first(batches: Batches | None, task: str) -> dict[str, Any]:
    """The first batch of a task."""
    if batches is None:
        return {}
    if not batches.get(task):
        raise BatchError(f"there is no batch of task {task!r}", help=f"the file has batches of {', '.join(batches)}")
    return batches[task][0]


def print_profile(found: dict[str, Any], console: Console) -> None:
    """One table a task and graph: a row a block, phase and kind, a column a variant."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for graph in found["graphs"]:
        groups.setdefault((graph["task"], graph["graph"]), {})[graph["variant"]] = graph
    for (task, kind), variants in groups.items():
        table = Table(title=f"{task} {kind}: milliseconds, median (min to max) of {found['runs']}")
        table.add_column("")
        for variant in variants:
            table.add_column(variant, justify="right")
        if len(variants) == 2:
            table.add_column("ratio", justify="right")
        _rows(table, "one run", [g["seconds"] for g in variants.values()])
        for title, part in (("phase", "by_phase"), ("kind", "by_kind"), ("", "by_block")):
            table.add_section()
            parts = [g["profile"][part] for g in variants.values()]
            for key in dict.fromkeys(key for of_variant in parts for key in of_variant):
                if part != "by_block" or key.startswith("block "):
                    _rows(table, f"{title} {key}".strip(), [of_variant.get(key) for of_variant in parts])
        table.add_section()
        profiles = [g["profile"] for g in variants.values()]
        unmapped = [
            sum(p["unmapped"].values()) / p["kernels"]["median"] if p["kernels"]["median"] else 0 for p in profiles
        ]
        table.add_row("unmapped", *(f"{share:.2%}" for share in unmapped))
        console.print(table)
    for promise in found.get("promises", ()):
        console.print(_promised(promise))
    for ratio in found["ratios"]:
        low, high = ratio["min"], ratio["max"]
        console.print(
            f"{ratio['task']} {ratio['graph']}: {ratio['median']:.3f}x ({low:.3f} to {high:.3f}) of the baseline"
        )


def _promised(promise: dict[str, Any]) -> Table:
    """What a plan promised and what came of it: seconds by what bounds them."""
    share = "" if promise["share"] is None else f", {promise['share']:.0%} of the saving realised"
    title = (
        f"{promise['task']} {promise['graph']}: promised {promise['flops']:.3f}x by FLOPs and {promise['roofline']:.3f}x by "
        f"the roofline, {promise['realised']:.3f}x measured{share}"
    )
    table = Table("milliseconds bound by", title=title)
    for name in ("before", "promised", "after", "excess"):
        table.add_column(name, justify="right")
    for bound, seconds in promise["by_bound"].items():
        cells = (seconds[name] * 1e3 for name in ("before", "promised", "after", "excess"))
        table.add_row(bound, *(f"{cell:.2f}" for cell in cells))
    return table


def _rows(table: Table, name: str, spreads: list[dict[str, float] | None]) -> None:
    cells = [
        "-" if s is None else f"{s['median'] * 1e3:.2f} ({s['min'] * 1e3:.2f}-{s['max'] * 1e3:.2f})" for s in spreads
    ]
    if len(spreads) == 2:
        a, b = spreads
        cells.append(f"{b['median'] / a['median']:.2f}x" if a and b and a["median"] else "-")
    table.add_row(name, *cells)

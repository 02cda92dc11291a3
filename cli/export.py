"""``tokgraph export``: the graphs of a program as ONNX files over one weights file, checked in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from tokgraph.export import KINDS
from tokgraph.export.packages import require_packages

from .common import amount, model_options, parse_settings, plain_console, policy_options, progress
from .target import accelerated_program, batches_in, is_folder, names


@click.command()
@model_options
@policy_options
@click.option(
    "--plan", "plan_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A plan file to apply."
)
@click.option("--verify/--no-verify", default=True, help="Compare a model's rewrite with the oracle before exporting.")
@click.option(
    "--onnx", "kinds", callback=names, default="forward,train-step", show_default=True, help=f"Of {', '.join(KINDS)}."
)
@click.option("--with-baseline", is_flag=True, help="Also the graphs as captured, to compare with.")
@click.option("--opset", type=int, default=23, show_default=True, help="ONNX operator set.")
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), default="sgd", help="Of update steps.")
@click.option("--optimizer-option", "rule", multiple=True, metavar="NAME=VALUE", help="As lr=1e-4; repeatable.")
@click.option(
    "--check",
    "check",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Batches to check on as well.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was exported as JSON.")
@click.option(
    "-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Results.  [default: out/MODEL, or OUT]"
)
def export(
    model: str,
    settings: tuple[str, ...],
    policy: str | None,
    plan_file: Path | None,
    verify: bool,
    kinds: tuple[str, ...],
    with_baseline: bool,
    opset: int,
    optimizer: str,
    rule: tuple[str, ...],
    check: Path | None,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Export MODEL (a model file, or a folder that `tokgraph optimize` wrote) to ONNX.

    Each task gets TASK.KIND.onnx: forward (loss and outputs), train-step (loss and the gradient of every parameter) or
    update-step (with the optimizer's step). All read weights.safetensors. Loss, outputs and gradients are compared with
    PyTorch on two batches; report.json has the errors found.
    """
    require_packages()  # before the work that would be in vain
    with progress() as stage:
        accelerated = accelerated_program(model, settings, policy, plan_file, verify, options, stage)
        target = out or (Path(model) if is_folder(model) else Path("out") / Path(model.partition(":")[0]).stem)
        found = accelerated.export_onnx(
            target,
            kinds,
            with_baseline=with_baseline,
            opset=opset,
            optimizer=optimizer,
            optimizer_options=parse_settings(rule, "--optimizer-option"),
            batches=None if check is None else batches_in(check),
            progress=stage,
        )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = Table()
    for column in ("file", "nodes", "size", "output error", "gradient error"):
        table.add_column(column, justify="left" if column == "file" else "right", no_wrap=column == "file")
    for name, file in found["files"].items():
        errors = [max(check[what] for check in file["checks"]) for what in ("output_error", "gradient_error")]
        gradient = "-" if file["kind"] == "forward" else f"{errors[1]:.1e}"
        table.add_row(name, str(file["nodes"]), f"{amount(file['bytes'])}B", f"{errors[0]:.1e}", gradient)
    plain_console().print(table)
    click.echo(f"wrote {target}: ONNX graphs, weights.safetensors, report.json")

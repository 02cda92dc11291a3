"""``tokgraph optimize``: thin a model, verify the result, and write plan, report and IR."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click
import torch
from rich.console import Console
from rich.table import Table

import tokgraph
from tokgraph.ir.compilation import MODES, By, Compilation
from tokgraph.ir.names import file_part
from tokgraph.ir.plan import Plan
from tokgraph.ir.printer import format_graph
from tokgraph.ir.program import Program, is_meta
from tokgraph.runtime import Accelerated
from tokgraph.stages import optimize as run
from tokgraph.stages import run_until

from .common import (
    amount,
    chosen_options,
    load_model,
    model_options,
    overhead,
    parse_settings,
    pass_options,
    plain_console,
    policy_options,
    stop_option,
    write_folder,
)
from .passes import PassLog


@click.command()
@model_options
@policy_options
@click.option(
    "--plan", "plan_file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A plan file to apply."
)
@click.option("--verify/--no-verify", default=True, help="Compare with the oracle; exit 3 if they disagree.")
@click.option(
    "--compile",
    "compile_mode",
    is_flag=False,
    flag_value="default",
    type=click.Choice(MODES),
    help="Compile every task with torch.compile, in this mode, and compare a step with the graph.",
)
@click.option(
    "--compile-by",
    type=click.Choice(get_args(By)),
    help="With --compile: graphs as a whole, or their decoder blocks one by one and equal ones once.  [default: graph]",
)
@click.option("--save/--no-save", default=True, help="Also write the program, for `tokgraph export`, `profile`, `run`.")
@pass_options
@click.option(
    "--rates/--no-rates",
    default=True,
    show_default=True,
    help="Measure how fast this machine multiplies and copies, for the speed-up that the report promises.",
)
@stop_option
@click.option("--dump-ir", type=click.Path(file_okay=False, path_type=Path), help="Write the IR after every pass here.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Results.  [default: out/MODEL]")
def optimize(
    model: str,
    settings: tuple[str, ...],
    policy: str | None,
    plan_file: Path | None,
    verify: bool,
    compile_mode: str | None,
    compile_by: By | None,
    save: bool,
    rates: bool,
    print_after: tuple[str, ...],
    time_passes: bool,
    last: str | None,
    dump_ir: Path | None,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Thin the visual tokens of MODEL (model.py or model.py:function), prove it right, and report.

    OUT gets plan.json, report.json, the IR of every task before and after, and the program itself (graphs and weights), if
    the model has values.
    """
    given = chosen_options(options)
    if plan_file is not None and (policy is not None or given):
        clash = "--policy" if policy is not None else "--" + next(iter(given)).replace("_", "-")
        raise click.UsageError(f"--plan and {clash} exclude each other")
    if compile_by is not None and compile_mode is None:
        raise click.UsageError("--compile-by goes with --compile")
    how = False if compile_mode is None else Compilation(compile_mode, compile_by or "graph")
    chosen: str | Plan = Plan.load(plan_file) if plan_file is not None else policy or "shared"
    log = PassLog(print_after, time_passes, dump_ir, last)
    with log.watching() as stage:
        stage("load")
        spec = load_model(model, settings)
        if last is None:
            rates = rates and not is_meta(spec.model)
            accelerated = run(
                spec, chosen, verify=verify, compile=how, rates=rates, progress=stage, observer=log.observer, **given
            )
        else:
            program = run_until(spec, last, chosen, progress=stage, observer=log.observer, **given)
    if last is not None:
        print_graphs(program, last if last in log.ran else None, as_json)
        return
    report = {"model": model, "settings": parse_settings(settings), **accelerated.report, "versions": _versions()}
    target = out or Path("out") / Path(model.partition(":")[0]).stem
    saved = accelerated if save and not is_meta(accelerated.model) else None
    write_folder(target, _results(accelerated, report), None if saved is None else saved.save)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        print_report(report, plain_console())
        click.echo(
            f"wrote {target / 'report.json'}, plan.json{' and ir/' if saved is None else ', ir/ and the program'}"
        )


def print_graphs(program: Program, last: str | None, as_json: bool) -> None:
    """The IR of every task as a pass left it (``None``: as all passes did), on standard output."""
    texts = {name: format_graph(graph) for name, graph in program.items()}
    if as_json:
        click.echo(json.dumps({"schema": 1, "stopped_after": last, "ir": texts}, indent=2))
    else:
        click.echo("".join(texts.values()), nl=False)


def _versions() -> dict[str, str]:
    return {"tokgraph": tokgraph.__version__, "torch": torch.__version__}


def _results(accelerated: Accelerated, report: dict[str, Any]) -> dict[str, str]:
    files = {"plan.json": accelerated.plan.to_json(), "report.json": json.dumps(report, indent=2) + "\n"}
    captured = accelerated.variants(with_baseline=True)["baseline"]
    for name in accelerated:
        files[f"ir/{file_part(name)}.before.txt"] = format_graph(captured[name])
        files[f"ir/{file_part(name)}.after.txt"] = format_graph(accelerated.program[name])
    return files


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as tables: one column a task."""
    table = Table(title=f"policy {report['policy']}")
    table.add_column("")
    tasks = report["tasks"]
    for name in tasks:
        table.add_column(name, justify="right")
    rows = {
        "nodes": [f"{t['nodes']['before']} -> {t['nodes']['after']}" for t in tasks.values()],
        "blocks": [str(t["blocks"]) for t in tasks.values()],
        "visual tokens per block, before": [runs(t["tokens_per_block"]["before"]) for t in tasks.values()],
        "visual tokens per block, after": [runs(t["tokens_per_block"]["after"]) for t in tasks.values()],
        "forward FLOPs": [_change(t["flops"], "forward") for t in tasks.values()],
        "backward FLOPs": [_change(t["flops"], "backward") for t in tasks.values()],
        "FLOPs ratio": [f"{t['flops']['ratio']:.3f}x" for t in tasks.values()],
        "peak memory": [
            f"{amount(t['peak_bytes']['before'])}B -> {amount(t['peak_bytes']['after'])}B" for t in tasks.values()
        ],
        "drop overhead": [overhead(t["drop_overhead"]) for t in tasks.values()],
    }
    if report["rates"] is not None:
        rows["time promised by the roofline"] = [f"{t['promise']['roofline']:.3f}x" for t in tasks.values()]
    checks = report["verification"].get("tasks")
    if checks:
        rows["worst output error"] = [f"{checks[name]['output_error']:.1e}" for name in tasks]
        rows["worst gradient error"] = [f"{checks[name]['gradient_error']:.1e}" for name in tasks]
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)
    for name, task in report.get("compilation", {}).get("tasks", {}).items():
        console.print(f"{name}: compiled in {task['seconds']:.1f} s, {task['functions']} functions, {_agreement(task)}")
    outcomes = {True: "verified", False: "NOT verified", None: "not verified (--no-verify)"}
    console.print(
        f"sharing index {report['sharing_index']:.3f}, coverage {report['coverage']:.3f}, "
        f"FLOPs {report['flops_ratio']:.3f}x, {outcomes[report['verification']['passed']]}"
    )


def _agreement(task: dict[str, Any]) -> str:
    if task["output_error"] is None:
        return "not compared: it draws random numbers"
    return f"worst error {max(task['output_error'], task['gradient_error']):.1e}"


def _change(flops: dict[str, dict[str, int]], phase: str) -> str:
    return f"{amount(flops['before'][phase])} -> {amount(flops['after'][phase])}"


def runs(values: list[float]) -> str:
    """``[16, 8, 8, 1]`` -> ``16, 8 x2, 1``."""
    groups: list[list[float]] = []
    for value in values:
        if groups and groups[-1][0] == value:
            groups[-1].append(value)
        else:
            groups.append([value])
    return ", ".join(f"{group[0]:g}" + (f" x{len(group)}" if len(group) > 1 else "") for group in groups)

"""``tokgraph inspect``: what analysis finds in a model, and what batches show of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tokgraph.apart import Asked, ModelFile, Summary, can_be_parted, summarise_apart
from tokgraph.files import write_atomically
from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import Plan
from tokgraph.measurement.measurements import Measurements, measure
from tokgraph.passes.capture.export import capture
from tokgraph.report.published_flops import NAMES
from tokgraph.report.report import make_report
from tokgraph.report.summary import batches_of, one_sample, summarise, with_nodes
from tokgraph.report.why_not import EXACT, why_not
from tokgraph.runtime import Accelerated
from tokgraph.stages import analyze, apply

from .common import calibration, load_model, model_options, parse_settings, pass_options, plain_console
from .passes import PassLog
from .tables import print_summary


@click.command()
@model_options
@click.option(
    "--at",
    "sizes",
    multiple=True,
    metavar="SIZES",
    help="Also the cost at other sizes, as batch=8,tokens=2048; repeatable.  [default: batch=1]",
)
@click.option(
    "--flops-convention", "convention", type=click.Choice(NAMES), default="exact", help="Also count as a paper does."
)
@click.option(
    "--calibrate",
    metavar="FILE",
    help="Measure attention, redundancy and gradients on the batches of a safetensors file, or on the 'example' batch.",
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Also the cost after this plan file.",
)
@click.option(
    "--why-not",
    "asks_why",
    is_flag=True,
    help="Also what keeps rows that nobody reads from being dropped earlier: those of the plan, or of `exact`.",
)
@pass_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Write facts.json here.")
def inspect(
    model: str,
    settings: tuple[str, ...],
    sizes: tuple[str, ...],
    convention: str,
    calibrate: str | None,
    plan_file: Path | None,
    asks_why: bool,
    print_after: tuple[str, ...],
    time_passes: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Show where the visual tokens of MODEL flow, what they cost by block and task, and what the tasks share."""
    asked = Asked(tuple(_sizes(text) for text in sizes), convention, nodes=out is not None)
    plan = None if plan_file is None else Plan.load(plan_file)
    log = PassLog(print_after, time_passes)
    with log.watching() as stage:
        stage("load")
        spec = load_model(model, settings)
        batches = calibration(calibrate, spec)
        found = None
        if calibrate is None and plan is None and not asks_why and log.observer is None and can_be_parted(spec):
            stage("capture, analyse and summarise")
            found = summarise_apart(ModelFile(model, parse_settings(settings)), spec, asked)
        if found is None:
            stage("capture")
            program = capture(spec, observer=log.observer)
            stage("analyse")
            facts = analyze(program)
            measured = None
            if calibrate is not None:
                stage("measure")
                measured = measure(facts, batches)
            accelerated = None
            if plan is not None:
                stage("apply the plan")
                accelerated = apply(facts, plan, observer=log.observer)
            stage("summarise")
            found = _summarised(facts, measured, accelerated, asked)
            if asks_why:
                stage("ask why not")
                found.summary["why_not"] = found.full["why_not"] = why_not(facts, plan or EXACT)
    if out is not None:
        write_atomically(out / "facts.json", json.dumps(found.full, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(found.summary, indent=2))
    else:
        print_summary(found.summary, plain_console())


def _summarised(facts: Facts, measured: Measurements | None, accelerated: Accelerated | None, asked: Asked) -> Summary:
    """The summary of a program that is here as a whole."""
    sizes = asked.sizes or one_sample(batches_of(facts))
    summary = summarise(facts, measured, sizes=sizes, convention=asked.convention, accelerated=accelerated)
    if accelerated is not None:
        report = make_report(accelerated)
        summary["plan"] = {name: report[name] for name in ("policy", "options", "sharing_index", "coverage")}
    return Summary(summary, with_nodes(summary, facts) if asked.nodes else {})


def _sizes(text: str) -> dict[str, int]:
    found: dict[str, Any] = parse_settings(tuple(part.strip() for part in text.split(",")), "--at")
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise click.BadParameter(f"{name}={value} is no positive whole number", param_hint="--at")
    return found

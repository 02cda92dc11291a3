"""``tokgraph plan``, ``diff`` and ``compare``: plans without a rewrite, and plans and policies side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tokgraph.cluster import estimate
from tokgraph.comparison import compare as run_compare
from tokgraph.comparison import diff as run_diff
from tokgraph.ir.cluster import Cluster
from tokgraph.ir.plan import Plan, Ragged
from tokgraph.measurement.measurements import image_mass, measure
from tokgraph.passes.capture.export import capture
from tokgraph.planning import Shared, policies
from tokgraph.planning import policy as named
from tokgraph.stages import analyze, apply, make_plan

from .cluster import cluster_option, print_estimate
from .common import (
    amount,
    calibration,
    chosen_options,
    load_model,
    mix_option,
    model_options,
    plain_console,
    policy_options,
    progress,
    ragged_option,
)


@click.command()
@model_options
@policy_options
@click.option("--calibrate", metavar="FILE", help="Measure attention mass on these batches, or on the 'example' batch.")
@click.option("--explain", is_flag=True, help="Say why the planner chose this plan, and why others lost.")
@cluster_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON, as plans always are.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan here.")
def plan(
    model: str,
    settings: tuple[str, ...],
    policy: str | None,
    calibrate: str | None,
    explain: bool,
    cluster: Cluster | None,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Plan MODEL with a policy and print the plan, without rewriting anything.

    With --cluster, print what training takes on many GPUs, with the plan and without; --mix then weighs micro-batches.
    """
    given = chosen_options(options)
    mix = given.get("mix")
    if cluster is not None and "target_flops" not in given:
        given.pop("mix", None)  # else it is for the planner as well
    with progress() as stage:
        stage("load")
        spec = load_model(model, settings)
        batches = calibration(calibrate, spec)
        stage("capture")
        program = capture(spec)
        stage("analyse")
        facts = analyze(program)
        if calibrate is not None:
            stage("measure")
            given["mass"] = image_mass(measure(facts, batches), facts)
        ragged = given.pop("ragged", "min")
        chosen = named(policy or "shared", **given)
        made = make_plan(facts, chosen, ragged=ragged)
        if cluster is not None:
            stage("estimate")
            found = estimate(apply(facts, made), cluster, mix=mix)
    if out is not None:
        made.save(out)
    if cluster is not None:
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            print_estimate(found, plain_console())
    elif out is None:
        click.echo(made.to_json(), nl=False)
    if explain:
        lines = (
            chosen.search(facts).explain() if isinstance(chosen, Shared) and chosen.target_flops else _reason(chosen)
        )
        click.echo("\n".join(lines), err=True)


def _reason(chosen: Any) -> list[str]:
    return [f"policy {chosen.name} makes one plan for these options; --target-flops makes 'shared' choose"]


@click.command()
@click.argument("plan_a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("plan_b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def diff(plan_a: Path, plan_b: Path, as_json: bool) -> None:
    """Show how two plan files differ: sites of one and not of the other, and fields."""
    found = run_diff(Plan.load(plan_a), Plan.load(plan_b))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for mark, key in (("-", "only_a"), ("+", "only_b")):
        for site in found[key]:
            click.echo(f"{mark} {_site(site)}")
    for name, (a, b) in found["fields"].items():
        click.echo(f"~ {name}: {json.dumps(a)} -> {json.dumps(b)}")
    if not (found["only_a"] or found["only_b"] or found["fields"]):
        click.echo("the plans are equal")


def _site(site: dict[str, Any]) -> str:
    after = "restored" if site["restore"] else "gone for good"
    end = "end" if site["end"] is None else site["end"]
    return f"{site['task']} [{site['start']}, {end}) keep {site['keep']:g} {site['selector']} {site['mode']}, {after}"


@click.command()
@model_options
@click.option(
    "--policies", "names", required=True, metavar="A,B,C", help="Policies or plan files, separated by commas."
)
@mix_option("Weights of the tasks in the mixed ratios.  [default: all alike]")
@ragged_option
@click.option("--verify/--no-verify", default=True, help="Compare each with the oracle.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def compare(
    model: str,
    settings: tuple[str, ...],
    names: str,
    mix: dict[str, float] | None,
    ragged: Ragged | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Show what several policies do to MODEL, in one table.

    Exits with 3 when a result disagrees with the oracle.
    """
    chosen: list[str | Plan] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in policies() and not Path(name).is_file():
            raise click.BadParameter(f"{name!r} is no policy and no plan file", param_hint="--policies")
        chosen.append(name if name in policies() else Plan.load(name))
    if not chosen:
        raise click.BadParameter("names no policy", param_hint="--policies")
    with progress() as stage:
        stage("load")
        spec = load_model(model, settings)
        found = run_compare(spec, chosen, mix=mix, ragged=ragged or "min", verify=verify, progress=stage)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found, plain_console())
    if any(row.get("verified") is False for row in found["rows"]):
        click.get_current_context().exit(3)


def _print(found: dict[str, Any], console: Console) -> None:
    tasks = list(found["mix"])
    mix = ", ".join(f"{name} {weight:g}" for name, weight in found["mix"].items())
    console.print(f"relative to the captured program; mix: {mix}; FLOPs by task: {'/'.join(tasks)}", highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True, show_edge=False)
    table.add_column("policy", overflow="fold")
    for column in (
        "FLOPs\nby task",
        "FLOPs\nmixed",
        "kept\nbytes",
        "sharing\nindex",
        "coverage",
        "new\nparams",
        "oracle",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        if "error" in row:
            table.add_row(row["policy"], "-")
            continue
        ratios = (row["mixed_flops_ratio"], row["activation_ratio"], row["sharing_index"], row["coverage"])
        verified = {True: "yes", False: "NO", None: "-"}[row["verified"]]
        each, cells = "/".join(f"{row['flops_ratio'][t]:.3f}" for t in tasks), [f"{x:.3f}" for x in ratios]
        table.add_row(row["policy"], each, *cells, amount(row["new_parameters"]).replace(" ", ""), verified)
    console.print(table)
    for row in found["rows"]:
        if "error" in row:
            console.print(f"{row['policy']}: {row['error']}", highlight=False)

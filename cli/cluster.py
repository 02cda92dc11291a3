"""``tokgraph plan --cluster``: what the cluster is, from its text, and the tables of what a run takes there."""

from __future__ import annotations

from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tokgraph.errors import PlanError
from tokgraph.ir.cluster import Cluster

from .common import amount
from .tables import runs


def _read(context: click.Context, parameter: click.Parameter, text: str | None) -> Cluster | None:
    if text is None:
        return None
    try:
        return Cluster.parse(text)
    except PlanError as error:
        message = error.message.removeprefix("cluster: ")
        raise click.BadParameter(f"{message} ({error.help})" if error.help else message) from None


cluster_option = click.option(
    "--cluster",
    callback=_read,
    metavar="NAME=VALUE,...",
    help="Print what training takes on a cluster instead of the plan: gpus=64,memory=80GB,flops=989TFLOPS,bandwidth=3.35TB/s, "
    "and tokens=1T, node, link, network, reserve, micro_batches, stages.",
)


def print_estimate(found: dict[str, Any], console: Console) -> None:
    """Print an estimate (:func:`tokgraph.cluster.estimate`)."""
    cluster, model = found["cluster"], found["model"]["after"]
    console.print(
        f"{cluster['gpus']} GPUs of {amount(cluster['memory'])}B; {amount(model['elements'])} parameters, "
        f"{amount(model['trained_elements'])} of them trained; plan: {found['policy']}",
        highlight=False,
    )
    mix = ", ".join(f"{name} {weight:g}" for name, weight in found["mix"].items())
    console.print(f"a step: {cluster['micro_batches']} micro-batches a GPU; mix: {mix}", highlight=False)
    for name, task in found["tasks"].items():
        console.print(_parts(name, task))
    console.print(_layouts(found))
    console.print(
        "again: blocks are computed again in the backward pass; ms: communication hidden where it can be, and not at all",
        highlight=False,
    )
    for when, label in (("before", "without the plan"), ("after", "with the plan")):
        fitting = ", ".join(_name(row["layout"], row["checkpoint"]) for row in found["fits"][when])
        console.print(f"fits {label}: {fitting or 'none'}", highlight=False)
    if found["uncounted"]:
        console.print(f"FLOPs unknown: {', '.join(found['uncounted'])}", highlight=False)
    for line in found["not_counted"]:
        console.print(f"note: {line}", highlight=False)


def _parts(name: str, task: dict[str, Any]) -> Table:
    """A row a part; blocks that are alike together."""
    parts = {p["title"]: (p, q) for p, q in zip(task["before"]["parts"], task["after"]["parts"], strict=True)}
    table = _table(f"{name}: bytes, of a micro-batch of {task['before']['tokens']} tokens")
    table.add_column("", no_wrap=True)
    for column in ("parameters", "kept", "kept\nwith plan", "again", "again\nwith plan"):
        table.add_column(column, justify="right", no_wrap=True)

    def cells(title: str) -> list[str]:
        before, after = parts[title]
        kept = [_short(x[what]) for what in ("kept", "kept_again") for x in (before, after)]
        return [_short(after["parameter_bytes"]), *kept]

    for label, first in runs(list(parts), cells):
        table.add_row(label, *cells(first))
    return table


def _layouts(found: dict[str, Any]) -> Table:
    """Two rows a layout: without the plan, and with it."""
    table = _table("a step on the cluster")
    for column in ("layout", "again", "plan"):
        table.add_column(column, no_wrap=True)
    budget = ("days", "GPU\nhours") if found["cluster"]["tokens"] else ()
    for column in ("GB\na GPU", "fits", "ms,\noverlap", "ms,\nwithout", "tokens/s", "MFU", *budget):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["layouts"]:
        for when, plan in (("before", "no"), ("after", "yes")):
            again = "yes" if row["checkpoint"] else "no"
            table.add_row(row["layout"], again, plan, *_cells(row[when]))
    return table


def _table(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, padding=0, collapse_padding=True, show_edge=False)


def _cells(told: dict[str, Any]) -> list[str]:
    seconds = told["seconds"]
    cells = [
        f"{told['memory']['total'] / 1e9:.1f}",
        "yes" if told["fits"] else "NO",
        f"{seconds['step'] * 1e3:.3g}",
        f"{seconds['serial'] * 1e3:.3g}",
        _short(told["tokens_per_second"]),
        f"{told['mfu']:.0%}",
    ]
    return cells + ([] if told["days"] is None else [f"{told['days']:.3g}", _short(told["gpu_hours"])])


def _short(number: float) -> str:
    return amount(float(f"{number:.3g}")).replace(" ", "")


def _name(layout: str, checkpoint: bool) -> str:
    return f"{layout} again" if checkpoint else layout

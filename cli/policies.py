"""``tokgraph policies``: the policies and their options."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tokgraph.policies import Policy
from tokgraph.policies import policies as known


def describe(policy: type[Policy]) -> dict[str, Any]:
    """A policy's summary and options, as plain data."""
    options = {f.name: {"type": str(f.type), "default": f.default} for f in dataclasses.fields(policy)}  # type: ignore[arg-type]
    return {"summary": (inspect.getdoc(policy) or "").splitlines()[0], "options": options}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def policies(as_json: bool) -> None:
    """List the policies and their options."""
    described = {name: describe(policy) for name, policy in known().items()}
    if as_json:
        click.echo(json.dumps({"schema": 1, "policies": described}, indent=2))
        return
    table = Table("policy", "what it does", "options (defaults)")
    for name, policy in described.items():
        options = ", ".join(f"{option}={facts['default']}" for option, facts in policy["options"].items())
        table.add_row(name, policy["summary"], options or "none")
    Console().print(table)

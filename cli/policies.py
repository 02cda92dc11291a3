"""``tokgraph policies``: the policies and their options."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokgraph.planning import policies as known
from tokgraph.planning.options import options_of

SCHEMA = 2


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def policies(as_json: bool) -> None:
    """List the policies and their options, with defaults and ranges."""
    if as_json:
        described = {name: policy.describe() for name, policy in known().items()}
        click.echo(json.dumps({"schema": SCHEMA, "policies": described}, indent=2))
        return
    console = Console(highlight=False)
    for name, policy in known().items():
        about = policy.describe()
        source = f" [dim]({escape(about['source'])})[/dim]" if about["source"] else ""
        console.print(f"[bold]{name}[/bold]: {escape(about['summary'].replace('``', ''))}{source}")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for option in options_of(policy).values():
            table.add_row(f"{option.name}={option.default}", escape(option.range()), escape(option.description))
        if table.rows:
            console.print(table)
    console.print("options: --option NAME=VALUE, or an option of the command's own; L: the number of blocks")

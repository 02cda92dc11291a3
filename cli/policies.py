"""``tokgraph policies``: the policies and their options."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any, get_type_hints

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokgraph.planning import Policy
from tokgraph.planning import policies as known


def describe(policy: type[Policy]) -> dict[str, Any]:
    """A policy's summary and options, as plain data.

    Returns:
        ``{"summary", "options": {name: {"type", "default", "allowed", "meaning"}}}``; ``allowed`` is an expression of the
        option's name and of ``L``, the number of blocks, or ``None`` where the type says it all.
    """
    text = inspect.getdoc(policy) or policy.name
    meanings, hints = _meanings(text), get_type_hints(policy)
    options = {
        f.name: {
            "type": _type_name(hints[f.name]),
            "default": f.default,
            "allowed": f.metadata.get("allowed"),
            "meaning": meanings.get(f.name, ""),
        }
        for f in dataclasses.fields(policy)  # type: ignore[arg-type]
    }
    return {"summary": " ".join(text.partition("\n\n")[0].split()), "options": options}


def _meanings(text: str) -> dict[str, str]:
    """Option -> what the ``Args:`` of a docstring say of it."""
    _, _, section = text.partition("\nArgs:\n")
    found: dict[str, str] = {}
    for part in re.split(r"\n(?=    \w+: )", "\n" + section.partition("\n\n")[0])[1:]:
        name, _, meaning = part.strip().partition(": ")
        found[name] = " ".join(meaning.split()).replace("``", "")
    return found


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else re.sub(r"\b(typing|collections\.abc)\.", "", str(hint))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def policies(as_json: bool) -> None:
    """List the policies and their options, with defaults and ranges."""
    described = {name: describe(policy) for name, policy in known().items()}
    if as_json:
        click.echo(json.dumps({"schema": 1, "policies": described}, indent=2))
        return
    console = Console(highlight=False)
    for name, policy in described.items():
        console.print(f"[bold]{name}[/bold]: {escape(policy['summary'].replace('``', ''))}")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for option, facts in policy["options"].items():
            allowed = facts["allowed"] or facts["type"]
            table.add_row(f"{option}={facts['default']}", escape(allowed), escape(facts["meaning"]))
        console.print(table)
    console.print("options: --option NAME=VALUE, or an option of the command's own; L: the number of blocks")

"""What several commands share: the model argument, ``--set``, progress on standard error, and units."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokgraph.spec import ModelSpec, load


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The ``MODEL`` argument and ``--set``."""
    command = click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Argument of the build function; repeatable."
    )(command)
    return click.argument("model", metavar="MODEL")(command)


def load_model(model: str, settings: tuple[str, ...]) -> ModelSpec:
    """The spec that ``model.py`` or ``model.py:function`` builds."""
    if not Path(model.partition(":")[0]).is_file():
        raise click.BadParameter(f"no such file: {model.partition(':')[0]}", param_hint="MODEL")
    return load(model, **parse_settings(settings))


def parse_settings(settings: tuple[str, ...], option: str = "--set") -> dict[str, Any]:
    """``("size=small", "layers=4")`` -> ``{"size": "small", "layers": 4}``: Python literals, else strings."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name.isidentifier():
            raise click.BadParameter(f"{setting!r} is not NAME=VALUE", param_hint=option)
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = text
    return parsed


def amount(number: float) -> str:
    """A number of FLOPs or bytes with a decimal unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g}"


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows the stage that runs now, on standard error (bound now: a stage may redirect it)."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        running: list[Any] = []

        def stage(name: str) -> None:
            for done in running:
                bar.update(done, total=1, completed=1)
            running[:] = [bar.add_task(name, total=None)]

        yield stage
        for done in running:
            bar.update(done, total=1, completed=1)

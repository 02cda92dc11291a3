"""What several commands share: the model argument, ``--set``, policies, switches of passes, progress, files and units."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokgraph.files import new_directory
from tokgraph.ir.spec import ModelSpec, load
from tokgraph.planning import Shared, policies
from tokgraph.planning.options import options_of
from tokgraph.stages import PASSES
from tokgraph.store.batches import load_batches

ALL = "all"
"""What ``--print-after`` takes for every pass."""


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The ``MODEL`` argument and ``--set``."""
    command = click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Argument of the build function; repeatable."
    )(command)
    return click.argument("model", metavar="MODEL")(command)


class _PolicyName(click.ParamType):  # type: ignore[type-arg]
    """A policy's name. Policies are looked up when one is given: a broken plugin must not break other commands."""

    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name, if there is such a policy."""
        return click.Choice(list(policies())).convert(value, param, ctx)


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that choose a policy and set its options; :func:`chosen_options` collects them."""
    options = (
        click.option(
            "--policy", type=_PolicyName(), metavar="NAME", help="One of `tokgraph policies`.  [default: shared]"
        ),
        _policy_option("span", callback=_span, metavar="START:END"),
        _policy_option("keep"),
        _policy_option("selector"),
        _policy_option("mode"),
        _policy_option("seed"),
        _policy_option("exact"),
        ragged_option,
        _policy_option("target_flops"),
        mix_option(sentence(SHARED["mix"].description)),
        click.option(
            "--option", "others", multiple=True, metavar="NAME=VALUE", help="Any option of the policy; repeatable."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _policy_option(name: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option of the policy ``shared`` as one of a command: type, range and help are those that the policy states."""
    option = SHARED[name]
    switch = f"--{name.replace('_', '-')}"
    if option.values.get("type") == "boolean":
        switch += f"/--no-{name.replace('_', '-')}"
    elif "callback" not in more:
        more["type"] = _click_type(option.values)
    help = sentence(option.description)
    if option.default is True or "enum" in option.values:  # numbers have other defaults in other policies
        help += f"  [default: {name if option.default is True else option.default}]"
    return click.option(switch, default=None, help=help, **more)


def _click_type(schema: Mapping[str, Any]) -> Any:
    """A JSON Schema as click's type. Whole numbers are checked by the policy, whose message is shorter for large bounds."""
    if "enum" in schema:
        return click.Choice(schema["enum"])
    if schema["type"] == "number":
        low, high = (schema.get(f"exclusive{side}", schema.get(side.lower())) for side in ("Minimum", "Maximum"))
        return click.FloatRange(low, high, "exclusiveMinimum" in schema, "exclusiveMaximum" in schema)
    return {"integer": int, "string": str}[schema["type"]]


def sentence(text: str) -> str:
    """A description as a sentence: it begins with a capital letter and ends with a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


SHARED = options_of(Shared)
ragged_option = _policy_option("ragged")


def pass_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The switches that show what passes do: ``--print-after``, ``--time-passes``."""
    options = (
        click.option(
            "--print-after",
            multiple=True,
            type=click.Choice([ALL, *PASSES]),
            metavar="PASS",
            help="Print every task's IR after this pass to standard error; repeatable, or 'all'.",
        ),
        click.option("--time-passes", is_flag=True, help="Print the time of stages and passes to standard error."),
    )
    for option in reversed(options):
        command = option(command)
    return command


stop_option = click.option(
    "--stop-after",
    "last",
    type=click.Choice(PASSES),
    metavar="PASS",
    help="Run no further than this pass, print every task's IR, and write no results.",
)


def mix_option(meaning: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--mix TASK=WEIGHT,...``."""
    return click.option("--mix", callback=_mix, metavar="TASK=WEIGHT,...", help=meaning)


def chosen_options(given: dict[str, Any]) -> dict[str, Any]:
    """The policy options that the user gave, by name."""
    others = parse_settings(given.pop("others"), "--option")
    return {name: value for name, value in given.items() if value is not None} | others


def _span(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, separator, end = text.partition(":")
    try:
        if not separator:
            raise ValueError
        return int(start), int(end)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not START:END, as 1:7") from None


def _mix(context: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, weight = part.strip().rpartition("=")  # a task's name may be anything
        found[name] = parse_settings((f"weight={weight}",), "--mix")["weight"] if name else None
    if not all(isinstance(weight, (int, float)) for weight in found.values()):
        raise click.BadParameter(f"{text!r} is not TASK=WEIGHT,..., as understanding=0.5,generation=0.5")
    return found


def calibration(source: str | None, spec: ModelSpec) -> dict[str, list[dict[str, Any]]] | None:
    """The batches of ``--calibrate FILE``; ``None`` stands for the example batch."""
    if source in (None, "example"):
        return None
    if not Path(str(source)).is_file():
        raise click.BadParameter(f"no such file: {source}", param_hint="--calibrate")
    return load_batches(Path(str(source)), spec)


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


def overhead(moved: dict[str, Any]) -> str:
    """The operators that move rows, and what they move in a step."""
    return f"{moved['operators']} moves of rows, {amount(sum(moved['bytes'].values()))}B"


def write_folder(folder: Path, files: dict[str, str], write: Callable[[Path], None] | None = None) -> None:
    """Write files by their paths within a folder, all of them or none.

    Args:
        folder: the folder.
        files: path within it -> text.
        write: writes more, to the folder that it is given.
    """
    with new_directory(folder) as temporary:
        if write is not None:
            write(temporary)
        for name, text in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")


def plain_console() -> Console:
    """A console that prints names as they are, brackets and colons among them."""
    return Console(markup=False, emoji=False)


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

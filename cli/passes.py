"""What a compiler developer sees of the passes: the IR after them, and their time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tokgraph.ir.names import file_part
from tokgraph.ir.printer import format_graph
from tokgraph.ir.program import TaskGraph
from tokgraph.passes.pipeline import Observer, PassDelta

from .common import ALL, progress, write_folder


@dataclass
class Stage:
    """A stage that ran, and the passes in it.

    Args:
        name: its name.
        start: when it began.
        seconds: how long it took.
        passes: what its passes did, in order.
    """

    name: str
    start: float
    seconds: float = 0.0
    passes: list[PassDelta] = field(default_factory=list)


class PassLog:
    """Watches stages and passes, and shows what was asked for when they are through, or when one failed.

    All of it goes to standard error, so that standard output stays what the command is for.

    Args:
        print_after: names of passes after which to print the IR, or ``all``.
        time_passes: print a table of the time that stages and passes took.
        dump_ir: folder that gets the IR after every pass, a file each, numbered in order.
        last: the pass after which to stop.
    """

    def __init__(
        self, print_after: tuple[str, ...], time_passes: bool, dump_ir: Path | None = None, last: str | None = None
    ) -> None:
        self._print_after = print_after
        self._time_passes = time_passes
        self._dump_ir = dump_ir
        self._last = last
        self._stages: list[Stage] = []
        self._texts: list[str] = []
        self._dumps: dict[str, str] = {}

    @property
    def observer(self) -> Observer | None:
        """What the stages are to tell; ``None`` where nothing was asked for."""
        asked = self._print_after or self._time_passes or self._dump_ir or self._last
        return self._observe if asked else None

    @property
    def ran(self) -> set[str]:
        """Names of the passes that ran."""
        return {delta.name for stage in self._stages for delta in stage.passes}

    @contextmanager
    def watching(self) -> Iterator[Callable[[str], None]]:
        """A function to call with each stage's name before it begins; it shows progress as well."""
        try:
            with progress() as shown:

                def stage(name: str) -> None:
                    self._close()
                    self._stages.append(Stage(name, time.perf_counter()))
                    shown(name)

                yield stage
        finally:
            self._close()
            self._show()

    def _close(self) -> None:
        if self._stages and not self._stages[-1].seconds:
            self._stages[-1].seconds = time.perf_counter() - self._stages[-1].start

    def _observe(self, delta: PassDelta, graph: TaskGraph) -> None:
        self._stages[-1].passes.append(delta)
        wanted = ALL in self._print_after or delta.name in self._print_after
        if not wanted and self._dump_ir is None:
            return
        text = format_graph(graph)
        if wanted:
            facts = (delta.name, _numerics(delta), *(() if delta.modified else ("no change",)))
            self._texts.append(f"--- after {', '.join(facts)}\n{text}")
        task = file_part(delta.task)
        number = sum(name.startswith(f"{task}.") for name in self._dumps)
        self._dumps[f"{task}.{number:02d}.{delta.name}.txt"] = text

    def _show(self) -> None:
        for text in self._texts:
            click.echo(text, err=True, nl=False)
        for name in dict.fromkeys([*self._print_after, *([self._last] if self._last else [])]):
            if name != ALL and name not in self.ran:
                click.echo(f"--- {name} did not run", err=True)
        if self._dump_ir is not None and self._dumps:
            write_folder(self._dump_ir, self._dumps)
        if self._time_passes and self._stages:
            Console(file=sys.stderr).print(time_table(self._stages))


def time_table(stages: list[Stage]) -> Table:
    """A row a stage and a row a pass under it; shares are of all stages together."""
    whole = sum(stage.seconds for stage in stages) or 1.0
    table = Table(title="time by stage and pass", caption="operators: calls more or fewer than before the pass")
    for column in ("seconds", "share", "nodes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("stage; pass, task, numerics; operators")
    for stage in stages:
        table.add_row(f"{stage.seconds:.3f}", f"{stage.seconds / whole:.1%}", "", stage.name, style="bold")
        for delta in stage.passes:
            table.add_row(f"{delta.seconds:.3f}", f"{delta.seconds / whole:.1%}", *_cells(delta))
    table.add_section()
    table.add_row(f"{whole:.3f}", "100.0%", "", "all")
    return table


def _cells(delta: PassDelta) -> tuple[str, str]:
    same = delta.nodes_before == delta.nodes_after
    nodes = str(delta.nodes_after) if same else f"{delta.nodes_before} -> {delta.nodes_after}"
    operators = ", ".join(f"{count:+d} {name}" for name, count in delta.operators.items())
    what = operators or ("as many of each" if delta.modified else "no change")
    return nodes, f"  {delta.name}, {delta.task}, {_numerics(delta)}\n    {what}"


def _numerics(delta: PassDelta) -> str:
    return delta.numerics or "numerics not said"

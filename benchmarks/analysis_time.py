"""Measured time of the compiler itself, on shallow and deep models of the same tiny width, beside that of torch.export.

All stages should grow with the number of blocks and no faster; capture should take little longer than a bare
`torch.export` of the same forwards, and what comes after it little beside capture. The models are `examples/janus.py` with
its two tasks. Rounds alternate between the depths, so that a busy machine slows all of them alike; seconds are those of
the processor, and ratios are taken within a round.

    python benchmarks/analysis_time.py
    python benchmarks/analysis_time.py --layers 12 48 --rounds 5
    python benchmarks/analysis_time.py --inspect 7b

A bare export is `torch.export.export(...)` and `run_decompositions({})` of each task, with the same symbolic dimensions.
Analysis is what `tg.analyze` finds: visual flow, blocks, demand. The plan is that of `shared`. Accounts are what facts
work out when they are first asked for: pathway profiles and costs.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tokgraph as tg

JANUS = Path(__file__).resolve().parent.parent / "examples" / "janus.py"
SHALLOW, DEEP = 24, 96


@dataclass(frozen=True)
class Seconds:
    """Seconds of the processor that each stage took."""

    export: float
    capture: float
    analysis: float
    plan: float
    rewrite: float
    accounts: float

    @property
    def after_capture(self) -> float:
        """From the captured program to the rewritten one."""
        return self.analysis + self.plan + self.rewrite


class Forward(torch.nn.Module):
    """A task's forward as a module."""

    def __init__(self, model: torch.nn.Module, task: tg.Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, inputs: dict[str, Any]) -> Any:
        """What the task's forward returns."""
        return self.task.forward(self.model, **inputs)


def bare_export(spec: tg.ModelSpec) -> None:
    """What one would write without tokgraph."""
    device = next(spec.model.parameters()).device
    for task in spec.tasks.values():
        inputs = {key: x.to(device) for key, x in task.inputs.items()}
        names = dict.fromkeys(name for axes in (task.dynamic or {}).values() for name in axes.values())
        dims = {name: torch.export.Dim(f"dim_{i}") for i, name in enumerate(names)}
        shapes = {key: {axis: dims[name] for axis, name in axes.items()} for key, axes in (task.dynamic or {}).items()}
        exported = torch.export.export(Forward(spec.model, task), (inputs,), dynamic_shapes=(shapes,), strict=False)
        exported.run_decompositions({})


def seconds(layers: int) -> Seconds:
    """Every stage on a fresh model."""
    spec = tg.load(JANUS, layers=layers)
    took: list[float] = []

    def timed(call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        took.append(time.process_time() - start)
        return result

    timed(lambda: bare_export(spec))
    program = timed(lambda: tg.capture(spec))
    facts = timed(lambda: tg.analyze(program))
    plan = timed(lambda: tg.make_plan(facts, "shared"))
    timed(lambda: tg.apply(facts, plan))
    timed(lambda: [(task.profile, task.cost, task.exact_cost) for task in facts.values()])
    return Seconds(*took)


def inspected(size: str) -> tuple[float, float]:
    """``tokgraph inspect`` of one size, in a process of its own: seconds on the clock, and of the processor."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "from tokgraph.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", str(JANUS), "--set", f"size={size}", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, busy


def spread(values: list[float], unit: str) -> str:
    """``median (least - most)``."""
    return f"{median(values):.2f}{unit} ({min(values):.2f} - {max(values):.2f})"


def table(times: dict[int, list[Seconds]]) -> str:
    """A Markdown table: a row a depth."""
    stages = [stage.name for stage in fields(Seconds)]
    lines = [f"| blocks | {' | '.join(stages)} |", "|" + " --- |" * (len(stages) + 1)]
    for layers, rounds in times.items():
        cells = [spread([getattr(took, stage) for took in rounds], " s") for stage in stages]
        lines.append(f"| {layers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(times: dict[int, list[Seconds]]) -> str:
    """The ratios that matter: a row a depth."""
    lines = [
        "| blocks | capture / export | analysis + plan + rewrite / capture | accounts / capture |",
        "|" + " --- |" * 4,
    ]
    for layers, rounds in times.items():
        parts = (
            [took.capture / took.export for took in rounds],
            [took.after_capture / took.capture for took in rounds],
            [took.accounts / took.capture for took in rounds],
        )
        lines.append(f"| {layers} | {' | '.join(spread(part, 'x') for part in parts)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=[SHALLOW, DEEP], metavar=("SHALLOW", "DEEP"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inspect", metavar="SIZE", help="Instead: the time of `tokgraph inspect` of this size.")
    options = parser.parse_args()
    if options.inspect:
        clock, busy = inspected(options.inspect)
        print(f"tokgraph inspect, Janus {options.inspect}: {clock:.1f} s, {busy:.1f} s of the processor")
        return
    torch.set_num_threads(options.threads)
    shallow, deep = options.layers
    seconds(3)  # imports, and what is set up once
    times: dict[int, list[Seconds]] = {shallow: [], deep: []}
    for _ in range(options.rounds):
        for layers, of_depth in times.items():
            of_depth.append(seconds(layers))
    print(f"examples/janus.py, both tasks, {options.rounds} rounds, {options.threads} thread(s), CPU\n")
    print(table(times), ratios(times), sep="\n\n")
    growth = [d.after_capture / s.after_capture for s, d in zip(times[shallow], times[deep], strict=True)]
    print(
        f"\nanalysis, plan and rewrite, {deep} blocks / {shallow} blocks: {spread(growth, 'x')}; the depths: "
        f"{deep / shallow:.2f}x"
    )


if __name__ == "__main__":
    main()

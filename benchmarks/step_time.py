"""Measured time of a joint training step: the model's own forward, `none`, `exact` and `shared`, on the CPU.

A step is the forward and backward of both tasks. Runs of the variants are interleaved, so that a busy machine slows all
of them alike; the table gives median, minimum and maximum, and the median over rounds of the ratio to `eager` in the
same round, with the range of that ratio.

    python benchmarks/step_time.py
    python benchmarks/step_time.py examples/digits.py --rounds 30 --set batch=64

FLOPs are not time: gathers, small matrices and memory traffic have a price. Compare the last two columns.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tokgraph as tg
from tokgraph.ir.spec import split_outputs
from tokgraph.passes.cost.flops import count_flops

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], None]


def joint_step(spec: tg.ModelSpec, forward: Callable[[str], Any]) -> Step:
    """Forward and backward of every task; ``forward`` maps a task's name to what its forward returns."""

    def step() -> None:
        spec.model.zero_grad(set_to_none=True)
        sum(split_outputs(forward(name))[0] for name in spec.tasks).backward()  # type: ignore[union-attr]

    return step


def variants(spec: tg.ModelSpec, keep: float) -> tuple[dict[str, Step], dict[str, float]]:
    """Steps by name, and each one's FLOPs relative to the model's own."""
    program = tg.capture(spec)
    facts = tg.analyze(program)
    whole = sum(count_flops(graph).total for graph in program.values())
    steps = {"eager": joint_step(spec, lambda name: spec.tasks[name].forward(spec.model, **spec.tasks[name].inputs))}
    flops = {"eager": 1.0}
    for policy, options in (("none", {}), ("exact", {}), ("shared", {"keep": keep})):
        thin = tg.apply(program, tg.make_plan(program, policy, facts=facts, **options), facts=facts)
        steps[policy] = joint_step(spec, lambda name, thin=thin: thin[name](**spec.tasks[name].inputs))
        flops[policy] = sum(count_flops(graph).total for graph in thin.program.values()) / whole
    return steps, flops


def interleaved(steps: dict[str, Step], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each step in each round, after some that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm_up + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]], flops: dict[str, float]) -> str:
    """A Markdown table."""
    lines = [
        "| step | median ms | min - max ms | time ratio (range) | FLOPs ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, times in seconds.items():
        ratios = [mine / eager for mine, eager in zip(times, seconds["eager"], strict=True)]
        lines.append(
            f"| {name} | {median(times) * 1e3:.1f} | {min(times) * 1e3:.1f} - {max(times) * 1e3:.1f} "
            f"| {median(ratios):.2f}x ({min(ratios):.2f} - {max(ratios):.2f}) | {flops[name]:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "janus.py"), help="a model file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="arguments of build()")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--keep", type=float, default=0.5, help="keep ratio of `shared`")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = dict(item.split("=", 1) for item in options.set)
    spec = tg.load(options.model, **{name: _literal(text) for name, text in settings.items()})
    steps, flops = variants(spec, options.keep)
    print(f"{Path(options.model).name} {settings or ''}: {options.rounds} rounds, {options.threads} thread(s), CPU\n")
    print(table(interleaved(steps, options.rounds), flops))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()

"""Microseconds of the checks at each call of a task, by number of blocks.

A call compares the model with what was captured (parameters, modules, modes, attributes, types, hooks), the region of
autocast, and the batch (types, sizes, guards). At 24 blocks that may take 20 microseconds at most. The least of several
repeats is given: what is above it is another process's.

    python benchmarks/call_check.py
    python benchmarks/call_check.py --blocks 24 --repeats 15
"""

from __future__ import annotations

import argparse
import sys
import timeit
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tokgraph as tg
from examples import janus

CALLS = 2000


def microseconds(function: object, repeats: int) -> float:
    """The least time of one call."""
    return min(timeit.repeat(function, number=CALLS, repeat=repeats)) / CALLS * 1e6  # type: ignore[arg-type]


def row(blocks: int, repeats: int) -> str:
    """One line of the table: the generation task of Janus with this many blocks."""
    spec = janus.build(layers=blocks)
    program = tg.capture(tg.ModelSpec(spec.model, {"generation": spec.tasks["generation"]}))
    task = tg.apply(program, tg.make_plan(program, "exact"))["generation"]
    variants, leaves = task.variants, task.task_graph.flatten(spec.tasks["generation"].inputs)
    model = microseconds(lambda: variants.current(leaves), repeats)
    batch = microseconds(lambda: variants.first.refuse(leaves), repeats)
    parameters = len(task.task_graph.named_parameters())
    return f"| {blocks} | {parameters} | {model:.1f} | {batch:.1f} | {model + batch:.1f} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| blocks | parameters | model, us | batch, us | both, us |\n| --- | --- | --- | --- | --- |")
    for blocks in args.blocks:
        print(row(blocks, args.repeats))


if __name__ == "__main__":
    main()

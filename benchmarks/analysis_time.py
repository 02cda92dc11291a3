"""Measured time of analysis beside that of capture, on shallow and deep models of the same tiny width.

Both should grow with the number of blocks and no faster, and analysis should never be what one waits for. The models are
`examples/janus.py` with its two tasks. Rounds alternate between the depths, so that a busy machine slows all of them
alike; ratios are taken within a round.

    python benchmarks/analysis_time.py
    python benchmarks/analysis_time.py --layers 12 48 --rounds 5

Analysis is what `tg.analyze` finds: visual flow, blocks, demand. Accounts are what facts work out when they are first
asked for: pathway profiles and costs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

import tokgraph as tg

JANUS = Path(__file__).resolve().parent.parent / "examples" / "janus.py"
SHALLOW, DEEP = 24, 96


def seconds(layers: int) -> tuple[float, float, float]:
    """Capture and analyse a fresh model, and ask for its accounts: seconds of each."""
    spec = tg.load(JANUS, layers=layers)
    start = time.perf_counter()
    program = tg.capture(spec)
    captured = time.perf_counter()
    facts = tg.analyze(program)
    analysed = time.perf_counter()
    for task in facts.values():
        _ = task.profile, task.cost, task.exact_cost
    return captured - start, analysed - captured, time.perf_counter() - analysed


def spread(values: list[float], unit: str) -> str:
    """``median (least - most)``."""
    return f"{median(values):.2f}{unit} ({min(values):.2f} - {max(values):.2f})"


def table(times: dict[int, list[tuple[float, float, float]]]) -> str:
    """A Markdown table: a row a depth."""
    lines = [
        "| blocks | capture (range) | analysis (range) | accounts (range) | both / capture (range) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for layers, rounds in times.items():
        seconds = [spread(list(part), " s") for part in zip(*rounds, strict=True)]
        ratio = spread([(analysis + accounts) / capture for capture, analysis, accounts in rounds], "x")
        lines.append(f"| {layers} | {' | '.join(seconds)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=[SHALLOW, DEEP], metavar=("SHALLOW", "DEEP"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shallow, deep = options.layers
    seconds(1)  # imports, and what is set up once
    times: dict[int, list[tuple[float, float, float]]] = {shallow: [], deep: []}
    for _ in range(options.rounds):
        for layers, of_depth in times.items():
            of_depth.append(seconds(layers))
    print(f"examples/janus.py, both tasks, {options.rounds} rounds, {options.threads} thread(s), CPU\n")
    print(table(times))
    growth = [sum(d[1:]) / sum(s[1:]) for s, d in zip(times[shallow], times[deep], strict=True)]
    print(
        f"\nanalysis and accounts, {deep} blocks / {shallow} blocks: {spread(growth, 'x')}; the depths: {deep / shallow:.2f}x"
    )


if __name__ == "__main__":
    main()

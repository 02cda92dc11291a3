"""Seconds that `import tokgraph` adds to `import torch`, each in a process of its own.

A model file imports tokgraph before anything is done with it, so what captures and rewrites must not be paid for there.
At most 0.3 s may be added. Rounds alternate between both imports, so that a busy machine slows both alike; the
difference is taken within a round.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --rounds 15
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median

STATEMENTS = ("import torch", "import torch, tokgraph")
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Seconds of a statement in a new process."""
    found = subprocess.run([sys.executable, "-c", TIMED.format(statement)], check=True, capture_output=True, text=True)
    return float(found.stdout)


def table(rounds: list[tuple[float, ...]]) -> str:
    """A Markdown table: a row a statement, and their difference."""
    columns = dict(zip(STATEMENTS, zip(*rounds, strict=True), strict=True))
    columns["difference"] = tuple(both - torch for torch, both in rounds)
    lines = ["| import | median | least - most |", "| --- | --- | --- |"]
    lines += [f"| {name} | {median(x):.3f} s | {min(x):.3f} - {max(x):.3f} s |" for name, x in columns.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for statement in STATEMENTS:  # files are read, and compiled, once
        seconds(statement)
    print(table([tuple(map(seconds, STATEMENTS)) for _ in range(args.rounds)]))


if __name__ == "__main__":
    main()

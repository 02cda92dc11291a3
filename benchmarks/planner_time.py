"""Measured time of the planner, and how near it comes: ten targets on Janus-Pro-1B.

The model is `examples/janus.py` at its published size on the meta device, with both tasks. Capture and analysis come once
and are timed apart; FLOPs are what the planner predicts and what the rewritten graphs cost, counted node by node.

    python benchmarks/planner_time.py
    python benchmarks/planner_time.py --size tiny --no-exact
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import tokgraph as tg
from tokgraph.planning.search import search
from tokgraph.report.report import make_report

JANUS = Path(__file__).resolve().parent.parent / "examples" / "janus.py"
TARGETS = [0.45 + 0.5 * i / 9 for i in range(10)]


def rewritten(program: tg.Program, facts: tg.Facts, plan: tg.Plan) -> tuple[float, float]:
    """FLOPs ratio and sharing index of the rewritten graphs."""
    report = make_report(tg.apply(facts, plan))
    return report["flops_ratio"], report["sharing_index"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="1b")
    parser.add_argument("--no-exact", action="store_true", help="Plans that leave work that no output reads.")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    program = tg.capture(tg.load(JANUS, size=options.size))
    facts = tg.analyze(program)
    print(f"Janus {options.size}: captured and analysed in {time.perf_counter() - start:.1f} s\n")
    exact, total = not options.no_exact, 0.0
    print("| target | plan | rewritten | off by | sharing index | planned in |")
    print("| --- | --- | --- | --- | --- | --- |")
    for target in TARGETS:
        start = time.perf_counter()
        try:
            found = search(facts, target, exact=exact).best
        except tg.PlanError as error:
            total += time.perf_counter() - start
            print(f"| {target:.3f} | {error.message} | | | | |")
            continue
        took = time.perf_counter() - start
        total += took
        ratio, index = rewritten(program, facts, tg.Plan(found.sites(facts), exact=exact))
        print(f"| {target:.3f} | {found} | {ratio:.4f} | {ratio / target - 1:+.2%} | {index:.3f} | {took:.2f} s |")
    print(f"\nten targets planned in {total:.2f} s, {options.threads} thread(s), CPU")


if __name__ == "__main__":
    main()

"""Random decoders, plans and batches: every accepted rewrite against the oracle and against a loop by hand, in float64.

    python benchmarks/fuzz.py --cases 200 --seed 0
    python benchmarks/fuzz.py --cases 2000 --jobs 2 --json docs/fuzz.json    # goes on where an earlier run ended
    python benchmarks/fuzz.py --page docs/fuzz.md --json docs/fuzz.json      # write these figures into the page
    python benchmarks/fuzz.py --replay 17                                   # one case, told in full

A failure is shrunk and written to fuzz_failure_SEED.py, which needs torch and tokgraph only. Exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fuzz.case import draw
from tests.fuzz.figures import Figures, Outcome, outcome, this_run
from tests.fuzz.run import verdicts
from tests.fuzz.shrink import alone, shrunk
from tests.fuzz.source import source
from tokgraph.files import write_atomically

EVERY = 25
"""Cases after which figures are written."""


def outcomes(seeds: Iterable[int], jobs: int) -> Iterator[Outcome]:
    """Judge cases, in order."""
    if jobs == 1:
        yield from map(outcome, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, quiet, maxtasksperchild=100) as pool:
        yield from pool.imap(outcome, seeds)


def quiet() -> None:
    """No warnings of what is drawn at random: that a size is fixed by the model, for one."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def shrink(seed: int, folder: Path) -> None:
    """Write the smallest case that fails as that of a seed does."""
    case, verdict = shrunk(draw(seed))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"fuzz_failure_{seed}.py"
    path.write_text(alone(case, verdict))
    print(f"{path}: {verdict.kind} {verdict.reason}\n{verdict.detail[-1000:]}", flush=True)


def replay(seed: int) -> None:
    """Show a case and its verdicts."""
    case = draw(seed)
    print(source(case), case.to_json(), *verdicts(case), sep="\n")


def main() -> int:
    """Run cases, print and write figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100, help="how many seeds (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after this time")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--json", type=Path, help="add figures up in this file; seeds that it has are left out")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for failures (default: this one)")
    parser.add_argument("--no-shrink", action="store_true", help="count failures only")
    parser.add_argument("--replay", type=int, help="show the case of this seed, and nothing else")
    parser.add_argument(
        "--page", type=Path, help="write the figures of --json between the marks of this file, and run nothing"
    )
    options = parser.parse_args()
    quiet()
    if options.replay is not None:
        replay(options.replay)
        return 0
    figures = Figures.load(options.json) if options.json else Figures()
    if options.page:
        write_atomically(options.page, figures.shown_in(options.page.read_text(encoding="utf-8")))
        return 0
    started, run = time.monotonic(), {**this_run(), "cases": 0, "seconds": 0.0}
    figures.runs.append(run)
    seeds = list(figures.missing(options.seed, options.cases))
    timely = (seed for seed in seeds if time.monotonic() - started < options.seconds)
    for seed, judged in outcomes(timely, options.jobs):
        figures.add((seed, judged))
        run["cases"], run["seconds"] = run["cases"] + 1, round(time.monotonic() - started, 1)
        if str(seed) in figures.found and not options.no_shrink:
            shrink(seed, options.out)
        if options.json and (run["cases"] % EVERY == 0 or str(seed) in figures.found):
            figures.save(options.json)
    if options.json:
        figures.save(options.json)
    print(figures.table())
    return 1 if figures.found else 0


if __name__ == "__main__":
    sys.exit(main())

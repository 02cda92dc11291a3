"""How long the first step of a compiled task takes, whole and block by block, and the steps after it.

Each row runs in a process of its own with an empty cache of compiled kernels, on this machine's CPU.

    python benchmarks/compile_time.py --layers 6 24 --hidden 256
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measured(layers: int, by: str, options: argparse.Namespace) -> dict[str, Any]:
    """One task, compiled in this process: seconds of the first step, and the median of later ones."""
    import tokgraph as tg
    from examples import digits

    spec = digits.build(layers=layers, hidden=options.hidden, heads=4, batch=options.batch)
    task = spec.tasks["generation"]
    task = tg.Task(task.forward, task.inputs, visual=task.visual, reads=task.reads)  # sizes are numbers
    accelerated = tg.optimize(tg.ModelSpec(spec.model, {"generation": task}), options.policy, verify=False)
    module = accelerated["generation"]

    def step() -> float:
        start = time.perf_counter()
        module(**task.inputs)["loss"].backward()
        return time.perf_counter() - start

    step()
    plain = median(step() for _ in range(options.rounds))
    module.compile(by=by)
    first = step()
    how = module.compilation
    assert how is not None
    later = median(step() for _ in range(options.rounds))
    functions = module.variants.first.compiled(how).functions
    return {"layers": layers, "by": by, "first": first, "functions": functions, "step": later, "eager": plain}


def main() -> None:
    """Print a table, one row a depth and unit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--policy", default="shared")
    parser.add_argument("--by", nargs="+", default=["block", "graph"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(int(options.one[0]), options.one[1], options)))
        return
    print("| blocks | compiled by | first step, s | functions | step, ms | operator by operator, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for by in options.by:
        for layers in options.layers:
            with tempfile.TemporaryDirectory() as cache:
                arguments = [sys.executable, __file__, *sys.argv[1:], "--one", str(layers), by]
                done = subprocess.run(
                    arguments, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, stdout=subprocess.PIPE, check=True
                )
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {layers} | {by} | {row['first']:.1f} | {row['functions']} | {1e3 * row['step']:.1f} "
                f"| {1e3 * row['eager']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

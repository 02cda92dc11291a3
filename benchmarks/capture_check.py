"""What it costs capture to hold its graph against the model's own forward, as a share of capture.

Processor time of this process. The collector rests while a graph is traced; what tracing leaves is collected before the
check begins, and counts as tracing.

    python benchmarks/capture_check.py
    python benchmarks/capture_check.py --layers 24 --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tokgraph as tg
from tokgraph.passes.capture import export

MODEL = Path(__file__).resolve().parent.parent / "examples" / "janus.py"


def measure(layers: int) -> tuple[float, float]:
    """Seconds of a capture of both tasks, and of it those that the check takes."""
    held, spent = export.held_against_eager, {"all": 0.0, "tracing": 0.0}

    def timed(key: str, call: Callable[..., Any], *args: Any) -> Any:
        start = time.process_time()
        try:
            return call(*args)
        finally:
            if key == "tracing":
                gc.collect()
            spent[key] += time.process_time() - start

    def counted(model: Any, name: str, task: tg.Task, capture: Callable[..., Any], *rest: Any) -> Any:
        return timed("all", held, model, name, task, lambda reads: timed("tracing", capture, reads), *rest)

    export.held_against_eager = counted
    try:
        tg.capture(tg.load(str(MODEL), size="tiny", layers=layers))
    finally:
        export.held_against_eager = held
    return spent["all"], spent["all"] - spent["tracing"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 24])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| blocks | capture, s | check, % of it (each round) |\n| --- | --- | --- |")
    for layers in options.layers:
        found = [measure(layers) for _ in range(options.rounds)]
        shares = ", ".join(f"{100 * check / whole:.1f}" for whole, check in found)
        print(f"| {layers} | {min(whole for whole, _ in found):.1f} | {shares} |")


if __name__ == "__main__":
    main()

"""Profile exported training steps of a unified model of some size, and check what the profile claims.

    python benchmarks/onnx_profile.py                   # a minute or two, two threads
    python benchmarks/onnx_profile.py --hidden 512 --runs 20

Prints, for both tasks: what share of a run's wall time the profiled nodes add up to, what share of kernel time is mapped
to a place in the model, and the time of every block, baseline and with dropped tokens, measured in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import tokgraph as tg
from tokgraph.profile import profile_exported
from tokgraph.store.batches import read_batches


def main() -> None:
    """Export, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    example = Path(__file__).resolve().parent.parent / "examples" / "digits.py"
    spec = tg.load(example, layers=options.layers, hidden=options.hidden, heads=8, batch=options.batch)
    accelerated = tg.optimize(spec, "shared", keep=options.keep, verify=False)
    with tempfile.TemporaryDirectory() as folder:
        accelerated.export_onnx(folder, "train-step", with_baseline=True)
        batches = read_batches(Path(folder) / "example.safetensors")
        found, _ = profile_exported(
            Path(folder), lambda file: batches[file.task][0], runs=options.runs, threads=options.threads
        )
    print(
        f"examples/digits.py, {options.layers} blocks, hidden {options.hidden}, batch {options.batch}, shared with keep "
        f"{options.keep}: one training step in ONNX Runtime, CPU, {options.threads} thread(s), {options.runs} runs\n"
    )
    print("| graph | one run | nodes / (wall - unmapped) | mapped | blocks, ms |")
    print("| --- | --- | --- | --- | --- |")
    for graph in found["graphs"]:
        print(_row(graph))
    print()
    for ratio in found["ratios"]:
        print(
            f"{ratio['task']}: {ratio['median']:.2f}x of the baseline ({ratio['min']:.2f} to {ratio['max']:.2f}, by turn)"
        )


def _row(graph: dict[str, Any]) -> str:
    profile = graph["profile"]
    unmapped = sum(profile["unmapped"].values())
    share = profile["mapped"]["median"] / (profile["wall"]["median"] - unmapped)
    mapped = profile["mapped"]["median"] / profile["kernels"]["median"]
    blocks = [x for name, x in profile["by_block"].items() if name.startswith("block ")]
    times = ", ".join(f"{block['median'] * 1e3:.1f}" for block in blocks)
    seconds = graph["seconds"]
    spread = f"{seconds['median'] * 1e3:.0f} ms ({seconds['min'] * 1e3:.0f} to {seconds['max'] * 1e3:.0f})"
    return f"| {graph['variant']} {graph['task']} | {spread} | {share:.3f} | {mapped:.2%} | {times} |"


if __name__ == "__main__":
    main()

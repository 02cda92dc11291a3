"""FLOPs that the `exact` policy saves at the published dimensions of Janus-Pro: 576 image and 64 text tokens.

The models live on the meta device: graphs are captured, rewritten and counted without weights, in minutes on two CPU
cores and less than 1 GB. One training step is counted, forward and backward, vision tower included.

    python benchmarks/exact_flops.py
    python benchmarks/exact_flops.py --size small --policy shared

The table's ratios are after / before, by task and for both tasks together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tokgraph as tg
from tokgraph.passes.cost.flops import Flops, count_flops

JANUS = Path(__file__).resolve().parent.parent / "examples" / "janus.py"


def measure(size: str, batch: int, policy: str) -> dict[str, tuple[Flops, Flops]]:
    """FLOPs of one training step before and after a policy: task -> (before, after)."""
    program = tg.capture(tg.load(JANUS, size=size, batch=batch))
    facts = tg.analyze(program)
    accelerated = tg.apply(program, tg.make_plan(program, policy, facts=facts), facts=facts)
    return {task: (count_flops(program[task]), count_flops(accelerated.program[task])) for task in program}


def rows(size: str, flops: dict[str, tuple[Flops, Flops]]) -> list[str]:
    """Markdown table rows of one size."""
    before = Flops(sum(b.forward for b, _ in flops.values()), sum(b.backward for b, _ in flops.values()))
    after = Flops(sum(a.forward for _, a in flops.values()), sum(a.backward for _, a in flops.values()))
    return [
        f"| {size} | {task} | {a.forward / b.forward:.3f}x | {a.backward / b.backward:.3f}x "
        f"| {a.total / b.total:.3f}x | {b.total / 1e12:.4g} -> {a.total / 1e12:.4g} |"
        for task, (b, a) in {**flops, "both": (before, after)}.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", action="append", help="sizes of examples/janus.py (default: 1b and 7b)")
    parser.add_argument(
        "--batch", type=int, default=2, help="rows of the batch (default: 2; export fixes a batch of 1)"
    )
    parser.add_argument("--policy", default="exact", help="policy, with its default options (default: exact)")
    options = parser.parse_args()
    print("| size | task | forward | backward | total | TFLOPs a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in options.size or ["1b", "7b"]:
        print("\n".join(rows(size, measure(size, options.batch, options.policy))), flush=True)


if __name__ == "__main__":
    main()

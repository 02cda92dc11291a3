"""What training Janus-Pro takes on a cluster, with a plan and without: the tables of docs/cluster.md; and one process, checked.

The table is of the published dimensions, on the meta device: no weights, no GPU, minutes on two CPU cores. Nothing of it is
measured. `--check` compares what is said of one GPU with this machine: memory that a step of a small Janus allocates, and its
time beside the roofline at the rates of this CPU, by blocks that are kept and blocks that are computed again.

    python benchmarks/cluster_table.py
    python benchmarks/cluster_table.py --batch 4 --policy exact --cluster gpus=8,memory=40GB,flops=312TFLOPS,bandwidth=1.55TB/s
    python benchmarks/cluster_table.py --check
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from train_step import TASKS, Clock

import tokgraph as tg

JANUS = Path(__file__).resolve().parent.parent / "examples" / "janus.py"
CLUSTER = "gpus=64,memory=80GB,flops=989TFLOPS,bandwidth=3.35TB/s,tokens=1T"
"""H100 SXM: the dense rate of bf16 and the bandwidth of its data sheet."""


def table(found: dict[str, Any]) -> str:
    """A Markdown table: a row a layout, without the plan and with it."""
    lines = [
        "| layout | blocks | GB a GPU | fits | ms a step | nothing hidden | tokens/s | MFU | days | GPU hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["layouts"]:
        pair = (row["before"], row["after"])
        shape = " x ".join(f"{n} {what}" for what, n in pair[1]["shape"].items() if n > 1)
        cells = [
            " -> ".join(f"{x['memory']['total'] / 1e9:.1f}" for x in pair),
            " -> ".join("yes" if x["fits"] else "no" for x in pair),
            " -> ".join(f"{x['seconds']['step'] * 1e3:.0f}" for x in pair),
            " -> ".join(f"{x['seconds']['serial'] * 1e3:.0f}" for x in pair),
            " -> ".join(f"{x['tokens_per_second'] / 1e6:.2f} M" for x in pair),
            " -> ".join(f"{x['mfu']:.2f}" for x in pair),
            " -> ".join(f"{x['days']:.1f}" for x in pair),
            " -> ".join(f"{x['gpu_hours']:,.0f}" for x in pair),
        ]
        blocks = "again" if row["checkpoint"] else "kept"
        lines.append(f"| {row['layout']} ({shape}) | {blocks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parts(found: dict[str, Any]) -> str:
    """A Markdown table: bytes of the parts of each task; the blocks between the first and the last as one of them."""
    lines = ["| task | part | parameters | kept | again | ms |", "| --- | --- | --- | --- | --- | --- |"]
    for name, task in found["tasks"].items():
        both = list(zip(task["before"]["parts"], task["after"]["parts"], strict=True))
        for a, b in (both[0], both[1], both[len(both) // 2], both[-2], both[-1]):
            kept, again = (f"{a[k] / 1e9:.3f} -> {b[k] / 1e9:.3f}" for k in ("kept", "kept_again"))
            least = " -> ".join(f"{(x['forward'] + x['backward']) * 1e3:.1f}" for x in (a, b))
            lines.append(f"| {name} | {a['title']} | {b['parameter_bytes'] / 1e9:.3f} | {kept} | {again} | {least} |")
    return "\n".join(lines)


def check(policy: str, rounds: int) -> str:
    """Memory and time of one process on this machine beside what is said of one GPU.

    Steps of a task run in turn, and the machine's rates are measured in each round: the fastest are taken, of both.
    """
    small = {"size": "small", "batch": 2, "image_pixels": 192, "text_tokens": 64, "padded": False}
    spec = tg.load(JANUS, **small)
    lines = [
        "| task | plan | blocks | MB in a step | measured | ms at least | ratio | measured ms | ratio |",
        "| --- " * 9 + "|",
    ]
    clock = Clock(spec.model, torch.device("cpu"))
    for task in TASKS:
        batch = spec.tasks[task].inputs
        facts = tg.analyze(tg.capture(tg.ModelSpec(spec.model, {task: spec.tasks[task]})))
        plans = {name: tg.apply(facts, tg.make_plan(facts, name)) for name in ("none", policy)}
        steps = {
            (name, again): partial(_loss, accelerated.module(checkpoint=again), task, batch)
            for name, accelerated in plans.items()
            for again in (False, True)
        }
        peaks = {key: (clock.run(step), clock.peak(step))[1] for key, step in steps.items()}
        rates, taken = [], []
        for _ in range(rounds):
            rates.append(tg.measure_rates("cpu"))
            taken.append({key: clock.run(step) for key, step in steps.items()})
        flops, copied = max(r.flops(torch.float32) for r in rates), max(r.copy for r in rates)
        alone = tg.Cluster(gpus=1, memory=1e12, flops=flops, bandwidth=copied)
        told = {
            (n, row["checkpoint"]): row["after"] for n, x in plans.items() for row in tg.estimate(x, alone)["layouts"]
        }
        whole, inputs = ("none", False), sum(x.nbytes for x in batch.values())
        for (name, again), found in told.items():
            memory, seconds = found["memory"], [each[name, again] for each in taken]
            step = memory["total"] - memory["parameters"] - memory["optimizer"] - inputs
            least, of_whole = found["seconds"]["compute"], told[whole]["seconds"]["compute"]
            ratio = median(each[name, again] / each[whole] for each in taken)
            lines.append(
                f"| {task} | {name} | {'again' if again else 'kept'} | {step / 1e6:.1f} | {peaks[name, again] / 1e6:.1f} "
                f"| {least * 1e3:.0f} | {least / of_whole:.2f} | {min(seconds) * 1e3:.0f} | {ratio:.2f} |"
            )
    return "\n".join(lines)


def _loss(module: tg.Blockwise, task: str, batch: dict[str, Any]) -> torch.Tensor:
    loss: torch.Tensor = module(task=task, **batch)[0]
    return loss


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="7b")
    parser.add_argument("--batch", type=int, default=16, help="samples of a micro-batch of a GPU")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policy", default="shared")
    parser.add_argument("--cluster", default=CLUSTER)
    parser.add_argument("--check", action="store_true", help="compare with a process on this machine instead")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.check:
        print(f"CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
        print(check(options.policy, options.rounds))
        return
    spec = tg.load(JANUS, size=options.size, dtype=options.dtype, batch=options.batch, padded=False)
    facts = tg.analyze(tg.capture(spec))
    found = tg.estimate(tg.apply(facts, tg.make_plan(facts, options.policy)), tg.Cluster.parse(options.cluster))
    print(f"{table(found)}\n\n{parts(found)}")


if __name__ == "__main__":
    main()

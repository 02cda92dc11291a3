"""A training step, measured: eager, a loop written by hand, and accelerated graphs, on a CPU or a GPU.

A step is the forward and backward of one task of Janus. All variants run in turn, round by round, so that a busy machine
slows all of them alike; ratios are to `eager` of the same round (itself compiled, with `--compile only`). The loop by hand
(`hand_loop.py`) drops the same tokens in the same blocks as the plan beside it.

    python benchmarks/train_step.py --quick
    python benchmarks/train_step.py --size small --layers 12 --batch 2 --rounds 7 --compile also
    python benchmarks/train_step.py --size 1b --device cuda --dtype bfloat16 --batch 16 \\
        --policies exact,shared,fastv,himix-hmgen-share-partial,random-ltd
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import hand_loop
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tokgraph as tg
from tokgraph.passes.cost.attribution import task_cost
from tokgraph.passes.cost.moves import row_moves
from tokgraph.passes.cost.peak import peak_memory

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], Tensor]
TASKS = ("understanding", "generation")


@dataclass
class Variant:
    """One way to run a step of one task.

    Args:
        task: the task.
        name: what the table calls it.
        step: runs the forward; returns the loss.
        flops: promised, relative to the whole graph.
        moved: megabytes that operators that move rows read and write.
        seconds: of each round.
        peak: bytes in use at most during a step, beyond those before it.
        predicted: the same, from the graph alone.
    """

    task: str
    name: str
    step: Step = field(repr=False)
    flops: float | None = None
    moved: float | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    predicted: int | None = None


def plans(options: argparse.Namespace, facts: tg.Facts) -> dict[str, tg.Plan]:
    """The policies, by the name in the table."""
    blocks = len(facts["understanding"].blocks)
    span = (options.start, max(blocks - 2, options.start + 1) if options.stop is None else options.stop)
    sites = [tg.DropSite(task, *span, options.keep, "uniform") for task in TASKS]
    made = {"none": tg.make_plan(facts, "none"), "span": tg.Plan(tuple(sites))}
    for policy in options.policies:
        made[policy] = tg.make_plan(facts, policy)
    return made


def loops(options: argparse.Namespace, blocks: int, count: int) -> dict[str, list[hand_loop.Span]]:
    """Loops by hand: nothing left out, and the span of the plan `span`; random-LTD where it is among the policies."""
    stop = blocks - 2 if options.stop is None else options.stop
    by_task: dict[str, list[hand_loop.Span]] = {}
    for task in TASKS:
        same = task == "generation"
        keep = hand_loop.uniform(options.keep, count, same)
        by_task[f"{task}/hand, span"] = [hand_loop.Span(options.start, stop, keep)]
        if "random-ltd" in options.policies:
            drawn = hand_loop.random(0.5, count, same=False)
            by_task[f"{task}/hand, random-ltd"] = [hand_loop.Span(i, i + 1, drawn) for i in range(1, blocks - 1)]
    return by_task


def variants(spec: tg.ModelSpec, facts: tg.Facts, options: argparse.Namespace, compiled: bool) -> list[Variant]:
    """Every variant of both tasks, as it is or compiled."""
    blocks, count = len(facts["understanding"].blocks), facts["understanding"].visual.count
    planned = plans(options, facts)
    found = []
    for task in options.tasks:
        whole = facts[task].cost.at().total().flops
        batch, forward = spec.tasks[task].inputs, spec.tasks[task].forward
        plain: dict[str, Step] = {"eager": lambda f=forward, b=batch: f(spec.model, **b)[0]}
        for name, spans in loops(options, blocks, count).items():
            if name.startswith(f"{task}/"):
                loss = hand_loop.LOSSES[task]
                plain[name.split("/")[1]] = lambda f=loss, s=spans, b=batch: f(spec.model, s, **b)
        for name, step in plain.items():
            flops = 1.0 if name == "eager" else None
            found.append(Variant(task, name, torch.compile(step, dynamic=False) if compiled else step, flops))
        for name, plan in planned.items():
            accelerated = tg.apply(facts, plan)
            if compiled:
                accelerated.compile()
            graph = accelerated.program[task]
            flops = task_cost(graph, facts[task]).at().total().flops / whole
            moved = sum(move.forward + move.backward for move in row_moves(graph)) / 2**20
            predicted = None if compiled else peak_memory(graph).bytes
            found.append(
                Variant(task, name, partial(_loss, accelerated[task], batch), flops, moved, predicted=predicted)
            )
    if compiled:
        for variant in found:
            variant.name += ", compiled"
    return found


def _loss(task: tg.TaskModule, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = task(**batch)[0]
    return loss


class Clock:
    """Times steps on a device, and reads what they allocate."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model = model
        self.cuda = device.type == "cuda"

    def run(self, step: Step) -> float:
        """Seconds of a forward and backward."""
        self.model.zero_grad(set_to_none=True)
        self.wait()
        start = time.perf_counter()
        step().backward()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self, step: Step) -> int:
        """Bytes that a step has in use at most, gradients included, beyond those before it."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if not self.cuda:
            return self._peak_of_cpu(step)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run(step)
        return torch.cuda.max_memory_allocated() - before

    def _peak_of_cpu(self, step: Step) -> int:
        with tempfile.TemporaryDirectory() as folder:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                step().backward()
            profiler.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        now = most = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            now += event["args"]["Bytes"]
            most = max(most, now)
        return most


def measure(found: list[Variant], clock: Clock, rounds: int, warm_up: int) -> None:
    """Run every variant in each round."""
    for variant in found:
        for _ in range(warm_up):
            clock.run(variant.step)
        variant.peak = clock.peak(variant.step)
    for variant in found:  # behind the profiler, and behind each other, compiled steps may be compiled once more
        clock.run(variant.step)
    for _ in range(rounds):
        for variant in found:
            variant.seconds.append(clock.run(variant.step))


def rows(found: list[Variant]) -> list[dict[str, Any]]:
    """What was measured, as plain data; ratios are to `eager` of the same task and round."""
    eager = {v.task: v.seconds for v in reversed(found) if v.name.startswith("eager")}
    table = []
    for v in found:
        ratios = [a / b for a, b in zip(v.seconds, eager[v.task], strict=True)]
        data = {key: value for key, value in asdict(v).items() if key not in ("step", "seconds")}
        ratio = median(ratios)
        spread = {"ratio": ratio, "lowest": min(ratios), "highest": max(ratios)}
        spread["realised"] = (1 - ratio) / (1 - v.flops) if v.flops is not None and v.flops < 0.999 else None
        table.append(data | {"milliseconds": median(v.seconds) * 1e3} | spread)
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| task | step | ms | time / eager (range) | FLOPs promised | realised | MB moved by rows | peak MB | predicted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        flops = "" if row["flops"] is None else f"{row['flops']:.3f}"
        moved = "" if row["moved"] is None else f"{row['moved']:.1f}"
        realised = "" if row["realised"] is None else f"{row['realised']:.0%}"
        predicted = "" if row["predicted"] is None else f"{row['predicted'] / 2**20:.0f}"
        lines.append(
            f"| {row['task']} | {row['name']} | {row['milliseconds']:.1f} "
            f"| {row['ratio']:.3f} ({row['lowest']:.3f} - {row['highest']:.3f}) | {flops} | {realised} | {moved} "
            f"| {row['peak'] / 2**20:.0f} | {predicted} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="small", choices=["tiny", "small", "1b", "7b"])
    parser.add_argument("--layers", type=int, help="decoder layers, if other than the size's")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--start", type=int, default=1, help="first block of the span")
    parser.add_argument("--stop", type=int, help="the block after the span; default: the last but one")
    parser.add_argument("--policies", default="exact,shared", type=lambda text: [p for p in text.split(",") if p])
    parser.add_argument(
        "--compile", choices=["also", "only"], help="every variant under torch.compile as well, or only so"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), type=lambda text: [t for t in text.split(",") if t])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's own")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="few layers and rounds: a minute")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds, options.warm_up = options.layers or 6, 5, 1
    return options


def main() -> None:
    """Measure and print."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    pixels = {"small": 192}.get(options.size)  # 576 image tokens, as the published sizes have
    spec = tg.load(
        str(ROOT / "examples" / "janus.py"),
        **{"size": options.size, "layers": options.layers, "batch": options.batch, "dtype": options.dtype},
        **{"device": options.device, "image_pixels": pixels, "text_tokens": 64, "padded": False},
    )
    for task in spec.tasks.values():
        task.inputs.update({name: x.to(device) for name, x in task.inputs.items()})  # type: ignore[attr-defined]
    facts = tg.analyze(tg.capture(spec))
    found = [] if options.compile == "only" else variants(spec, facts, options, compiled=False)
    if options.compile:
        found += variants(spec, facts, options, compiled=True)
    measure(found, Clock(spec.model, device), options.rounds, options.warm_up)
    table = rows(found)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"Janus {options.size}, {options.dtype}, batch {options.batch}, {name}, torch {torch.__version__}\n")
    print(markdown(table))
    if options.json:
        options.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": table}, indent=2))


if __name__ == "__main__":
    main()

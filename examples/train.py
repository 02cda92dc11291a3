"""Train both tasks of a unified model on one process or many: sharded or copied, thinned or not, resumed after a crash.

``torchrun --nproc-per-node 2 examples/train.py --quick`` trains the digits; ``--policy none`` trains the plain model by the
same script; ``--phases none:10%,shared,none:10%`` warms up without drops and ends with the full model, in one run. A step is
a number of micro-batches, each of one task, whatever the number of processes: one process and several make the same steps.
Steps are written to ``metrics.jsonl``, and for TensorBoard where that is installed; the last checkpoint that is whole is
where a run that was killed goes on, in its phase; SIGTERM saves and leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import tokgraph as tg

sys.path.append(str(Path(__file__).resolve().parent.parent))  # torchrun knows the folder of the script only
from examples import digits, janus
from tokgraph.ir.spec import split_outputs

Batch = dict[str, Tensor]
TASKS = ("understanding", "generation")
PEAKS = {
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
}
"""Part of a device's name, the first that fits -> FLOP/s of dense products in bfloat16, in float32: NVIDIA's data sheets."""


def whole(text: str) -> int:
    """Return a whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def above_zero(text: str) -> float:
    """Return a finite number above 0."""
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return number


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=["digits", "janus"], default="digits", help="real images, or a tiny Janus on random ones")
    add("--policy", default="shared", help="how visual tokens are thinned; none: the plain model (default: shared)")
    add(
        "--phases",
        help="policies one after the other: none:10%%,shared,none:10%%; shared/0.25: another share that is kept",
    )
    add("--parallel", choices=["fsdp", "ddp"], default="fsdp", help="shard the model over processes, or copy it")
    add("--steps", type=whole, default=300, help="optimizer steps")
    add("--micro-batches", type=whole, default=4, help="micro-batches of a step, of all processes together")
    add("--batch", type=whole, default=16, help="samples of a micro-batch")
    add("--ratio", type=share, default=0.5, help="share of micro-batches that are understanding")
    add(
        "--lr",
        type=above_zero,
        default=3e-3,
        help="largest learning rate: it rises for a tenth of the steps, then falls",
    )
    add("--clip", type=above_zero, default=1.0, help="largest norm of the gradients")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--recompute", action="store_true", help="compute values of blocks again in the backward pass")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="compile blocks")
    add(
        "--peak-flops",
        type=above_zero,
        help="FLOP/s that a device can do, for the share of it that is used: by its name",
    )
    add("--save-every", type=whole, default=100, help="steps between checkpoints")
    add("--out", type=Path, default=Path("run"), help="folder of metrics and checkpoints")
    add("--seed", type=int, default=0, help="seed of weights and batches")
    add("--quick", action="store_true", help="a small model, and few steps")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.steps, chosen.save_every, chosen.batch = 12, 4, 4
    return chosen


def model_of(chosen: argparse.Namespace) -> tuple[tg.ModelSpec, Callable[[str, int], Batch]]:
    """Return the model, and what makes the batch of a task from a number."""
    if chosen.model == "janus":
        dims, size = janus.SIZES["tiny"], chosen.batch
        return (
            janus.build("tiny", batch=size, seed=chosen.seed),
            lambda task, number: (
                janus.understanding_batch(dims, size, torch.float32, number, True)
                if task == "understanding"
                else janus.generation_batch(dims, size, number)
            ),
        )
    small = {"layers": 4, "hidden": 32, "heads": 2} if chosen.quick else {}
    images, names = digits.load()
    codes = digits.quantise(images)

    def batch(task: str, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(len(images), (chosen.batch,), generator=generator)
        if task == "understanding":
            return digits.understanding_batch(images[rows], names[rows])
        return digits.generation_batch(codes[rows], names[rows])

    return digits.build(batch=chosen.batch, seed=chosen.seed, **small), batch


def tasks_of(step: int, chosen: argparse.Namespace) -> list[str]:
    """Return the task of each micro-batch of a step: both occur, in an order of the step's own."""
    count = chosen.micro_batches
    understanding = min(max(round(chosen.ratio * count), 1), count - 1)
    tasks = [TASKS[0]] * understanding + [TASKS[1]] * (count - understanding)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(chosen.seed * 1_000_003 + step))
    return [tasks[i] for i in order.tolist()]


def plan_of(facts: tg.Facts, name: str) -> tg.Plan:
    """Return the plan of a policy, or of ``POLICY/KEEP``."""
    policy, _, keep = name.partition("/")
    return tg.make_plan(facts, policy, **({"keep": keep} if keep else {}))  # which says what is wrong with it


def peak_of(device: torch.device, bf16: bool) -> float | None:
    """Return the FLOP/s that a device can do by its data sheet; None where that is not known here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rates[not bf16] for part, rates in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def flops_of(program: tg.Accelerated, task: str) -> float:
    """Return the FLOPs of a micro-batch, forward and backward, of the graph that runs; what is computed again is left out."""
    cost = tg.costs(program.program, program.facts)[task]
    return float((cost if cost.sizes is None else cost.at()).total().flops)


class Training:
    """Programs of one model, an optimizer and what they have come to.

    Args:
        chosen: the command line.
        rank: of this process.
        world: how many processes there are.
        device: to compute on.
    """

    def __init__(self, chosen: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
        self.chosen, self.rank, self.world, self.device = chosen, rank, world, device
        if chosen.micro_batches % world or chosen.micro_batches < 2:
            raise SystemExit(f"--micro-batches must be a multiple of the {world} processes, and at least 2")
        spec, self.batch = model_of(chosen)
        spec.model.to(device)
        self.schedule = tg.Schedule.parse(chosen.phases or chosen.policy, chosen.steps)
        # every batch has the same sizes, and with numbers for sizes the capture takes a third of the time
        tasks = {name: replace(task, dynamic=None) for name, task in spec.tasks.items()}
        facts = tg.analyze(tg.capture(tg.ModelSpec(spec.model, tasks)))
        self.programs = {name: tg.apply(facts, plan_of(facts, name)) for name in self.schedule.plans}
        self.module = tg.Blockwise(self.programs, checkpoint=chosen.recompute)
        if chosen.compile:
            self.module.compile(backend=chosen.compile)
        with self.region():
            self.module.prepare()
        self.model: Callable[..., Any] = self.module
        if world > 1 and chosen.parallel == "ddp":
            self.model = DistributedDataParallel(self.module, find_unused_parameters=True)
        elif world > 1:
            tg.distributed.fully_shard(self.module, init_device_mesh(device.type, (world,)))
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, chosen.lr, weight_decay=0.05)
        self.peak = chosen.peak_flops or peak_of(device, chosen.bf16)
        known = self.programs if self.peak else {}
        self.flops = {(name, task): flops_of(known[name], task) for name in known for task in TASKS}
        self.step = 0
        last = tg.distributed.latest(chosen.out / "checkpoints")
        if last is not None:
            self.step = tg.distributed.load(last, self.module, self.optimizer)["step"]

    def region(self) -> Any:
        """Return the region that forwards run in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.chosen.bf16 else nullcontext()

    def rate(self) -> float:
        """Return the learning rate of this step."""
        warm = max(self.chosen.steps // 10, 1)
        left = (self.chosen.steps - self.step) / max(self.chosen.steps - warm, 1)
        return float(self.chosen.lr * min((self.step + 1) / warm, left))

    def advance(self) -> dict[str, Any]:
        """Make a step by the plan of its phase; return what is to be told of it."""
        plan = self.schedule.at(self.step)
        facts = self.programs[plan].facts
        self.module.use(plan)
        began, chosen = time.perf_counter(), self.chosen
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        tasks = tasks_of(self.step, chosen)
        mine = range(self.rank, len(tasks), self.world)
        told = torch.zeros(len(TASKS) + 2, dtype=torch.float64)  # losses by task; tokens, visual tokens of the batch
        for micro in mine:
            task, number = tasks[micro], self.step * len(tasks) + micro
            batch = {k: x.to(self.device) for k, x in self.batch(task, chosen.seed * 1_000_003 + number).items()}
            self.module.steps = {task: number}  # what is drawn at random does not depend on the number of processes
            with self.region():
                loss, _ = split_outputs(self.model(task=task, **batch))
            (loss / len(mine)).backward()
            told[TASKS.index(task)] += float(loss.detach()) / tasks.count(task)
            told[-2:] += chosen.batch * torch.tensor([facts[task].demand.tokens, facts[task].visual.count])
        torch.nn.utils.clip_grad_norm_(self.parameters, chosen.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.world > 1:
            dist.all_reduce(told)
        self.step += 1
        seconds = time.perf_counter() - began
        done = sum(self.flops.get((plan, task), 0) for task in tasks)
        used = done / (self.peak * self.world * seconds) if self.peak else None
        losses = {f"{task}_loss": float(told[i]) for i, task in enumerate(TASKS)}
        rates = {"tokens_per_second": float(told[-2]) / seconds, "visual_tokens_per_second": float(told[-1]) / seconds}
        lr = self.optimizer.param_groups[0]["lr"]
        return {"step": self.step, "plan": plan, **losses, "lr": lr, "seconds": seconds, **rates, "mfu": used}

    def save(self) -> None:
        """Write a checkpoint, and leave the one before it."""
        folder = self.chosen.out / "checkpoints"
        tg.distributed.save(folder / f"{self.step:06}", self.module, self.optimizer, step=self.step)
        if self.rank == 0:
            for old in sorted(folder.glob("[0-9]*"))[:-2]:
                shutil.rmtree(old)


class Log:
    """Tells of steps: a file of JSON lines, TensorBoard where that is installed, and a bar where a person looks on.

    Args:
        training: to tell of.
    """

    def __init__(self, training: Training) -> None:
        self.out, self.board = training.chosen.out, None
        console = Console(stderr=True)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=training.chosen.steps, completed=training.step)
        if training.peak is None:
            console.print("the device's FLOP/s are not known here, and so is mfu: --peak-flops says them", style="dim")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(self.out / "tensorboard")

    def tell(self, told: dict[str, Any]) -> None:
        """Tell of a step."""
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
        losses = "  ".join(f"{task} {told[f'{task}_loss']:.3f}" for task in TASKS)
        text = f"{told['plan']}  {losses}  {told['tokens_per_second']:,.0f} tokens/s"
        self.bar.update(self.task, completed=told["step"], description=text)
        if self.board is not None:
            for name, x in told.items():
                if isinstance(x, float):
                    self.board.add_scalar(name, x, told["step"])
            self.board.flush()


def train(training: Training) -> None:
    """Go on to the last step, or until SIGTERM."""
    log = Log(training) if training.rank == 0 else None
    with log.bar if log is not None else nullcontext():
        go_on(training, log)


def go_on(training: Training, log: Log | None) -> None:
    """Make steps, tell of them and save them."""
    chosen, asked = training.chosen, []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    while training.step < chosen.steps:
        told = training.advance()
        if log is not None:
            log.tell(told)
        leave = torch.tensor(float(bool(asked)))
        if training.world > 1:
            dist.all_reduce(leave)  # one that was asked takes the others along
        if leave or training.step % chosen.save_every == 0 or training.step == chosen.steps:
            training.save()
        if leave:
            return


def join(backend: str) -> None:
    """Join the other processes: under names of this start's own, for those of before a restart left their addresses."""
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def main() -> None:
    """Train as the command line says."""
    chosen = arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # tensors this small gain little from more
    if world > 1:
        join("cpu:gloo,cuda:nccl" if device is not None else "gloo")
    rank = dist.get_rank() if world > 1 else 0
    try:
        train(Training(chosen, rank, world, device or torch.device("cpu")))
    except tg.TokgraphError as error:
        raise SystemExit(str(error)) from None  # it says what to do, which a traceback would hide
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

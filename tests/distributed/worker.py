"""One of several processes that train an accelerated program: each cell of the table of features in turn.

``python -m tests.distributed.worker FOLDER RANK WORLD CELL...``: writes what was found of each to ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import tokgraph as tg
from tests.distributed.programs import KINDS, program, programs, trained, work
from tests.field import models

STEPS = 3


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def state(acc: tg.Accelerated) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in acc.named_parameters()}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[n] - x).abs().max() / x.abs().max().clamp(min=1e-3)) for n, x in expected.items())


def train(
    acc: tg.Accelerated,
    forward: Callable[[dict[str, Any]], dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    steps: range,
    work_of: Callable[[int], list[dict[str, Any]]],
    clip: list[nn.Parameter] | None = None,
) -> list[float]:
    """Steps of an optimizer; ``work_of`` gives the batches of all processes that this one stands for."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        batches = work_of(step)
        total = 0.0
        for each in batches:
            for task in each:
                acc[task].step = step
            loss = sum(x["loss"] for x in forward(each).values())
            (loss / len(batches)).backward()
            total += float(loss.detach()) / len(batches)
        if clip is not None:
            nn.utils.clip_grad_norm_(clip, 0.5)
        optimizer.step()
        losses.append(total)
    return losses


def flat(acc: tg.Accelerated) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda batches: {task: acc[task](**inputs) for task, inputs in batches.items()}


class Cells:
    """What is compared in this process.

    Args:
        rank: of this process.
        world: how many there are.
        folder: for files of all processes.
    """

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world, self.folder = rank, world, folder
        self.found: dict[str, Any] = {}

    def cell(self, name: str, of: Callable[[], Any]) -> None:
        began = time.perf_counter()
        self.found[name] = of()
        sys.stdout.write(f"{name}: {self.found[name]}, {time.perf_counter() - began:.1f} s\n")
        sys.stdout.flush()

    def mine(self, split: bool, tasks: list[str]) -> Callable[[int], list[dict[str, Any]]]:
        return lambda step: [work(step, self.rank, split, tasks)]

    def everyones(self, split: bool, tasks: list[str]) -> Callable[[int], list[dict[str, Any]]]:
        return lambda step: [work(step, rank, split, tasks) for rank in range(self.world)]

    def features(self, name: str, acc: tg.Accelerated, checkpoint: bool) -> tg.Blockwise:
        """A program in one process, under DDP, then FSDP2: steps of all tasks everywhere, then of one task a process.

        Returns the module, sharded.
        """
        tasks = list(acc)
        start = copy.deepcopy(acc.state_dict())
        first, second = range(STEPS), range(STEPS, 2 * STEPS)

        def reference(forward: Callable[[dict[str, Any]], Any]) -> Any:
            acc.load_state_dict(start)
            parameters = trained(acc)
            optimizer = torch.optim.AdamW(parameters, 1e-2)
            losses = train(acc, forward, optimizer, first, self.everyones(False, tasks), parameters)
            middle = state(acc)
            losses += train(acc, forward, optimizer, second, self.everyones(True, tasks), parameters)
            return losses, middle, state(acc)

        def against(expected: Any, mine: Any) -> dict[str, float]:
            losses = torch.tensor(mine[0], dtype=torch.float64)
            dist.all_reduce(losses)
            apart = (losses / self.world - torch.tensor(expected[0], dtype=torch.float64)).abs().max()
            return {
                "losses": float(apart),
                "both": furthest(mine[1], expected[1]),
                "split": furthest(mine[2], expected[2]),
            }

        expected = reference(flat(acc))
        module = acc.module(checkpoint=checkpoint)

        def one() -> dict[str, float]:
            found = reference(lambda batches: module(batches=batches))
            apart = max(abs(a - b) for a, b in zip(found[0], expected[0], strict=True))
            return {"losses": apart, "both": furthest(found[1], expected[1]), "split": furthest(found[2], expected[2])}

        def ddp() -> dict[str, float]:
            acc.load_state_dict(start)
            parameters = trained(module)
            optimizer = torch.optim.AdamW(parameters, 1e-2)
            wrapped = DDP(module)
            losses = train(acc, lambda b: wrapped(batches=b), optimizer, first, self.mine(False, tasks), parameters)
            middle = state(acc)
            wrapped = DDP(module, find_unused_parameters=True)
            losses += train(acc, lambda b: wrapped(batches=b), optimizer, second, self.mine(True, tasks), parameters)
            return against(expected, (losses, middle, state(acc)))

        def fsdp() -> dict[str, float]:
            acc.load_state_dict(start)
            shape, names = ((2, 2), ("copies", "shards")) if self.world == 4 else ((self.world,), ("shards",))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            tg.distributed.fully_shard(module, mesh)
            parameters = trained(module)
            optimizer = torch.optim.AdamW(parameters, 1e-2)
            losses = train(acc, lambda b: module(batches=b), optimizer, first, self.mine(False, tasks), parameters)
            middle = state(acc)
            losses += train(acc, lambda b: module(batches=b), optimizer, second, self.mine(True, tasks), parameters)
            return against(expected, (losses, middle, state(acc)))

        self.cell(f"{name}/one", one)
        self.cell(f"{name}/ddp", ddp)
        self.cell(f"{name}/fsdp2", fsdp)
        return module

    def phases(self) -> None:
        """Plans one after the other in one module, the last but one with parameters of its own: one process, DDP, FSDP2."""
        accs = programs("none", "random-ltd", "himix")
        largest, tasks = accs["himix"], list(accs["himix"])
        module = tg.Blockwise(accs)
        start = copy.deepcopy(module.state_dict())
        order = {"none": range(2), "random-ltd": range(2, 4), "himix": range(4, 6)}

        def run(forward: Callable[[str], Callable[[Any], Any]], work_of: Any) -> tuple[Any, Any, torch.optim.Optimizer]:
            parameters = list(largest.parameters())
            optimizer, losses = torch.optim.AdamW(parameters, 1e-2), []
            for plan, steps in [*order.items(), ("none", range(6, 8))]:
                module.use(plan)
                losses += train(accs[plan], forward(plan), optimizer, steps, work_of, parameters)
            return losses, state(largest), optimizer

        expected = run(lambda plan: flat(accs[plan]), self.everyones(True, tasks))

        def against(found: Any, all_here: bool) -> dict[str, float]:
            losses = torch.tensor(found[0], dtype=torch.float64)
            if not all_here:
                dist.all_reduce(losses)
                losses /= self.world
            apart = (losses - torch.tensor(expected[0], dtype=torch.float64)).abs().max()
            return {"losses": float(apart), "parameters": furthest(found[1], expected[1])}

        def one() -> dict[str, float]:
            module.load_state_dict(start)
            return against(run(lambda _: lambda b: module(batches=b), self.everyones(True, tasks)), True)

        def ddp() -> dict[str, float]:
            module.load_state_dict(start)
            wrapped = DDP(module, find_unused_parameters=True)
            return against(run(lambda _: lambda b: wrapped(batches=b), self.mine(True, tasks)), False)

        def fsdp() -> dict[str, float]:
            module.load_state_dict(start)
            tg.distributed.fully_shard(module, init_device_mesh("cpu", (self.world,)))
            trained = run(lambda _: lambda b: module(batches=b), self.mine(True, tasks))
            found = against(trained, False)
            added, moments = list(largest.own_parameters.values()), trained[2].state
            assert not any(
                p.requires_grad for p in added
            )  # they rest, and the optimizer's state of them is saved all the same
            before = [whole(moments[p]["exp_avg"]) for p in added]
            tg.distributed.save(self.folder / "phases", module, trained[2])
            for p in added:
                moments[p]["exp_avg"].zero_()
            module(batches=work(0, self.rank, False, tasks))
            tg.distributed.load(self.folder / "phases", module, trained[2])
            assert all(
                x.any() and torch.equal(whole(moments[p]["exp_avg"]), x) for p, x in zip(added, before, strict=True)
            )
            return found

        self.cell("phases/one", one)
        self.cell("phases/ddp", ddp)
        self.cell("phases/fsdp2", fsdp)

    def sharded(self, name: str, acc: tg.Accelerated, backend: str | None = None, **options: Any) -> None:
        """Steps of one task a process, sharded and clipped, against one process."""
        tasks, start, steps = list(acc), copy.deepcopy(acc.state_dict()), range(STEPS)

        def compared() -> dict[str, float]:
            parameters = [p for p in acc.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, 1e-2)
            train(acc, flat(acc), optimizer, steps, self.everyones(True, tasks), parameters)
            expected = state(acc)
            acc.load_state_dict(start)
            module = acc.module(**options)
            if backend is not None:
                module.compile(backend=backend)
            tg.distributed.fully_shard(module, init_device_mesh("cpu", (self.world,)))
            parameters = [p for p in module.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, 1e-2)
            train(acc, lambda b: module(batches=b), optimizer, steps, self.mine(True, tasks), parameters)
            return {"split": furthest(state(acc), expected), "functions": counters["stats"]["unique_graphs"]}

        self.cell(name, compared)

    def checkpoint(self, name: str, acc: tg.Accelerated, module: tg.Blockwise, other: tg.Accelerated) -> None:
        """Saved by all processes, loaded by one and by these into another program, and trained on."""
        tasks, folder = list(acc), self.folder / "checkpoints" / name

        def resumed() -> dict[str, Any]:
            optimizer = torch.optim.AdamW(trained(module), 1e-2)
            mine = self.mine(True, tasks)
            train(acc, lambda b: module(batches=b), optimizer, range(2), mine)
            with torch.no_grad():
                module(batches=mine(0)[0])  # what is around the blocks stays gathered
            tg.distributed.save(folder, module, optimizer, step=2)
            train(acc, lambda b: module(batches=b), optimizer, range(2, 4), mine)
            expected, found = state(acc), {}

            with torch.no_grad():
                for p in other.parameters():
                    p.zero_()
            again = other.module()
            optimizer = torch.optim.AdamW(trained(again), 1e-2)
            more = tg.distributed.load(folder, again, optimizer)
            found["more"] = more
            train(other, flat(other), optimizer, range(more["step"], 4), self.everyones(True, tasks))
            found["alone"] = furthest(state(other), expected)
            found["keys"] = sorted(again.state_dict()) == sorted(acc.state_dict())

            if self.rank == 0:
                torch.save(expected, self.folder / f"{name}.pt")
            found["sharded"] = self.resume(other, again, folder, expected)
            return found

        self.cell(f"{name}/resumed", resumed)

    def resume(self, acc: tg.Accelerated, module: tg.Blockwise, folder: Path, expected: dict[str, Tensor]) -> float:
        """Load what two processes saved, and train on as they did."""
        tg.distributed.fully_shard(module, init_device_mesh("cpu", (self.world,)))
        optimizer = torch.optim.AdamW(trained(module), 1e-2)
        more = tg.distributed.load(folder, module, optimizer)
        mine: Any = lambda step: [work(step, self.rank % 2, True, list(acc))]  # noqa: E731
        train(acc, lambda b: module(batches=b), optimizer, range(more["step"], 4), mine)
        return furthest(state(acc), expected)

    def reloaded(self, policy: str) -> None:
        """What two processes saved, by the number that there are now."""
        acc, folder = program(policy), self.folder.parent / "2"

        def loaded() -> dict[str, float]:
            expected = torch.load(folder / f"{policy}.pt")
            return {"sharded": self.resume(acc, acc.module(), folder / "checkpoints" / policy, expected)}

        self.cell(f"{policy}/reloaded", loaded)

    def more(self) -> dict[str, Callable[[], None]]:
        """What is beside the table."""
        return {
            **{name: partial(self.kind, name, *made) for name, made in KINDS.items()},
            "compiled": lambda: self.sharded("compiled", program("shared"), "aot_eager", checkpoint=True),
            "phases": self.phases,
            "resumed-random": lambda: self.resumed("random-ltd"),
            "resumed-own": lambda: self.resumed("himix"),
            "reloaded": lambda: self.reloaded("random-ltd"),
            "mixed": self.mixed,
            "region": self.region,
        }

    def kind(self, name: str, policy: str, change: Callable[[Any], None]) -> None:
        """A model that is not plain: all of the table's row, blocks computed again, and checkpoints."""
        acc = program(policy, change=change)
        module = self.features(name, acc, checkpoint=True)
        self.checkpoint(name, acc, module, program(policy, change=change))

    def resumed(self, policy: str) -> None:
        """Checkpoints of a policy."""
        acc = program(policy)
        module = tg.distributed.fully_shard(acc.module(), init_device_mesh("cpu", (self.world,)))
        self.checkpoint(policy, acc, module, program(policy))

    def region(self) -> None:
        """Own projections in a region of autocast, sharded: as one process, in the region."""
        acc = program("himix", change=lambda model: model.float())
        start = copy.deepcopy(acc.state_dict())

        def trained_on(forward: Callable[[dict[str, Any]], Any], module: Any, work_of: Any) -> dict[str, Tensor]:
            optimizer = torch.optim.SGD(trained(module), 1e-2)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                train(acc, forward, optimizer, range(STEPS), work_of)
            return state(acc)

        def compared() -> dict[str, float]:
            expected = trained_on(flat(acc), acc, self.everyones(True, list(acc)))
            acc.load_state_dict(start)
            module = acc.module(checkpoint=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                module.prepare()
            tg.distributed.fully_shard(module, init_device_mesh("cpu", (self.world,)))
            found = trained_on(lambda b: module(batches=b), module, self.mine(True, list(acc)))
            return {"split": furthest(found, expected), "moved": furthest(expected, start)}

        self.cell("region", compared)

    def mixed(self) -> None:
        """bf16 parameters in the forward: the user's own forward under FSDP2 is the judge."""
        acc, plain = (tg.optimize(models.spec(models.seeded(models.VLM)), "exact", verify=False) for _ in range(2))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (self.world,))
        batch = {"u": models.batch(seed=1)}

        def compared() -> dict[str, float]:
            module = tg.distributed.fully_shard(acc.module(), mesh, mp_policy=policy)
            module(batches=batch)["u"].backward()
            eager = _Eager(plain)
            fully_shard(eager, mesh=mesh, mp_policy=policy)
            eager(batch).backward()
            mine, theirs = dict(acc.model.named_parameters()), dict(plain.model.named_parameters())
            apart = {n: whole(p.grad) - whole(theirs[n].grad) for n, p in mine.items()}
            return {
                "gradients": max(float(x.norm() / whole(theirs[n].grad).norm()) for n, x in apart.items()),
                "float32": float(all(p.dtype is torch.float32 for p in mine.values())),
            }

        self.cell("mixed", compared)


class _Eager(nn.Module):
    """The user's forwards of all tasks."""

    def __init__(self, acc: tg.Accelerated) -> None:
        super().__init__()
        self.model = acc.model
        self.tasks = (acc.program.spec.tasks,)

    def forward(self, batches: dict[str, dict[str, Tensor]]) -> Tensor:
        return sum(self.tasks[0][task].forward(self.model, **x) for task, x in batches.items())


def main(folder: Path, rank: int, world: int, names: Sequence[str]) -> None:
    faulthandler.dump_traceback_later(900, exit=True)  # rather than to wait for ever
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    cells = Cells(rank, world, folder)
    more = cells.more()
    for name in names:
        if name in more:
            more[name]()
        else:
            cells.features(name, program(name), checkpoint=name == "shared")
    (folder / f"{rank}.json").write_text(json.dumps(cells.found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    sys.stdout.flush()
    os._exit(0)  # all is written; threads of groups that meshes hold now and then abort the interpreter's end

"""One of several processes that Accelerate, or the trainer of transformers, trains a program in.

``python -m tests.distributed.trainers FOLDER RANK WORLD CELL...``: writes what was found of each to ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, SequentialSampler, default_collate

import tokgraph as tg
from tests.distributed.programs import batch_of, program
from tests.distributed.worker import flat, furthest, state

STEPS, PASSES, SAMPLES = 3, 2, 2  # optimizer steps, passes that each accumulates, samples of a batch
Rows = list[dict[str, dict[str, Tensor]]]


def rows(tasks: Sequence[str], world: int) -> Rows:
    """Samples of both tasks, as many as the steps of all processes take."""
    found = []
    for number in range(STEPS * PASSES * world):
        batches = {task: batch_of(task, number) for task in tasks}
        found += [{t: {k: x[i] for k, x in batch.items()} for t, batch in batches.items()} for i in range(SAMPLES)]
    return found


def by_hand(acc: tg.Accelerated, world: int) -> dict[str, Tensor]:
    """Parameters after all steps of a plain loop in one process, which are then put back."""
    start = copy.deepcopy(acc.state_dict())
    parameters = list(acc.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.0)
    loader = iter(DataLoader(rows(list(acc), world), SAMPLES))
    for _ in range(STEPS):
        for _ in range(PASSES * world):
            loss = sum(x["loss"] for x in flat(acc)(next(loader)).values())
            (loss / (PASSES * world)).backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    found = state(acc)
    acc.load_state_dict(start)
    assert furthest(state(acc), found) > 1e-3
    return found


def compared(acc: tg.Accelerated, expected: dict[str, Tensor], saved: Path) -> dict[str, Any]:
    """How far the parameters are from those of the loop by hand, and what the file of the model holds."""
    from safetensors.torch import load_file

    dist.barrier()
    file = load_file(saved)
    whole = state(acc)
    return {
        "parameters": furthest(whole, expected),
        "keys": sorted(file) == sorted(acc.state_dict()),
        "saved": furthest(file, whole),  # type: ignore[arg-type]
    }


def accelerate(folder: Path, world: int, sharded: bool) -> dict[str, Any]:
    """The loop that Accelerate wraps; sharded by tokgraph, or copied by Accelerate's DDP."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    acc = program("shared")
    expected = by_hand(acc, world)
    module: Any = acc.module()
    if sharded:
        tg.distributed.fully_shard(module, init_device_mesh("cpu", (world,)))
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=PASSES,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2, weight_decay=0.0)
    optimizer, loader = accelerator.prepare(optimizer, DataLoader(rows(list(acc), world), SAMPLES))
    if not sharded:
        module = accelerator.prepare(module)
    for batches in loader:
        with accelerator.accumulate(module):
            loss = sum(x["loss"] for x in module(batches=batches).values())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    if sharded:
        tg.distributed.save(folder / "sharded", module, optimizer.optimizer, step=STEPS)
        again = program("shared")
        tg.distributed.load(folder / "sharded", again.module())
        return {"parameters": furthest(state(acc), expected), "saved": furthest(state(again), state(acc))}
    accelerator.save_model(module, folder / "saved")
    accelerator.save_state(folder / "state")
    found = compared(acc, expected, folder / "saved" / "model.safetensors")
    with torch.no_grad():
        for p in acc.parameters():
            p.zero_()
    accelerator.load_state(folder / "state")
    return {**found, "resumed": furthest(state(acc), expected)}


def trainer(folder: Path, world: int) -> dict[str, Any]:
    """All tasks in each step of the trainer of transformers, under its DDP."""
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    acc = program("shared")
    expected = by_hand(acc, world)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=STEPS, per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=PASSES, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.5,
        optim="adamw_torch", use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, dataloader_pin_memory=False, ddp_find_unused_parameters=True,
    )  # fmt: skip
    run = InOrder(
        model=acc.trainable(), args=arguments, train_dataset=rows(list(acc), world), data_collator=default_collate
    )
    run.train()
    run.save_model(str(folder / "trainer"))
    return compared(acc, expected, folder / "trainer" / "model.safetensors")


def main(folder: Path, rank: int, world: int, names: Sequence[str]) -> None:
    faulthandler.dump_traceback_later(900, exit=True)  # rather than to wait for ever
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 29500}
    os.environ |= {name: str(x) for name, x in ranks.items()} | {"MASTER_ADDR": "localhost"}  # as torchrun does
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    cells: dict[str, Callable[[], Any]] = {
        "accelerate": lambda: accelerate(folder, world, sharded=False),
        "accelerate-fsdp2": lambda: accelerate(folder, world, sharded=True),
        "trainer": lambda: trainer(folder, world),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: cells[name]() for name in names}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

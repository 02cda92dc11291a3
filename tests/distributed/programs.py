"""The programs that several processes train: small digits models in float64, of many kinds, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tokgraph as tg
from examples import digits
from tests.field.models import Adapted

POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "exact": {},
    "shared": {"span": (1, 2), "keep": 0.5},
    "random-ltd": {},
    "himix": {"projections": "own"},
}
OTHERS: dict[str, dict[str, Any]] = {"pyramiddrop": {"stages": 3}}


def program(policy: str, layers: int = 3, change: Callable[[Any], None] = lambda model: None) -> tg.Accelerated:
    """A small digits model in float64, its sizes fixed, changed before it is captured."""
    return programs(policy, layers=layers, change=change)[policy]


def programs(
    *policies: str, layers: int = 3, change: Callable[[Any], None] = lambda model: None
) -> dict[str, tg.Accelerated]:
    """The same by several policies, captured once."""
    spec = digits.build(layers=layers, hidden=16, heads=2, batch=2)
    model = spec.model.double()
    change(model)
    tasks = {
        name: tg.Task(task.forward, batch_of(name, 0), visual=task.visual, reads=task.reads, outputs=task.outputs)
        for name, task in spec.tasks.items()
    }
    facts = tg.analyze(tg.capture(tg.ModelSpec(model, tasks)))
    return {
        policy: tg.apply(facts, tg.make_plan(facts, policy, **{**POLICIES, **OTHERS}.get(policy, {})))
        for policy in policies
    }


def tie(model: Any) -> None:
    """Words and codes are read and written by the same weights."""
    model.head.weight = model.embed.weight


def freeze_tower(model: Any) -> None:
    model.patch_encoder.requires_grad_(False)


def adapt(model: Any) -> None:
    """Adapters on what attention reads; of the rest of the blocks, nothing learns."""
    torch.manual_seed(0)
    for block in model.blocks:
        block.requires_grad_(False)
        block.attention.qkv = Adapted(block.attention.qkv)


def change_all(model: Any) -> None:
    tie(model)
    freeze_tower(model)
    adapt(model)


def freeze_first(model: Any) -> None:
    """Embeddings and the first block learn nothing: the text task has no gradient there, the image encoder has."""
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)


KINDS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "tied": ("shared", tie),
    "frozen-tower": ("shared", freeze_tower),
    "frozen-first": ("exact", freeze_first),
    "adapters": ("random-ltd", adapt),
    "own-of-all": ("himix", change_all),
}
"""What models are like: a policy for each, and the change."""


def batch_of(task: str, number: int) -> dict[str, Tensor]:
    """Two images of a task, others for each number."""
    images, names = (x[2 * number : 2 * number + 2] for x in digits.load())
    if task == "understanding":
        batch = digits.understanding_batch(images, names)
        return {**batch, "pixel_values": batch["pixel_values"].double()}
    return digits.generation_batch(digits.quantise(images), names)


def work(step: int, rank: int, split: bool, tasks: list[str]) -> dict[str, dict[str, Tensor]]:
    """Task -> batch of a process in a step: all tasks, or one of them in turn."""
    mine = [tasks[(step + rank) % len(tasks)]] if split else tasks
    return {task: batch_of(task, 10 * step + rank) for task in mine}


def trained(module: Any) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]

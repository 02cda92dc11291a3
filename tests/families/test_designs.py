"""Unified designs in plain PyTorch: their layers are found, and what plans make of them is what a loop by hand computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests.field.decoder import worst

from . import design_parts as p
from . import designs_continuous, designs_discrete
from .family import Example

FAMILIES = {family.name: family for module in (designs_discrete, designs_continuous) for family in module.FAMILIES}
QUICK = {"Show-o"}
"""What the default run looks at."""
DESIGNS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@cache
def captured(name: str) -> tuple[Example, tg.Facts]:
    made = FAMILIES[name].make()
    example = Example(made.model.double(), made.tasks, made.batch, made.layers)
    tasks = {task: tg_task(example, task) for task in example.tasks}
    return example, tg.analyze(tg.capture(tg.ModelSpec(example.model, tasks)))


def tg_task(example: Example, task: str) -> tg.Task:
    from dataclasses import replace

    return replace(example.tasks[task], inputs=doubled(example, task, 0))


def doubled(example: Example, task: str, seed: int) -> dict[str, Tensor]:
    return {k: x.double() if x.is_floating_point() else x for k, x in example.batch(task, seed).items()}


@contextmanager
def by_hand(example: Example, task: str, span: range, dropped: Tensor, hide: bool) -> Iterator[None]:
    """Rows that are dropped do not change in the layers of the span; hidden ones are no keys of the others there."""
    layers = [example.model.get_submodule(path) for path in example.layers[task]]

    def dropping(layer: nn.Module):
        forward = layer.forward

        def run(x: Tensor, mask: Tensor, *more: object) -> Tensor:
            seen = (~dropped[:, None, None, :] | dropped[:, None, :, None]) if hide else True
            return torch.where(dropped.unsqueeze(-1), x, forward(x, mask & seen, *more))

        return run

    try:
        for number in span:
            layers[number].forward = dropping(layers[number])
        yield
    finally:
        for number in span:
            layers[number].__dict__.pop("forward", None)


def dropped_rows(facts: tg.Facts, task: str, inputs: dict[str, Tensor]) -> Tensor:
    """Every second visual token."""
    if (
        "ids" in inputs
        and facts.program[task].task.visual is not None
        and facts.program[task].task.visual.kind == "ids"
    ):
        visual = inputs["ids"] >= p.IMAGE
    else:
        raise NotImplementedError
    return visual & (visual.cumsum(1) % 2 == 0)


@pytest.mark.parametrize("name", DESIGNS)
def test_blocks_are_layers(name: str) -> None:
    example, facts = captured(name)
    for task in example.tasks:
        assert tuple(block.module for block in facts[task].blocks) == example.layers[task]
        assert (facts[task].unplaced, facts[task].between) == ((), ())


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("mode", ["hide", "freeze"])
def test_drops_are_those_by_hand(name: str, mode: str) -> None:
    example, facts = captured(name)
    sites = [tg.DropSite(task, 1, p.LAYERS - 1, 0.5, mode=mode) for task in example.tasks]
    accelerated = tg.apply(facts, tg.Plan(tuple(sites)))
    tg.verify(accelerated).raise_if_failed()
    for task in example.tasks:
        for seed in (0, 1):
            inputs = doubled(example, task, seed)
            with by_hand(example, task, range(1, p.LAYERS - 1), dropped_rows(facts, task, inputs), mode == "hide"):
                reference = example.tasks[task].forward(example.model, **inputs)
            assert worst(accelerated[task](**inputs), reference, example.model) < 1e-10, (task, seed)


@pytest.mark.parametrize("name", DESIGNS)
def test_exact_is_the_forward(name: str) -> None:
    example, facts = captured(name)
    accelerated = tg.apply(facts, tg.make_plan(facts, "exact"))
    for task in example.tasks:
        for seed in (0, 1):
            inputs = doubled(example, task, seed)
            reference = example.tasks[task].forward(example.model, **inputs)
            assert worst(accelerated[task](**inputs), reference, example.model) < 1e-10, (task, seed)


@pytest.mark.parametrize("name", DESIGNS)
def test_shared_keeps_parameters_shared(name: str) -> None:
    from tokgraph.report import make_report

    _, facts = captured(name)
    accelerated = tg.apply(facts, tg.make_plan(facts, "shared", keep=0.5))
    report = make_report(accelerated)
    assert report["sharing_index"] == 1.0

"""Unified designs in plain PyTorch: their layers are found, and what plans make of them is what a loop by hand computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests.field.decoder import worst
from tokgraph.report import make_report

from . import design_parts as p
from . import designs_continuous, designs_discrete
from .family import Example

FAMILIES = {family.name: family for module in (designs_discrete, designs_continuous) for family in module.FAMILIES}
SLOW = pytest.mark.slow
DESIGNS = [name if name == "Show-o" else pytest.param(name, marks=SLOW) for name in FAMILIES]
"""The default run looks at one of them."""
SPAN = range(1, p.LAYERS - 1)


@cache
def captured(name: str) -> tuple[Example, tg.Facts]:
    made = FAMILIES[name].make()
    example = replace(made, model=made.model.double())
    tasks = {name: replace(task, inputs=doubled(example, name, 0), dynamic=None) for name, task in made.tasks.items()}
    return example, tg.analyze(tg.capture(tg.ModelSpec(example.model, tasks)))


def doubled(example: Example, task: str, seed: int) -> dict[str, Tensor]:
    return {k: x.double() if x.is_floating_point() else x for k, x in example.batch(task, seed).items()}


def eager(example: Example, task: str, inputs: dict[str, Tensor]) -> Tensor:
    return example.tasks[task].forward(example.model, **inputs)


@contextmanager
def by_hand(example: Example, task: str, inputs: dict[str, Tensor], hide: bool) -> Iterator[None]:
    """Every second visual token does not change in the layers of the span; hidden ones are no keys of the others there."""

    def dropping(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, mask: Tensor, *beside: object) -> Tensor:
            visual = visual_rows(example.tasks[task], inputs, x)
            dropped = visual & (visual.cumsum(1) % 2 == 0)
            seen = ~dropped[:, None, None, :] | dropped[:, None, :, None]
            after = forward(x, mask & seen if hide else mask, *beside)
            return torch.where(dropped.unsqueeze(-1), x, after)

        return run

    layers: list[nn.Module] = [example.model.get_submodule(example.layers[task][number]) for number in SPAN]
    for layer in layers:
        layer.forward = dropping(layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def visual_rows(task: tg.Task, inputs: dict[str, Tensor], x: Tensor) -> Tensor:
    if task.visual is not None and task.visual.kind == "ids":
        return inputs["ids"] >= p.IMAGE
    assert task.visual is not None
    assert task.visual.span is not None
    visual = torch.zeros(x.shape[:2], dtype=torch.bool)
    visual[:, slice(*task.visual.span)] = True
    return visual


@pytest.mark.parametrize("name", DESIGNS)
def test_blocks_are_layers(name: str) -> None:
    example, facts = captured(name)
    for task in example.tasks:
        assert tuple(block.module for block in facts[task].blocks) == example.layers[task]
        assert (facts[task].unplaced, facts[task].between) == ((), ())


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("mode", ["hide", pytest.param("freeze", marks=SLOW)])
def test_drops_are_those_by_hand(name: str, mode: str) -> None:
    example, facts = captured(name)
    for task in example.tasks:
        plan = tg.Plan((tg.DropSite(task, SPAN.start, SPAN.stop, 0.5, mode=mode),))
        accelerated = tg.apply(facts, plan)
        if mode == "hide":
            tg.verify(accelerated).raise_if_failed()
        for seed in (0, 1):
            inputs = doubled(example, task, seed)
            with by_hand(example, task, inputs, mode == "hide"):
                reference = eager(example, task, inputs)
            assert worst(accelerated[task](**inputs), reference, example.model) < 1e-10, (task, seed)


@SLOW
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_is_the_forward(name: str) -> None:
    example, facts = captured(name)
    accelerated = tg.apply(facts, tg.make_plan(facts, "exact"))
    for task in example.tasks:
        for seed in (0, 1):
            inputs = doubled(example, task, seed)
            reference = eager(example, task, inputs)
            assert worst(accelerated[task](**inputs), reference, example.model) < 1e-10, (task, seed)


@SLOW
@pytest.mark.parametrize("name", ["VILA-U", "JanusFlow"])
def test_shared_keeps_parameters_shared(name: str) -> None:
    example, facts = captured(name)
    report = make_report(tg.apply(facts, tg.make_plan(facts, "shared", keep=0.5)))
    assert report["sharing_index"] == 1.0
    assert all(report["tasks"][task]["flops"]["ratio"] < 1 for task in example.tasks)

"""Programs lowered once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, captured_tiny
from tests.passes.lower.programs import PLANS, RANDOM, G, U, draw, read
from tokgraph.passes.lower import Lowered, lower_train_step


@pytest.fixture(scope="session")
def two() -> Captured:
    return captured_tiny(2, dynamic=True)


@pytest.fixture(scope="session")
def accelerated(two: Captured) -> Callable[[str], tg.Accelerated]:
    return cache(lambda name: two.apply({**PLANS, "random": RANDOM}[name]))


@pytest.fixture(scope="session")
def train_step(two: Captured, accelerated: Callable[[str], tg.Accelerated]) -> Callable[[str, str], Lowered]:
    """Plan, task -> its training step: seconds each, so they are shared."""
    return cache(lambda name, task: lower_train_step(accelerated(name).program[task]))


@pytest.fixture(scope="session")
def rich() -> Captured:
    spec = tiny.build(layers=1, dtype="float64", dynamic=True)
    model = spec.model
    model.head.weight = model.embed.weight
    model.code_head.weight = model.codes.weight
    model.layers[0].mlp[0].weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    old = spec.tasks
    return Captured.of(
        tg.ModelSpec(
            model,
            {
                U: tg.Task(read, old[U].inputs, old[U].dynamic, old[U].visual, reads="text"),
                G: tg.Task(draw, old[G].inputs, old[G].dynamic, visual_inputs=("codes",), reads="visual"),
            },
        )
    )


@pytest.fixture(scope="session")
def rich_step(rich: Captured) -> Callable[[str], Lowered]:
    return cache(lambda task: lower_train_step(rich.program[task]))

"""Lowered update steps are those of ``torch.optim``; the counter of a plan that draws at random is an input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.harness import Captured
from tests.passes.lower.programs import STEP, G, U, batch, call, draw, places
from tokgraph.passes.lower import (
    OPTIMIZERS,
    Optimizer,
    lower_forward,
    lower_program,
    lower_train_step,
    lower_update_step,
)
from tokgraph.passes.lower.step import make_optimizer

RULES: dict[str, tuple[Optimizer, Callable[..., torch.optim.Optimizer]]] = {
    "plain": (make_optimizer("sgd", {"lr": 0.1}), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        make_optimizer("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "adamw": (
        make_optimizer("adamw", {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-6}),
        lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6),
    ),
    "adamw's defaults": (make_optimizer("adamw", {}), lambda p: torch.optim.AdamW(p)),
}


@pytest.mark.parametrize("rule", [r if r == "momentum" else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_three_updates(rich: Captured, rule: str) -> None:
    """Outputs fed back, on batches of different sizes, against ``torch.optim`` on a copy of the model."""
    ours, torchs = RULES[rule]
    lowered = lower_update_step(rich.program[G], ours)
    assert lowered.kind == "update-step"
    model = copy.deepcopy(rich.model)
    optimizer = torchs(model.parameters())
    parameters = dict(model.named_parameters())
    held = dict(lowered.initial)
    assert {name.partition("/")[0] for name in held} == ({"param"} if rule == "plain" else {"param", "state"})
    for rows, text in [(2, 5), (3, 8), (1, 6)]:
        inputs = batch(G, rows, text, torch.float64)
        optimizer.zero_grad()
        loss = draw(model, **inputs)[0]
        loss.backward()
        optimizer.step()
        found = call(lowered, inputs, **held)
        torch.testing.assert_close(found.pop("loss"), loss.detach(), rtol=1e-9, atol=1e-9)
        new = {name.removeprefix("new_"): x for name, x in found.items()}
        assert new.keys() <= held.keys()
        held |= new
        for name, parameter in parameters.items():
            if f"param/{name}" in held:
                torch.testing.assert_close(held[f"param/{name}"], parameter.detach(), rtol=1e-7, atol=1e-7, msg=name)
        for name, x in held.items():
            if name.startswith("state/"):
                _, what, of = name.split("/")
                known = optimizer.state[parameters[of]]
                expected = known[{"momentum": "momentum_buffer"}.get(what, what)]
                torch.testing.assert_close(x, expected, rtol=1e-7, atol=1e-9, msg=name)
    frozen = {"layers.0.mlp.0.weight", "norm.bias"}
    used = {n for n, p in parameters.items() if p.grad is not None}
    assert {name.removeprefix("param/") for name in new if name.startswith("param/")} == used
    assert used.isdisjoint(frozen)
    assert rich.model.embed.weight is not model.embed.weight


def test_an_update_step_takes_what_it_gives(rich: Captured) -> None:
    """Inputs are those that the loss depends on: no other parameter has to be passed along."""
    lowered = lower_update_step(rich.program[G], make_optimizer("sgd", {"momentum": 0.5}))
    given = {name.removeprefix("new_") for name in lowered.outputs if name != "loss"}
    assert {name for name in lowered.inputs if "/" in name} == given
    updates = [place for place in places(lowered) if place["phase"] == "update"]
    assert {place["kind"] for place in updates} == {"optimizer"}
    assert {"embed", "layers.0.attention.qkv"} <= {place["module"] for place in updates}


def test_optimizers_by_name() -> None:
    assert set(OPTIMIZERS) == {"sgd", "adamw"}
    assert make_optimizer("sgd", {"lr": 3.0}).lr == 3.0
    with pytest.raises(TypeError, match=r"sgd has no option 'beta1'; it has lr, momentum, weight_decay"):
        make_optimizer("sgd", {"beta1": 0.5})
    with pytest.raises(KeyError):
        make_optimizer("lion", {})


# Plans that draw at random.


@pytest.mark.slow
def test_the_step_of_a_random_plan_is_an_input(two: Captured, accelerated: Any) -> None:
    task = accelerated("random")[U]
    forward = lower_forward(task.task_graph)
    train = lower_train_step(task.task_graph)
    kept = lower_program(task.task_graph)
    inputs = batch(U, 3, 7)
    losses = set()
    try:
        for step in range(5):
            task.step = step
            with torch.no_grad():
                loss = task.task_graph.unflatten(task.graph_module(*task.task_graph.flatten(inputs)))[0]
            losses.add(loss.item())
            for lowered in (forward, train):
                found = call(lowered, inputs, **{STEP: torch.tensor(step)})
                torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)
    finally:
        task.step = 0
    assert len(losses) > 2, "other steps draw other rows"
    for lowered in (forward, train):
        assert lowered.inputs[-1] == STEP
        assert STEP not in lowered.state
        assert lowered.initial[STEP].item() == 0
    assert STEP in kept.state
    assert STEP not in kept.inputs


def test_plans_that_do_not_draw_have_no_step(two: Captured, accelerated: Any, train_step: Any) -> None:
    for lowered in (train_step("thinned", U), lower_forward(accelerated("thinned").program[U])):
        assert lowered.initial == {}
        assert lowered.inputs == tuple(two.program[U].task.inputs)

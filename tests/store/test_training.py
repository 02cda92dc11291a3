"""Loaded programs train on, take checkpoints and further plans, and are analysed and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tokgraph as tg
from tests.harness import Captured, captured_tiny
from tests.store.programs import TASKS, G, Rich, Saved, U, loss_of, same

pytestmark = pytest.mark.xdist_group("store")  # one process saves the programs


def train(program: tg.Accelerated, batches: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for inputs in batches:
        optimizer.zero_grad()
        total = sum(loss_of(program[task](**inputs[task])) for task in TASKS)
        total.backward()  # type: ignore[union-attr]
        optimizer.step()
        losses.append(total.item())  # type: ignore[union-attr]
    return losses


def test_training_goes_on_as_if_nothing_happened(rich: Captured, tmp_path: Path, keeping_weights: Any) -> None:
    """Two steps, saved, two more: the optimizer's state fits parameters that a plan added and frozen ones as well."""
    keeping_weights(rich.model)
    site = tg.DropSite(G, 1, 2, 0.5, projections="own")
    program = rich.apply(tg.Plan((site,)))
    batches = [{task: dict(rich.spec.tasks[task].inputs) for task in TASKS}] * 2
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.01)
    first = train(program, batches, optimizer)
    loaded = Saved(program, tmp_path / "program", with_baseline=False).after
    again = torch.optim.AdamW(loaded.parameters(), lr=0.5)
    again.load_state_dict(json_like(optimizer.state_dict()))
    right, actual = train(program, batches, optimizer), train(loaded, batches, again)
    assert right[-1] < first[0]
    assert actual == pytest.approx(right, rel=1e-10)
    for (name, mine), (_, theirs) in zip(loaded.named_parameters(), program.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=name)


def json_like(state: Any) -> Any:
    """A copy that shares no tensor."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: json_like(x) for key, x in state.items()}
    return [json_like(x) for x in state] if isinstance(state, list) else state


def test_a_checkpoint_of_the_model_loads(rich: Captured, rich_saved: Saved) -> None:
    """One that knows nothing of the plan; own projections then start as copies."""
    loaded = tg.load_accelerated(rich_saved.folder)
    other = Rich().double().state_dict()
    loaded.load_state_dict(other)
    for name, x in loaded.model.state_dict().items():
        assert torch.equal(x, other[name]), name
    (name, copied), *_ = loaded.own_parameters.items()
    assert torch.equal(copied, other[name.split(".", 2)[2]])


@pytest.mark.slow
@pytest.mark.parametrize("policy", [pytest.param("shared", marks=pytest.mark.slow), "himix-hmgen-share-partial"])
def test_a_plan_is_applied_to_a_loaded_baseline(policy: str, tmp_path: Path) -> None:
    """Loaded graphs have another order of nodes: what chooses rows may stand after what is to read them."""
    captured = captured_tiny(4)
    program = captured.apply(tg.make_plan(captured.program, policy, facts=captured.facts))
    program.save(tmp_path / "program")
    baseline = tg.load_accelerated(tmp_path / "program").captured
    assert baseline is not None
    again = tg.apply(baseline, program.plan)
    assert tg.verify(baseline, again).passed
    for task, spec in captured.spec.tasks.items():
        same(again[task](**spec.inputs)[0], program[task](**spec.inputs)[0])


def test_own_projections_come_back(rich: Captured, tmp_path: Path) -> None:
    """They are parameters of their own, with values of their own, and receive gradients."""
    program = rich.apply(tg.Plan((tg.DropSite(G, 1, 2, 0.5, projections="own"),)))
    with torch.no_grad():
        for p in program.own_parameters.values():
            p.mul_(1.25)
    loaded = Saved(program, tmp_path / "program").after
    assert loaded.own_parameters.keys() == program.own_parameters.keys() != set()
    same(
        {n: p.detach() for n, p in loaded.own_parameters.items()},
        {n: p.detach() for n, p in program.own_parameters.items()},
    )
    assert not {*loaded.own_parameters} & {*dict(loaded.model.named_parameters())}
    inputs = dict(rich.spec.tasks[G].inputs)
    loss = loaded[G](**inputs)[0]
    assert all(g.any() for g in torch.autograd.grad(loss, list(loaded.own_parameters.values())))
    same(loss, program[G](**inputs)[0])


@pytest.mark.slow
def test_the_papers_policy(tmp_path: Path) -> None:
    four = captured_tiny(4)
    plan = tg.make_plan(four.program, "himix-hmgen-share-partial", facts=four.facts)
    it = Saved(four.apply(plan), tmp_path / "program")
    assert it.after.plan == plan
    assert it.after.own_parameters.keys() == it.before.own_parameters.keys() != set()
    for task in TASKS:
        same(it.after[task](**it.inputs(task)), it.before[task](**it.inputs(task)))
    for p in it.after.own_parameters.values():
        assert p.requires_grad


def test_a_random_plan_draws_the_same(tmp_path: Path) -> None:
    """From the step at which it was saved; steps of a loaded program count on."""
    program = captured_tiny(2).apply(tg.Plan((tg.DropSite(U, 0, 1, 0.5, "random", seed=3),)))
    inputs = dict(captured_tiny(2).spec.tasks[U].inputs)
    for _ in range(3):
        program[U](**inputs)
    loaded = Saved(program, tmp_path / "program", with_baseline=False).after
    assert loaded[U].step == program[U].step == 3
    right, actual = [], []
    for losses, which in ((right, program), (actual, loaded)):
        losses += [which[U](**inputs)[0].item() for _ in range(5)]
    assert actual == right
    assert len(set(right)) > 2
    assert loaded[U].step == 8
    assert int(loaded.state_dict()[f"tokgraph_step.{U}"]) == 8
    assert tg.load_accelerated(tmp_path / "program")[U].step == 3


def test_a_loaded_program_is_analysed_and_verified(saved: Saved) -> None:
    facts = tg.analyze(saved.after.captured)
    for task in TASKS:
        right = saved.before.facts[task]
        assert len(facts[task].blocks) == len(right.blocks) == 2
        assert [b.module for b in facts[task].blocks] == [b.module for b in right.blocks]
        assert facts[task].visual.count == right.visual.count
        assert facts[task].demand.reads == right.demand.reads
    result = tg.verify(saved.after.captured, saved.after)
    result.raise_if_failed()
    assert result.passed


@pytest.mark.slow
def test_verification_of_a_loaded_program_can_fail(saved: Saved) -> None:
    """Another plan than the one that was applied is found out."""
    loaded = tg.load_accelerated(saved.folder)
    loaded.plan = tg.Plan((tg.DropSite(U, 0, 1, 0.5),), exact=True)
    assert not tg.verify(loaded.captured, loaded).passed


def test_a_loaded_baseline_takes_another_plan(saved: Saved) -> None:
    """What was captured once can be thinned again, without the model's code."""
    plan = tg.Plan((tg.DropSite(U, 0, 1, 0.5, mode="freeze"),), exact=True)
    actual = tg.apply(saved.after.captured, plan)
    right = captured_tiny(2).apply(plan)
    for task in TASKS:
        for mine, theirs in zip(actual[task](**saved.inputs(task)), right[task](**saved.inputs(task)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)

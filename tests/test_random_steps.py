"""Random drops are drawn anew at each training step, and a seed repeats them."""

from __future__ import annotations

import pytest
import torch

import tokgraph as tg
from tests import tiny
from tokgraph.ir.evaluate import evaluate
from tokgraph.ir.names import STEP
from tokgraph.ir.tensors import held


@pytest.fixture(scope="module")
def program() -> tg.Program:
    return tg.capture(tiny.build(dtype="float64"))


@pytest.fixture(scope="module")
def facts(program: tg.Program) -> tg.Facts:
    return tg.analyze(program)


def thinned(program: tg.Program, facts: tg.Facts, selector: str = "random", seed: int = 0) -> tg.TaskModule:
    site = tg.DropSite("understanding", 0, 2, 0.5, selector, seed=seed)
    return tg.apply(program, tg.Plan((site,)), facts=facts)["understanding"]


def kept(task: tg.TaskModule) -> list[list[int]]:
    """The rows that stay at the task's step."""
    graph = task.task_graph
    index = next(n for n in graph.graph.nodes if n.target is torch.ops.tokgraph.keep_rows.default)
    return evaluate(graph, [index])[0].tolist()


def choices(task: tg.TaskModule, steps: int) -> list[list[list[int]]]:
    found = []
    for _ in range(steps):
        found.append(kept(task))
        task(**task.task_graph.task.inputs)
    return found


def test_each_training_step_draws_anew_and_a_seed_repeats(program: tg.Program, facts: tg.Facts) -> None:
    first, again, other = (choices(thinned(program, facts, seed=seed), 8) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert len({str(choice) for choice in first}) >= 6, "eight draws of 3 out of 6 in two samples repeat seldom"
    assert {len(row) for choice in first for row in choice} == {len(first[0][0])}


def test_the_step_can_be_set(program: tg.Program, facts: tg.Facts) -> None:
    task = thinned(program, facts)
    seen = choices(task, 4)
    assert task.step == 4
    task.step = 1
    assert choices(task, 3) == seen[1:]


def test_evaluation_stays_at_its_step(program: tg.Program, facts: tg.Facts) -> None:
    task = thinned(program, facts).eval()
    assert len({str(choice) for choice in choices(task, 4)}) == 1
    assert task.step == 0


def test_other_selectors_count_no_steps(program: tg.Program, facts: tg.Facts) -> None:
    task = thinned(program, facts, "uniform")
    choices(task, 2)
    assert task.step == 0
    assert held(task.graph_module, STEP) is None


def test_the_oracle_follows_the_step(program: tg.Program, facts: tg.Facts) -> None:
    site = tg.DropSite("understanding", 0, 2, 0.5, "random")
    accelerated = tg.apply(program, tg.Plan((site,), exact=True), facts=facts)
    accelerated["understanding"].step = 5
    assert tg.verify(program, accelerated).passed


def test_the_step_is_part_of_a_checkpoint_beside_the_models_state(program: tg.Program, facts: tg.Facts) -> None:
    site = tg.DropSite("understanding", 0, 2, 0.5, "random")
    accelerated = tg.apply(program, tg.Plan((site,)), facts=facts)
    assert accelerated.weights().keys() == program.model.state_dict().keys()
    assert accelerated.state_dict().keys() - accelerated.weights().keys() == {"tokgraph_step.understanding"}
    accelerated.load_state_dict(program.model.state_dict())

"""What the estimate says of one GPU, against what one process allocates: a step, AdamW's states, blocks computed again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import tokgraph as tg
from tests.harness import Captured
from tests.passes.cost.test_peak import EXAMPLES, allocated
from tests.passes.tools import TASKS
from tokgraph.ir.spec import split_outputs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("janus")]  # one process captures it
ALONE = tg.Cluster(gpus=1, memory=1e9, flops=1e12, bandwidth=1e11)


def held(tree: Any) -> int:
    """Bytes of the tensors of a tree."""
    return sum(x.nbytes for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor))


def states(accelerated: tg.Accelerated, task: str) -> int:
    """Bytes that AdamW keeps after a step on a task, but for its counts of steps."""
    optimizer = torch.optim.AdamW(accelerated.parameters(), lr=0.0)
    inputs = accelerated.facts.program.spec.tasks[task].inputs
    split_outputs(accelerated[task](**inputs))[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    return sum(held([s["exp_avg"], s["exp_avg_sq"]]) for s in optimizer.state.values())


@pytest.mark.filterwarnings("ignore:.*profiler")
@pytest.mark.parametrize("policy", ["none", "shared"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", EXAMPLES)
def test_one_gpu_is_one_process(
    model: str, task: str, policy: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    example: Captured = request.getfixturevalue(model)
    spec = tg.ModelSpec(example.model, {task: example.spec.tasks[task]})
    facts = tg.analyze(tg.Program(spec, {task: example.program[task]}))
    accelerated = tg.apply(facts, tg.make_plan(facts, policy))
    found = {row["checkpoint"]: row["after"]["memory"] for row in tg.estimate(accelerated, ALONE)["layouts"]}
    inputs = spec.tasks[task].inputs
    there = held([*example.model.parameters(), *example.model.buffers()]) + states(accelerated, task) + held(inputs)
    for again in (False, True):
        module = accelerated.module(checkpoint=again)
        most, _ = allocated(partial(module, task=task, **inputs), example.model, tmp_path)
        assert found[again]["total"] == pytest.approx(there + most, rel=0.02)

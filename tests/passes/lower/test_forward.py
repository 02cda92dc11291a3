"""Lowered graphs against what they were lowered from: outputs, names, state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tokgraph as tg
from tests import tiny
from tests.harness import Captured
from tests.passes.lower.programs import PLANS, SIZES, TASKS, G, U, assert_equal, batch, call, draw, read
from tokgraph.passes.lower import Lowered, lower_forward, lower_program, lower_train_step


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lower", [lower_forward, lower_program])
def test_the_same_outputs(two: Captured, accelerated: Any, lower: Callable[..., Lowered], plan: str, task: str) -> None:
    """On a batch of other sizes as well; what is exact stays exact, bit for bit."""
    graph = accelerated(plan).program[task]
    lowered = lower(graph)
    assert (lowered.task, lowered.kind) == (task, "forward")
    for rows, text in SIZES:
        inputs = batch(task, rows, text)
        with torch.no_grad():
            expected = graph.graph_module(*graph.flatten(inputs))
        found = call(lowered, inputs)
        assert len(expected) == len(found)
        for name, actual, right in zip(found, found.values(), expected, strict=True):
            assert actual.shape == right.shape, name
            torch.testing.assert_close(actual, right, rtol=1e-6, atol=1e-6, msg=name)
            assert lower is lower_forward or torch.equal(actual, right), name


@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)])
def test_what_is_lowered_for_a_runtime_holds_none_of_our_operators(
    two: Captured, accelerated: Any, train_step: Any, task: str
) -> None:
    graph = accelerated("thinned").program[task]
    kept = lower_program(graph)

    def ours(lowered: Lowered) -> list[str]:
        return [str(n.target) for n in lowered.module.graph.nodes if "tokgraph" in str(n.target)]

    assert sorted(ours(kept)) == sorted(str(n.target) for n in graph.graph.nodes if "tokgraph" in str(n.target))
    assert len(ours(kept)) > 3
    assert ours(lower_forward(graph)) == []
    assert ours(train_step("thinned", task)) == []


def all_lowered(two: Captured, accelerated: Any, train_step: Any, rich: Captured, rich_step: Any) -> list[Lowered]:
    found = [rich_step(task) for task in TASKS] + [train_step("thinned", task) for task in TASKS]
    for task in TASKS:
        for lower in (lower_forward, lower_program):
            found += [lower(rich.program[task])]
            found += [lower(accelerated("thinned").program[task])]
    return found


@pytest.mark.slow
def test_flat_functional_graphs(
    two: Captured, accelerated: Any, train_step: Any, rich: Captured, rich_step: Any
) -> None:
    """Placeholders for state, then inputs; no attributes, nothing in place; outputs that are nodes of their own."""
    for lowered in all_lowered(two, accelerated, train_step, rich, rich_step):
        graph = lowered.module.graph
        graph.lint()
        nodes = list(graph.nodes)
        assert {node.op for node in nodes} == {"placeholder", "call_function", "output"}
        placeholders = [node for node in nodes if node.op == "placeholder"]
        assert nodes[: len(placeholders)] == placeholders
        assert len(placeholders) == len(lowered.state) + len(lowered.inputs)
        assert [node.name for node in placeholders[len(lowered.state) :]] == list(lowered.inputs)
        assert len({node.target for node in placeholders}) == len(placeholders)
        mutable = [n for n in nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]
        assert mutable == []
        outputs = graph.output_node().args[0]
        assert len(outputs) == len(set(outputs)) == len(lowered.outputs) == len(set(lowered.outputs))
        assert {node.op for node in outputs} == {"call_function"}
        assert all(node.users for node in nodes if node.op == "call_function"), "no dead code"


@pytest.mark.slow
def test_lowering_leaves_the_graph_as_it_was(rich: Captured) -> None:
    graph = rich.program[U]
    before, state = str(graph.graph), copy.deepcopy(rich.model.state_dict())
    lower_train_step(graph)
    assert str(graph.graph) == before
    assert all(torch.equal(x, state[name]) for name, x in rich.model.state_dict().items())
    assert all(p.grad is None for p in rich.model.parameters())


@pytest.mark.slow
def test_state_is_the_models_own(rich: Captured) -> None:
    """The same objects under the names of the ``state_dict``; a tied weight once, under its first name."""
    for task in TASKS:
        lowered = lower_program(rich.program[task])
        own = rich.model.state_dict(keep_vars=True)
        named = {name: x for name, x in lowered.state.items() if not name.startswith("_constants.")}
        assert all(own[name] is x for name, x in named.items())
        assert len({id(x) for x in lowered.state.values()}) == len(lowered.state)
    assert {"embed.weight", "head.bias"} <= lower_program(rich.program[U]).state.keys()
    assert "head.weight" not in lower_program(rich.program[U]).state


def test_names_of_outputs(two: Captured, accelerated: Any, rich: Captured) -> None:
    assert lower_forward(two.program[U]).outputs == ("loss", "output_1")
    thinned = lower_forward(accelerated("thinned").program[U])
    assert thinned.outputs == ("loss", "output_1", "rows/output_1")
    reads = lower_forward(rich.program[U])
    assert reads.outputs == ("logits", "loss", "more.output_0", "more.output_1.best", "more.output_1.same")
    assert reads.fixed == {5: None, 6: 7}
    draws = lower_forward(rich.program[G])
    assert draws.outputs == ("loss", "output_1.output_0", "output_1.output_1.output_0", "output_2")
    assert draws.fixed == {3: "name"}


def test_values_under_their_names(rich: Captured) -> None:
    """Results in results, one tensor returned twice, an input returned: each output is what the forward returns there."""
    inputs = {task: batch(task, 3, 7, torch.float64) for task in TASKS}
    with torch.no_grad():
        reads, draws = read(rich.model, **inputs[U]), draw(rich.model, **inputs[G])
    expected = {
        "logits": reads["logits"],
        "loss": reads["loss"],
        "more.output_0": reads["more"][0],
        "more.output_1.best": reads["more"][1]["best"],
        "more.output_1.same": reads["more"][1]["same"],
    }
    assert_equal(call(lower_forward(rich.program[U]), inputs[U]), expected)
    expected = {
        "loss": draws[0],
        "output_1.output_0": draws[1][0],
        "output_1.output_1.output_0": inputs[G]["codes"],
        "output_2": draws[2],
    }
    assert_equal(call(lower_forward(rich.program[G]), inputs[G]), expected)


def test_rows_of_a_compact_output(two: Captured, accelerated: Any) -> None:
    """They name the rows of the tensor that the whole model returns."""
    for rows, text in SIZES:
        inputs = batch(U, rows, text)
        plan = tg.Plan(exact=True)
        exact = call(lower_forward(two.apply(plan, U).program[U]), inputs)
        whole = tiny.understand(two.model, **inputs)[1]
        index = exact["rows/output_1"]
        assert index.shape == exact["output_1"].shape[:2]
        assert index.shape[1] < whole.shape[1]
        picked = torch.stack([sample[rows] for sample, rows in zip(whole, index, strict=True)])
        torch.testing.assert_close(exact["output_1"], picked, rtol=1e-5, atol=1e-5)


def test_a_size_that_follows_the_batch_is_not_fixed() -> None:
    """A result that is a number and no tensor, but not the same number for every batch: refused, if not kept."""
    spec = tiny.build(layers=1)
    old = spec.tasks[G]

    def sized(model: tiny.Unified, ids: Tensor, codes: Tensor) -> tuple[Tensor, Any]:
        return tiny.generate(model, ids, codes)[0], ids.shape[1]

    captured = Captured.of(
        tg.ModelSpec(spec.model, {G: tg.Task(sized, old.inputs, old.dynamic, visual_inputs=("codes",))})
    )
    try:
        lowered = lower_forward(captured.program[G])
    except tg.TokgraphError:
        return
    assert not any(isinstance(x, torch.SymInt) for x in lowered.fixed.values())


def test_results_are_read_as_the_forward_returns_them(rich: Captured) -> None:
    """``fixed`` and the outputs together are the flat result."""
    inputs = batch(U, 2, 5, torch.float64)
    lowered = lower_forward(rich.program[U])
    tensors = iter(call(lowered, inputs).values())
    count = len(lowered.outputs) + len(lowered.fixed)
    flat = [lowered.fixed[i] if i in lowered.fixed else next(tensors) for i in range(count)]
    result = pytree.tree_unflatten(flat, rich.program[U].out_spec)
    expected = read(rich.model, **inputs)
    assert list(result) == list(expected)
    assert result["about"] == [None, 7]
    torch.testing.assert_close(result["more"][1]["same"], expected["logits"].detach())

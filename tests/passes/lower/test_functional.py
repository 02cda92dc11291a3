"""Graphs as functions for compilers: checks and writes are outputs, tensors are inputs, and blocks can be cut out."""

from __future__ import annotations

import operator

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

import tokgraph as tg
from tests.harness import captured_tiny
from tests.passes.tools import TASKS, traced
from tokgraph import ops
from tokgraph.ir.node import output_args
from tokgraph.ir.program import TaskGraph
from tokgraph.passes.lower.functional import ChecksToOutputs, WritesToOutputs, functional
from tokgraph.passes.lower.pieces import Piece, pieces
from tokgraph.passes.pipeline import Pipeline


def rewritten(task: str, policy: str = "shared") -> TaskGraph:
    captured = captured_tiny(3)
    return captured.apply(tg.make_plan(captured.program, policy, facts=captured.facts), task).program[task]


def code(module: fx.GraphModule) -> str:
    return "".join(f"{node.format_node()}\n" for node in module.graph.nodes if node.op == "call_function")


def test_a_condition_is_computed_beside_its_operator() -> None:
    def chosen(mask: Tensor, x: Tensor) -> Tensor:
        return torch.ops.tokgraph.select(x, torch.ops.tokgraph.rows(mask, 2, True), 1, 0)

    mask = torch.tensor([[True, False, True]])
    graph = Pipeline([ChecksToOutputs()]).run_task(traced(chosen, mask, torch.rand(1, 3, 4)))
    assert_expected_inline(
        code(graph.graph_module),
        """\
%sum_1 : [num_users=1] = call_function[target=torch.ops.aten.sum.dim_IntList](args = (%args_0, [1]), kwargs = {})
%eq : [num_users=1] = call_function[target=torch.ops.aten.eq.Scalar](args = (%sum_1, 2), kwargs = {})
%all_1 : [num_users=1] = call_function[target=torch.ops.aten.all.default](args = (%eq,), kwargs = {})
%rows : [num_users=1] = call_function[target=torch.ops.tokgraph.rows.default](args = (%args_0, 2, True), kwargs = {})
%select : [num_users=1] = call_function[target=torch.ops.tokgraph.select.default](args = (%args_1, %rows, 1, 0), kwargs = {})
""",
    )
    assert graph.graph_module(mask, torch.rand(1, 3, 4))[-1]
    assert ops.conditions()[torch.ops.tokgraph.rows.default].holds(~mask, 2, True).item() is False
    again = Pipeline([ChecksToOutputs(), WritesToOutputs()]).run_task(traced(lambda x: x + 1, mask))
    assert len(output_args(again.graph)) == 1


def test_the_function_computes_what_the_graph_does() -> None:
    for task in TASKS:
        graph = rewritten(task)
        made = functional(graph)
        leaves = graph.flatten(graph.example())
        given = [operator.attrgetter(target)(graph.graph_module) for target in made.tensors]
        assert not made.graph_module.graph.find_nodes(op="get_attr")
        outputs = made.graph_module(*leaves, *given)
        assert len(outputs) == made.outputs + len(made.checks) + len(made.writes)
        assert all(bool(ok) for ok in outputs[made.outputs :])
        for mine, expected in zip(outputs, graph.graph_module(*leaves), strict=False):
            torch.testing.assert_close(mine, expected, rtol=0, atol=0)
        assert {name for _, names in made.checks for name in names} <= set(graph.task.inputs)
    assert any(
        "such tokens" in message and names == ("ids",) for message, names in functional(rewritten(TASKS[0])).checks
    )


def run(cut: list[Piece], values: dict[str, object]) -> dict[str, object]:
    for piece in cut:
        values.update(zip(piece.outputs, piece.graph_module(*(values[n] for n in piece.inputs)), strict=True))
    return values


def test_pieces_together_are_the_whole() -> None:
    graph = rewritten("understanding")
    made = functional(graph)
    names = [node.name for node in made.graph_module.graph.find_nodes(op="placeholder")]
    given = [operator.attrgetter(target)(graph.graph_module) for target in made.tensors]
    start = dict(zip(names, [*graph.flatten(graph.example()), *given], strict=True))
    loss = output_args(made.graph_module.graph)[0].name
    cut = pieces(made.graph_module, "block")
    assert [piece.title for piece in cut] == [
        "what comes before the blocks",
        *(f"block {i}" for i in range(3)),
        "what comes after the blocks",
    ]
    (whole,) = pieces(made.graph_module, "graph")
    assert torch.equal(run(cut, dict(start))[loss], run([whole], dict(start))[loss])


def test_equal_blocks_have_one_key() -> None:
    cut = pieces(functional(rewritten("generation", "none")).graph_module, "block")
    keys = [piece.key() for piece in cut]
    assert len(set(keys)) == 3
    assert keys[1] == keys[2] == keys[3]


def test_blocks_that_differ_have_others() -> None:
    captured = captured_tiny(3)
    plan = tg.Plan((tg.DropSite("generation", 1, 2, 0.5),))
    cut = pieces(functional(captured.apply(plan, "generation").program["generation"]).graph_module, "block")
    keys = [piece.key() for piece in cut]
    assert len(set(keys)) == len(keys)  # rows are dropped at the end of block 0, and put back at the end of block 1

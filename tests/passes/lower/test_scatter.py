"""Scatters by an index against ``masked_scatter``: values, gradients, and too few values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.tools import traced
from tokgraph.passes.lower.functional import functional
from tokgraph.passes.lower.scatter import ScattersByIndex
from tokgraph.passes.pipeline import Pipeline


def by_rows(x: Tensor, marked: Tensor, source: Tensor) -> Tensor:
    return x.masked_scatter(marked.unsqueeze(-1).expand_as(x), source)


def by_values(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return x.masked_scatter(mask, source)


def broadcast(x: Tensor, marked: Tensor, source: Tensor) -> Tensor:
    return x.masked_scatter(marked.unsqueeze(-1), source)


X = torch.rand(2, 5, 3, dtype=torch.float64)
MARKED = torch.tensor([[False, True, True, False, False], [True, False, False, False, True]])
SOURCE = torch.rand(6, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "mask"),
    [(by_rows, MARKED), (broadcast, MARKED), (by_values, torch.rand(2, 5, 3) < 0.4)],
    ids=["rows", "broadcast", "values"],
)
def test_values_and_gradients_are_those_of_the_operator(function: Callable[..., Tensor], mask: Tensor) -> None:
    graph = Pipeline([ScattersByIndex()]).run_task(traced(function, X, mask, SOURCE))
    assert not [n for n in graph.graph.nodes if "masked_scatter" in str(n.target)]
    for marked in (mask, mask.flip(1), torch.zeros_like(mask)):
        found = []
        for run in (function, lambda *args: graph.graph_module(*args)[0]):
            x, source = X.clone().requires_grad_(), SOURCE.clone().requires_grad_()
            y = run(x, marked, source)
            found.append((y.detach(), *torch.autograd.grad((y * y).sum(), (x, source))))
        for mine, expected in zip(*found, strict=True):
            assert torch.equal(mine, expected)


def test_there_may_be_no_values() -> None:
    """A batch without an image."""
    given = (X, torch.zeros_like(MARKED), SOURCE[:0])
    graph = Pipeline([ScattersByIndex()]).run_task(traced(by_rows, *given))
    assert torch.equal(graph.graph_module(*given)[0], X)


def test_too_few_values_are_found() -> None:
    made = functional(traced(by_rows, X, MARKED, SOURCE))
    assert [message for message, _ in made.checks] == [
        "the values to scatter, such as image features, are fewer than the positions that the mask marks for them"
    ]
    assert made.graph_module(X, MARKED, SOURCE)[-1]
    assert not made.graph_module(X, torch.ones_like(MARKED), SOURCE)[-1]


def test_the_graph_of_rows() -> None:
    graph = Pipeline([ScattersByIndex()]).run_task(traced(by_rows, X, MARKED, SOURCE))
    check = torch.ops.tokgraph.check.default
    lines = [n.format_node() for n in graph.graph.nodes if n.op == "call_function" and n.target is not check]
    assert_expected_inline(
        "".join(f"{line}\n" for line in lines),
        """\
%unsqueeze : [num_users=1] = call_function[target=torch.ops.aten.unsqueeze.default](args = (%args_1, -1), kwargs = {})
%expand : [num_users=2] = call_function[target=torch.ops.aten.expand.default](args = (%unsqueeze, [2, 5, 3]), kwargs = {})
%expand_1 : [num_users=1] = call_function[target=torch.ops.aten.expand.default](args = (%expand, [2, 5, 3]), kwargs = {})
%select : [num_users=1] = call_function[target=torch.ops.aten.select.int](args = (%expand_1, 2, 0), kwargs = {})
%view : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%select, [10]), kwargs = {})
%sum_1 : [num_users=1] = call_function[target=torch.ops.aten.sum.default](args = (%view,), kwargs = {})
%mul : [num_users=1] = call_function[target=torch.ops.aten.mul.Tensor](args = (%sum_1, 3), kwargs = {})
%le : [num_users=1] = call_function[target=torch.ops.aten.le.Scalar](args = (%mul, 18), kwargs = {})
%expand_2 : [num_users=1] = call_function[target=torch.ops.aten.expand.default](args = (%expand, [2, 5, 3]), kwargs = {})
%select_1 : [num_users=1] = call_function[target=torch.ops.aten.select.int](args = (%expand_2, 2, 0), kwargs = {})
%view_1 : [num_users=2] = call_function[target=torch.ops.aten.reshape.default](args = (%select_1, [10]), kwargs = {})
%new_zeros : [num_users=1] = call_function[target=torch.ops.aten.new_zeros.default](args = (%args_2, [3]), kwargs = {pin_memory: False})
%view_2 : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%args_2, [18]), kwargs = {})
%cat : [num_users=1] = call_function[target=torch.ops.aten.cat.default](args = ([%new_zeros, %view_2],), kwargs = {})
%view_3 : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%cat, [-1, 3]), kwargs = {})
%cumsum : [num_users=1] = call_function[target=torch.ops.aten.cumsum.default](args = (%view_1, 0), kwargs = {})
%clamp : [num_users=1] = call_function[target=torch.ops.aten.clamp.default](args = (%cumsum, None, 6), kwargs = {})
%unsqueeze_1 : [num_users=1] = call_function[target=torch.ops.aten.unsqueeze.default](args = (%view_1, -1), kwargs = {})
%index_select : [num_users=1] = call_function[target=torch.ops.aten.index_select.default](args = (%view_3, 0, %clamp), kwargs = {})
%view_4 : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%args_0, [-1, 3]), kwargs = {})
%where : [num_users=1] = call_function[target=torch.ops.aten.where.self](args = (%unsqueeze_1, %index_select, %view_4), kwargs = {})
%view_5 : [num_users=1] = call_function[target=torch.ops.aten.reshape.default](args = (%where, [2, 5, 3]), kwargs = {})
""",
    )

"""Rows that are sorted by expert and put back are taken in their own order; sinks and masked rows in plain form."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import tokgraph as tg
from tests.passes.capture.test_batch_axis import plain, random
from tests.passes.tools import assert_well_formed, calls, changes
from tokgraph.passes import GraphPass, Pipeline
from tokgraph.passes.capture.dispatch import RowsInOrder
from tokgraph.passes.capture.masked_rows import MaskedRows
from tokgraph.passes.capture.sinks import SinksToSoftmax


def after(done: GraphPass, before: tg.TaskGraph) -> tg.TaskGraph:
    """The graph after the pass, whose values are the same; a second run finds nothing."""
    found = Pipeline([done]).run_task(before)
    assert_well_formed(found, before)
    inputs = before.flatten(before.example())
    for a, b in zip(found.graph_module(*inputs), before.graph_module(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not done(found.copy().graph_module).modified
    return found


def test_rows_that_are_put_back() -> None:
    def sorted_rows(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        order = groups.argsort()
        rows = x[order // 2].exp()
        return torch.zeros_like(x).index_add(0, order // 2, rows), rows[order.argsort()]

    before = plain(sorted_rows, random(3, 4), torch.tensor([1, 0, 2, 1, 0, 2]))
    assert_expected_inline(
        changes(before, after(RowsInOrder(), before)),
        """\
-%argsort = argsort(%args.2)  # int64[6]
-%floor_divide = floor_divide(%argsort, 2)  # int64[6]
-%index = index.Tensor(%args, [%floor_divide])  # float64[6, 4]
-%exp = exp(%index)  # float64[6, 4]
+%repeat_interleave_self_int = repeat_interleave.self_int(%args, 2, 0)  # float64[6, 4] by rows-in-order
+%exp.2 = exp(%repeat_interleave_self_int)  # float64[6, 4] by rows-in-order
+%reshape = reshape(%exp.2, [3, 2, 4])  # float64[3, 2, 4] by rows-in-order
+%sum_dim_int_list = sum.dim_IntList(%reshape, [1])  # float64[3, 4] by rows-in-order
-%floor_divide.2 = floor_divide(%argsort, 2)  # int64[6]
-%index_add = index_add(%zeros_like, 0, %floor_divide.2, %exp)  # float64[3, 4]
-%argsort.2 = argsort(%argsort)  # int64[6]
-%index.2 = index.Tensor(%exp, [%argsort.2])  # float64[6, 4]
-return [%index_add, %index.2]
+%add_tensor = add.Tensor(%zeros_like, %sum_dim_int_list)  # float64[3, 4] by rows-in-order
+return [%add_tensor, %exp.2]
""",
    )


def test_rows_whose_order_is_read_are_left_alone() -> None:
    def limited(x: Tensor, groups: Tensor) -> tuple[Tensor]:
        order = groups.argsort()
        rows = x[order] * (torch.arange(6) < 4).unsqueeze(-1)
        return (rows[order.argsort()],)

    before = plain(limited, random(6, 4), torch.tensor([1, 0, 2, 1, 0, 2]))
    assert changes(before, after(RowsInOrder(), before)) == ""


def test_sinks() -> None:
    def attend(scores: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([scores, sinks.expand(2, 3, 1)], -1)
        weights = (joined - joined.amax(-1, keepdim=True)).softmax(-1)
        return weights[..., :-1], torch.cat([scores, sinks.expand(2, 3, 1)], -1).softmax(-1)

    before = plain(attend, random(2, 3, 5), random(2, 1, 1))
    assert_expected_inline(
        changes(before, after(SinksToSoftmax(), before)),
        """\
-%expand = expand(%args.2, [2, 3, 1])  # float64[2, 3, 1]
-%cat = cat([%args, %expand], -1)  # float64[2, 3, 6]
-%amax = amax(%cat, [-1], True)  # float64[2, 3, 1]
-%sub = sub.Tensor(%cat, %amax)  # float64[2, 3, 6]
-%softmax = softmax.int(%sub, -1)  # float64[2, 3, 6]
-%slice = slice.Tensor(%softmax, 2, 0, -1)  # float64[2, 3, 5]
+%softmax_beside = softmax_beside(%args, %args.2, None)  # float64[2, 3, 5] by sinks-to-softmax
-return [%slice, %softmax.2]
+return [%softmax_beside, %softmax.2]
""",
    )


def test_masked_rows() -> None:
    def again(x: Tensor, mask: Tensor, y: Tensor) -> tuple[Tensor]:
        x = x.clone()
        x[mask] = x[mask] + 2 * y
        return (x,)

    before = plain(again, random(2, 3, 4), torch.tensor([[True, False, True], [False, False, True]]), random(3, 4))
    found = Pipeline([MaskedRows()]).run_task(before)
    inputs = before.flatten(before.example())
    torch.testing.assert_close(found.graph_module(*inputs), before.graph_module(*inputs), rtol=1e-12, atol=1e-12)
    assert not calls(found, torch.ops.aten.index_put.default)
    with pytest.raises(tg.BatchError, match="does not choose as many rows"):
        found.graph_module(inputs[0], torch.ones(2, 3, dtype=torch.bool), inputs[2])

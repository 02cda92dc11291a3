"""Masks over elements that choose whole rows are masks over rows; rows that stand for several are followed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import Tensor

import tokgraph as tg
from tests.passes.capture.test_batch_axis import plain, random
from tests.passes.capture.test_dispatch import after
from tests.passes.tools import calls, changes
from tokgraph.passes import Pipeline
from tokgraph.passes.capture.normalize import RemoveAssertions
from tokgraph.passes.capture.routed_rows import RoutedRows
from tokgraph.passes.capture.whole_rows import WholeRows
from tokgraph.passes.simplify.taken import TakeRoutedRows, routed


def counted(function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tg.TaskGraph:
    """The graph of a function that counts rows, without what export asserts of the counts."""
    return Pipeline([RemoveAssertions()]).run_task(plain(function, *args))


def same_values(after: tg.TaskGraph, before: tg.TaskGraph) -> None:
    inputs = before.flatten(before.example())
    for a, b in zip(after.graph_module(*inputs), before.graph_module(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


MASK = torch.tensor([[True, False, True], [False, False, True]])


def test_masks_over_elements() -> None:
    def elements(x: Tensor, mask: Tensor) -> tuple[Tensor]:
        wide = ~mask.unsqueeze(-1).expand(2, 3, 4)
        out = torch.zeros_like(x)
        out[wide] = x[wide].view(-1, 4).exp().flatten()
        return (out,)

    before = counted(elements, random(2, 3, 4), MASK)
    assert_expected_inline(
        changes(before, after(WholeRows(), before)),
        """\
-%unsqueeze = unsqueeze(%args.2, -1)  # bool[2, 3, 1]
-%expand = expand(%unsqueeze, [2, 3, 4])  # bool[2, 3, 4]
-%bitwise_not = bitwise_not(%expand)  # bool[2, 3, 4]
+%bitwise_not.2 = bitwise_not(%args.2)  # bool[2, 3] by whole-rows
+%index_tensor = index.Tensor(%args, [%bitwise_not.2])  # float64[u3, 4] by whole-rows
-%index = index.Tensor(%args, [%bitwise_not])  # float64[u0]
-%sym_size_int = sym_size.int(%index, 0)  # u0
-%floordiv = %sym_size_int // 4  # (u0//4)
-%mul = 4 * %floordiv  # 4*((u0//4))
-%view = reshape(%index, [-1, 4])  # float64[(u0//4), 4]
-%exp = exp(%view)  # float64[(u0//4), 4]
-%view.2 = reshape(%exp, [%mul])  # float64[4*((u0//4))]
-%index_put = index_put(%zeros_like, [%bitwise_not], %view.2)  # float64[2, 3, 4]
-return [%index_put]
+%exp = exp(%index_tensor)  # float64[u3, 4]
+%index_put.2 = index_put(%zeros_like, [%bitwise_not.2], %exp)  # float64[2, 3, 4] by whole-rows
+return [%index_put.2]
""",
    )


def test_masks_that_do_not_choose_whole_rows_are_left_alone() -> None:
    def some(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = mask.unsqueeze(-1).expand(2, 3, 4)
        columns = features.expand(2, 3, 4)
        return x[rows & columns], x[columns], x[rows].view(4, -1)

    before = counted(some, random(2, 3, 4), MASK, torch.tensor([True, False, True, True]))
    assert changes(before, after(WholeRows(), before)) == ""


def test_rows_that_stand_for_several() -> None:
    def chosen(x: Tensor, mask: Tensor) -> tuple[Tensor]:
        rows = x[mask]
        weights, ways = rows.softmax(-1).topk(2)
        several = rows.repeat_interleave(2, 0) * ways.flatten().unsqueeze(1)
        out = torch.zeros_like(x)
        out[mask] = (several * weights.flatten().unsqueeze(1)).view(-1, 2, 4).sum(1)
        return (out,)

    before = counted(chosen, random(2, 3, 4), MASK)
    found = Pipeline([RoutedRows()]).run_task(before)
    assert calls(found, routed)
    assert not calls(found, torch.ops.aten.index_put.default)
    taken = Pipeline([TakeRoutedRows()]).run_task(found)  # of values that a router gives beside others, too
    assert not calls(taken, routed)
    for graph in (found, taken):
        same_values(graph, before)


def test_rows_that_are_mixed_among_the_several_are_left_alone() -> None:
    def mixed(x: Tensor, mask: Tensor) -> tuple[Tensor]:
        several = x[mask].repeat_interleave(2, 0).cumsum(0)
        out = torch.zeros_like(x)
        out[mask] = several.view(-1, 2, 4).sum(1)
        return (out,)

    before = counted(mixed, random(2, 3, 4), MASK)
    assert changes(before, after(RoutedRows(), before)) == ""

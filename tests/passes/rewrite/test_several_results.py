"""Push-down through operators with several results: rows are taken of each, never of all at once."""

from __future__ import annotations

import operator

import torch
from torch import fx

from tests.passes.programs import Program, rows
from tokgraph.ir.node import tensor, value
from tokgraph.passes.rewrite import PushDown

aten = torch.ops.aten


def ordered() -> tuple[Program, fx.Node, fx.Node, fx.Node]:
    """A program with the two largest features of every row, and indices of some rows and of some of these."""
    p = Program()
    x, few, fewer = (
        p.input("x", torch.rand(2, 4, 3)),
        p.input("few", rows([0, 2, 3], [0, 1, 3])),
        p.input("fewer", rows([0, 2], [1, 2])),
    )
    top = p(aten.topk.default, x, 2)
    return p, top, few, fewer


def assert_pushed_down_is_equal(p: Program, module: fx.GraphModule) -> None:
    expected = module(*p.inputs)
    PushDown()(module)
    for a, b in zip(module(*p.inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_rows_of_one_result_where_another_one_is_read_whole() -> None:
    """Values and places of an order: nothing can be taken of both at once."""
    p, top, few, fewer = ordered()
    values, places = (p(operator.getitem, top, i) for i in (0, 1))
    module = p.module(p.select(values, few), p.select(p.select(places, few), fewer), places)
    assert_pushed_down_is_equal(p, module)
    assert tensor(values).shape == (2, 4, 2)  # type: ignore[union-attr]


def test_results_of_which_the_same_rows_are_read_are_made_of_these_alone() -> None:
    p, top, few, fewer = ordered()
    values, places = (p.select(p(operator.getitem, top, i), few) for i in (0, 1))
    module = p.module(values, p.select(places, fewer))
    assert_pushed_down_is_equal(p, module)
    assert [x.shape for x in value(next(n for n in module.graph.nodes if n.target is aten.topk.default))] == [
        (2, 3, 2)
    ] * 2

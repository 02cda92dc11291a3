"""Demand: which selections all readers of a value share, how far each goes, and why it stops there."""

from __future__ import annotations

import operator

import pytest
import torch

from tests.passes.programs import Program, rows
from tests.passes.tools import captured, node, site
from tokgraph.passes.rewrite.wants import (
    Along,
    Declined,
    common,
    commute,
    selections,
    through_restore,
    through_selection,
)

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
ROWS, HEADS = Along(1, 0), Along(2, 0)


class Inputs(Program):
    """``x`` and ``y`` ``[2, 4, 3]``, indices ``i`` (3 rows), ``j`` and ``k`` (2 rows), values without batch."""

    def __init__(self, batch: int = 2) -> None:
        super().__init__()
        self.x, self.y = self.input("x", torch.rand(batch, 4, 3)), self.input("y", torch.rand(batch, 4, 3))
        self.i = self.input("i", rows(*([0, 2, 3],) * batch))
        self.j, self.k = (self.input(name, rows(*([0, 1],) * batch)) for name in "jk")
        self.bias, self.one = self.input("bias", torch.rand(4, 3)), self.input("one", torch.rand(1, 4, 3))


@pytest.fixture
def p() -> Inputs:
    return Inputs()


def test_the_longest_common_prefix_axis_by_axis(p: Inputs) -> None:
    i, j, k = p.i, p.j, p.k
    assert common([{ROWS: (i, j)}]) == {ROWS: (i, j)}
    assert common([{ROWS: (i, j)}, {ROWS: (i, k)}]) == {ROWS: (i,)}
    assert common([{ROWS: (i, j)}, {ROWS: (i,)}, {ROWS: (i, j, k)}]) == {ROWS: (i,)}
    assert common([{ROWS: (i,)}, {ROWS: (j,)}]) == {}
    assert common([{ROWS: (i,)}, {}]) == {}
    assert common([{ROWS: (i,), HEADS: (j,)}, {HEADS: (j, k)}]) == {HEADS: (j,)}


def test_a_selection_puts_its_index_first(p: Inputs) -> None:
    chosen = p.select(p.x, p.i)
    assert through_selection(chosen, {}) == (p.x, {ROWS: (p.i,)})
    assert through_selection(chosen, {ROWS: (p.j,), HEADS: (p.k,)}) == (p.x, {ROWS: (p.i, p.j), HEADS: (p.k,)})
    assert through_selection(p(tokgraph.drop.default, p.x, p.i), {ROWS: (p.j,)}) == (p.x, {ROWS: (p.i, p.j)})


def test_a_restore_takes_its_own_index_off(p: Inputs) -> None:
    kept = p.select(p.y, p.i)
    whole = p(tokgraph.restore.default, p.x, kept, p.i)
    assert through_restore(whole, {ROWS: (p.i,)}) == (kept, {})
    assert through_restore(whole, {ROWS: (p.i, p.j), Along(2, 0): (p.k,)}) == (
        kept,
        {ROWS: (p.j,), Along(2, 0): (p.k,)},
    )
    assert through_restore(whole, {ROWS: (p.j, p.i)}) is None
    assert through_restore(whole, {}) is None


def test_rowwise_operators_pass_a_selection_on(p: Inputs) -> None:
    assert commute(p(aten.relu.default, p.x), ROWS) == [(p.x, ROWS)]
    assert commute(p(aten.add.Tensor, p.x, p.y), ROWS) == [(p.x, ROWS), (p.y, ROWS)]
    assert commute(p(aten.transpose.int, p.x, 1, 2), Along(2, 0)) == [(p.x, ROWS)]
    assert commute(p(aten.layer_norm.default, p.x, [3]), ROWS) == [(p.x, ROWS)]


def test_values_without_a_batch_are_to_be_lifted(p: Inputs) -> None:
    """The axes are meant as in the reader, and so is the rank."""
    lifted = Along(1, 0, 3)
    assert commute(p(aten.mul.Tensor, p.x, p.bias), ROWS) == [(p.x, ROWS), (p.bias, lifted)]
    assert commute(p(aten.mul.Tensor, p.x, p.one), ROWS) == [(p.x, ROWS), (p.one, lifted)]


def test_a_batch_of_one_needs_no_lift() -> None:
    p = Inputs(batch=1)
    assert commute(p(aten.mul.Tensor, p.x, p.one), ROWS, one_sample=True) == [(p.x, ROWS), (p.one, ROWS)]


def test_masks_of_attention_are_lifted(p: Inputs) -> None:
    heads, mask = p(aten.unsqueeze.default, p.x, 1), p.input("mask", torch.rand(4, 4))
    attention = p(aten.scaled_dot_product_attention.default, heads, heads, heads, mask)
    assert commute(attention, HEADS) == Declined(attention.name, f"{attention.target} reads one value along two axes")
    other = p(aten.unsqueeze.default, p.y, 1)
    attention = p(aten.scaled_dot_product_attention.default, other, heads, heads, mask)
    assert commute(attention, HEADS) == [(other, HEADS), (mask, Along(2, 0, 4))]


@pytest.mark.parametrize(
    ("make", "along", "reason"),
    [
        (lambda p: p.x, ROWS, "an input of the task"),
        (lambda p: p(aten.cumsum.default, p.x, 1), ROWS, "mixes rows"),
        (lambda p: p(aten.renorm.default, p.x, 2.0, 0, 1.0), ROWS, "has no token-axis rule"),
        (lambda p: p(aten.ones.default, [2, 4, 3]), ROWS, "makes the axis"),
        (lambda p: p(aten.matmul.default, p.x, p(aten.transpose.int, p.x, 1, 2)), ROWS, None),
        (lambda p: p(aten.matmul.default, p.x, p.input("w", torch.rand(3, 5))), ROWS, None),
        (lambda p: p(aten.relu.default, p.one), ROWS, "no batch axis of its own"),
        (lambda p: p(aten.relu.default, p.x), Along(1, 0, 3), "no batch axis of its own"),
        (lambda p: p(aten.linear.default, p.bias, p.input("w", torch.rand(5, 3))), Along(0, 0), None),
    ],
    ids=["input", "scan", "unruled", "made", "self product", "weight", "one sample", "lift", "no batch"],
)
def test_why_a_selection_stops(p: Inputs, make: object, along: Along, reason: str | None) -> None:
    node = make(p)  # type: ignore[operator]
    passed = commute(node, along)
    if reason is None:
        assert not isinstance(passed, Declined)
    else:
        assert isinstance(passed, Declined)
        assert passed.node == node.name
        assert reason in passed.reason


def test_results_of_one_shape_are_narrowed_together(p: Inputs) -> None:
    result = p(aten.max.dim, p.x, 2)
    assert commute(p(operator.getitem, result, 0), ROWS) == [(result, ROWS)]
    assert commute(result, ROWS) == [(p.x, ROWS)]
    normed = p(aten.native_layer_norm.default, p.x, [3], None, None, 1e-5)  # with its mean, of another shape
    assert isinstance(commute(p(operator.getitem, normed, 0), ROWS), Declined)


# ------------------------------------------------------------------ whole graphs


def test_what_a_graph_shares(p: Inputs) -> None:
    h = p(aten.relu.default, p.x)
    g = p(aten.exp.default, h)
    first = p.select(g, p.i)
    p.graph.output((first, p.select(p.select(h, p.i), p.j)))
    found = selections(p.graph)
    assert found.own[h] == {ROWS: (p.i,)}
    assert found.own[g] == {ROWS: (p.i,)}
    assert found.inputs[g] == {h: {ROWS: (p.i,)}}
    assert found.live == {
        first,
        g,
        h,
        p.x,
        p.i,
        p.j,
        *(n for n in p.graph.nodes if n.target is tokgraph.select.default),
    }
    assert [d.node for d in found.declined] == ["x"]


def test_an_input_wanted_twice_differently_stops_both(p: Inputs) -> None:
    """``h + h.transpose`` would need rows i of h along one axis and of another along the other."""
    square = p.input("square", torch.rand(2, 4, 4))
    h = p(aten.relu.default, square)
    out = p(aten.add.Tensor, h, p(aten.transpose.int, h, 1, 2))
    p.graph.output((p.select(out, p.i),))
    found = selections(p.graph)
    assert found.own[h] == {}
    assert found.own[out] == {ROWS: (p.i,)}


def test_restores_that_are_read_whole_are_kept(p: Inputs) -> None:
    whole = p(tokgraph.restore.default, p.x, p.select(p.y, p.i), p.i)
    p.graph.output((p.select(whole, p.i), p(aten.relu.default, whole)))
    assert selections(p.graph).kept_restores == {whole}


def test_nothing_is_live_behind_a_cancelled_restore(p: Inputs) -> None:
    """The rows around are not needed, nor what made them."""
    around = p(aten.relu.default, p.x)
    whole = p(tokgraph.restore.default, around, p(aten.exp.default, p.select(p.y, p.i)), p.i)
    p.graph.output((p.select(whole, p.i),))
    found = selections(p.graph)
    assert found.kept_restores == set()
    assert around not in found.live


def test_a_graph_is_only_read() -> None:
    graph = captured().seeded(site(0, 1), exact=True)
    before = str(graph.graph)
    selections(graph.graph)
    assert str(graph.graph) == before


def test_where_the_selections_of_a_model_stop() -> None:
    """Nowhere inside the span but at the mask's expansion; the stream before it is read whole by the restore."""
    found = captured()
    seeded = found.seeded(site(0, 1))
    stops = selections(seeded.graph)
    assert {node(seeded, d.node).target for d in stops.declined} == {aten.expand.default}
    assert stops.own[node(seeded, found.facts.blocks[0].start)] == {}
    inside = [node(seeded, name) for name in found.facts.blocks[0].nodes]
    assert all(stops.own[n] for n in inside)

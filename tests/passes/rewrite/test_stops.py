"""Why selections stop: every value at which one does, and nothing else; reasons that are true."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import fx

from tests.passes.programs import Drawn, programs
from tests.passes.rewrite.test_wants import Inputs
from tests.passes.tools import captured
from tokgraph.ir.printer import operator_name
from tokgraph.passes.emitter import is_selection, remove_dead_code
from tokgraph.passes.rewrite import PushDown
from tokgraph.passes.rewrite.stops import stops

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


@pytest.fixture
def p() -> Inputs:
    return Inputs()


def told(graph: fx.Graph) -> list[tuple[str, str]]:
    """What computes each value at which a selection stops, and why it stops."""
    return [(operator_name(stop.value.target), stop.reason) for stop in stops(graph)]


def test_an_operator_stops_a_selection(p: Inputs) -> None:
    mixed = p(aten.cumsum.default, p(aten.relu.default, p.x), 1)
    p.graph.output((p.select(p(aten.exp.default, mixed), p.i),))
    (stop,) = stops(p.graph)
    assert (stop.value, stop.blockers, stop.end) == (mixed, (mixed,), False)
    assert stop.reason == "aten.cumsum.default mixes rows"


def test_a_selection_may_reach_the_inputs(p: Inputs) -> None:
    """Which is no failure, and said apart."""
    p.graph.output((p.select(p(aten.add.Tensor, p.x, p.bias), p.i),))
    assert [(s.value, s.reason, s.end) for s in stops(p.graph)] == [
        (p.x, "an input of the task", True),
        (p.bias, "an input of the task", True),
    ]


def test_readers_that_want_other_rows(p: Inputs) -> None:
    """The one that agrees the longest is the nearest miss; what it needs the rows for is followed down."""
    h = p(aten.relu.default, p(aten.cumsum.default, p.x, 1))
    deep = p(aten.exp.default, p.select(p.select(h, p.i), p.j))
    near = p(aten.neg.default, p.select(h, p.i))
    far = p(aten.cumsum.default, p(aten.sin.default, h), 1)
    p.graph.output((deep, near, far))
    (stop,) = [s for s in stops(p.graph) if s.value is h]
    assert stop.blockers == (near, far)
    assert stop.reason == "neg reads more rows of it"


def test_readers_of_different_choices(p: Inputs) -> None:
    h = p(aten.relu.default, p.x)
    first, second = (p(aten.exp.default, p.select(h, index)) for index in (p.j, p.k))
    p.graph.output((first, second))
    (stop,) = [s for s in stops(p.graph) if s.value is h]
    assert stop.blockers == (second,)
    assert stop.reason == "exp reads other rows of it"


def test_the_output_needs_a_value_whole(p: Inputs) -> None:
    """As logits returned beside a loss that reads some of their rows."""
    logits = p(aten.relu.default, p.x)
    p.graph.output((p.select(logits, p.i), logits))
    assert told(p.graph) == [("relu", "the task's output needs all its rows")]


def test_what_needs_the_rows_is_followed_to_where_they_are_mixed(p: Inputs) -> None:
    h = p(aten.relu.default, p.x)
    keys = p(aten.transpose.int, p(aten.exp.default, h), 1, 2)
    p.graph.output((p(aten.matmul.default, p.select(h, p.i), keys),))
    (stop,) = [s for s in stops(p.graph) if s.value is h]
    assert stop.reason == "the task's output needs all its rows"  # by row, as the columns of the product
    p = Inputs()
    h = p(aten.relu.default, p.x)
    mixed = p(aten.cumsum.default, p(aten.exp.default, h), 1)
    p.graph.output((p.select(h, p.i), p.select(mixed, p.i)))
    assert told(p.graph) == [("relu", "cumsum needs all its rows"), ("cumsum", "aten.cumsum.default mixes rows")]


def test_what_needs_a_value_without_a_batch(p: Inputs) -> None:
    """Its axes are counted as in the values that it is added to."""
    bias = p(aten.neg.default, p.bias)
    first = p.select(p(aten.add.Tensor, p.x, bias), p.i)
    second = p(aten.cumsum.default, p(aten.mul.Tensor, p.y, bias), 1)
    p.graph.output((first, second))
    (stop,) = [s for s in stops(p.graph) if s.value is bias]
    assert stop.reason == "cumsum needs all its rows"


def test_a_restore_that_is_read_whole(p: Inputs) -> None:
    """What lies around it is needed whole, and so are the rows that it puts back."""
    h = p(aten.relu.default, p.x)
    kept = p(aten.exp.default, p.select(h, p.i))
    whole = p(tokgraph.restore.default, h, kept, p.i)
    p.graph.output((p(aten.cumsum.default, whole, 1), p.select(p.select(whole, p.i), p.j)))
    assert told(p.graph) == [
        ("relu", "a restore puts rows back into it, for cumsum"),
        ("exp", "a restore puts its rows back, for cumsum"),
    ]


def test_a_restore_of_other_rows(p: Inputs) -> None:
    whole = p(tokgraph.restore.default, p.x, p.select(p.y, p.i), p.i)
    p.graph.output((p.select(whole, p.j),))
    found = stops(p.graph)
    assert [(s.value, s.reason) for s in found if s.value is whole] == [
        (whole, "it does not put the selected rows back, but others")
    ]


def test_a_restore_of_which_other_rows_are_read(p: Inputs) -> None:
    """What lies around it stays whole for the sake of that reader."""
    h = p(aten.relu.default, p.x)
    whole = p(tokgraph.restore.default, h, p.select(p.y, p.i), p.i)
    p.graph.output((p(aten.exp.default, p.select(whole, p.j)), p.select(h, p.i)))
    (stop,) = [s for s in stops(p.graph) if s.value is h]
    assert stop.reason == "a restore puts rows back into it, for exp"


def test_an_index_says_which_rows(p: Inputs) -> None:
    index = p(aten.add.Tensor, p.i, 0)
    chosen = p.select(p.x, index)
    p.graph.output((chosen, p(tokgraph.select.default, index, p.j, 1, 0)))
    assert ("add.Tensor", "it says which rows a selection takes") in told(p.graph)


def test_selections_that_reach_all_they_can_stop_nowhere_else() -> None:
    """On the tiny model: at attention, which needs all keys, and where a mask is made."""
    found = captured("understanding", layers=2)
    reasons = {reason for _, reason in told(found.seeded(exact=True).graph)}
    assert reasons == {
        "aten.tril.default has no token-axis rule",
        "scaled_dot_product_attention needs all its rows",
    }


def test_a_graph_without_selections_has_no_stops() -> None:
    assert stops(captured().graph.graph) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs())
def test_stops_are_where_push_down_leaves_selections(drawn: Drawn) -> None:
    """Exactly there: no stop is missing, and none is made up."""
    graph = drawn.module.graph
    remove_dead_code(graph)
    known = {n.name for n in graph.nodes}
    expected = {stop.value.name for stop in stops(graph)}
    pushed = PushDown()(drawn.module).graph_module.graph
    assert {_selected_from(n, known) for n in pushed.nodes if is_selection(n)} == expected


def _selected_from(node: fx.Node, known: set[str]) -> str:
    """The value of the graph before that a selection takes rows from, through others and what gives it a batch axis."""
    while is_selection(node) or node.name not in known:
        node = node.args[0]  # type: ignore[assignment]
    return node.name

"""Fake values of many calls: alike ones are run once, and what must not be shared is not."""

import gc
from collections import Counter

import pytest
import torch

from tests.passes.tools import captured, site, traced
from tokgraph.ir import values
from tokgraph.ir.collector import collector_paused
from tokgraph.ir.node import refresh_value, tensor
from tokgraph.ir.values import Values

aten = torch.ops.aten


def calls(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


@pytest.fixture
def computed(monkeypatch) -> Counter:
    """How often each operator was run on fake values."""
    ran: Counter = Counter()
    run = values.computed

    def counting(node, mode):
        ran[node.target] += 1
        return run(node, mode)

    monkeypatch.setattr(values, "computed", counting)
    return ran


def ran_at_depth(layers: int, computed: Counter) -> Counter:
    computed.clear()
    captured("generation", layers).rewritten(site(1, layers - 1))
    return Counter(computed)


def test_more_blocks_do_not_run_more_calls(computed):
    shallow, deep = (ran_at_depth(layers, computed) for layers in (4, 6))
    assert shallow[aten.linear.default] > 0
    assert shallow == deep


@pytest.mark.slow
def test_a_walk_gives_what_calls_give_one_by_one():
    module = captured("generation", 2, dynamic=True).rewritten(site(0, 1)).graph_module
    walk = Values(module.graph)
    for node in calls(module.graph):
        walk.refresh(node)
        shared = node.meta["val"]
        refresh_value(node)
        if tensor(node) is not None and isinstance(shared, torch.Tensor):
            alone = node.meta["val"]
            assert (shared.shape, shared.stride(), shared.dtype) == (alone.shape, alone.stride(), alone.dtype), node


def test_what_symbols_are_made_of_is_not_shared():
    """Two masks of the same shape hide different rows: a fake mask remembers the number of rows that it shows."""
    graph = traced(lambda x: ((x > 0).nonzero() + 0, (x > 1).nonzero() + 0), torch.rand(5)).graph
    for node in calls(graph):  # of the same operator with arguments of the same shape, so that only the reader tells
        if node.target is aten.gt.Scalar:
            node.update_arg(1, 0)
    walk, found = Values(graph), graph.find_nodes(op="call_function", target=aten.nonzero.default)
    with found[0].meta["val"].fake_mode.shape_env.ignore_fresh_unbacked_symbols():
        for node in calls(graph):
            walk.refresh(node)
    first, second = (node.meta["val"].shape[0].node.expr for node in found)
    assert first != second


def test_numbers_of_different_types_are_not_alike():
    graph = traced(lambda x: (x + 1, x + 1.0), torch.arange(3)).graph
    walk = Values(graph)
    for node in calls(graph):
        walk.refresh(node)
    dtypes = [node.meta["val"].dtype for node in graph.find_nodes(op="call_function", target=aten.add.Tensor)]
    assert dtypes == [torch.int64, torch.float32]


def test_the_collector_goes_on_as_before():
    @collector_paused()
    def failing() -> None:
        assert not gc.isenabled()
        raise ValueError("stop")

    assert gc.isenabled()
    with pytest.raises(ValueError, match="stop"):
        failing()
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

"""Nodes are sorted in place, into the order that PyTorch gives them in a new graph."""

from __future__ import annotations

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.fx.passes.tools_common import stable_topological_sort

from tokgraph.passes.order import sort_nodes

EDGES = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.integers(0, n), max_size=2), min_size=n, max_size=n), st.permutations(range(n))
    )
)


def shuffled(reads: list[list[int]], order: list[int]) -> fx.Graph:
    """A graph of additions, each of earlier ones (0 is the input), then moved."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for i, of in enumerate(reads):
        nodes.append(graph.call_function(torch.stack, ([nodes[min(j, i)] for j in of],)))
    graph.output(nodes[-1])
    last = nodes[0]
    for i in order:
        last.append(nodes[i + 1])
        last = nodes[i + 1]
    return graph


@given(EDGES)
def test_the_order_is_pytorchs(made: tuple[list[list[int]], list[int]]) -> None:
    graph = shuffled(*made)
    expected = stable_topological_sort(fx.GraphModule({}, shuffled(*made))).graph
    before = set(graph.nodes)
    sort_nodes(graph)
    assert [str(node) for node in graph.nodes] == [str(node) for node in expected.nodes]
    assert set(graph.nodes) == before
    graph.lint()


def test_circles_are_refused() -> None:
    graph = shuffled([[0], [1]], [0, 1])
    _, first, second, _ = graph.nodes
    first.args = ([second],)
    with pytest.raises(networkx.NetworkXUnfeasible):
        sort_nodes(graph)

"""Axes that index the same positions, followed by rules and never by size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests.passes import models
from tests.passes.tools import captured, node, placeholders, traced
from tokgraph.errors import InternalError
from tokgraph.passes.analysis.axes import AxisClasses

N = 4  # batch, tokens, hidden size and number of heads alike


def eager_attention(x: Tensor, bias: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2) / math.sqrt(x.shape[-1]) + bias
    return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


def test_equal_sizes_do_not_join_axes() -> None:
    """Every axis has size 4; the token axis is told from batch and features all the same."""
    graph = traced(lambda x, w: (F.linear(F.layer_norm(x, (N,)), w) + x,), torch.rand(N, N, N), torch.rand(N, N))
    classes = AxisClasses(graph.graph)
    x, w = placeholders(graph.graph)
    out = graph.graph.output_node().args[0][0]
    for axis in range(3):
        for other in range(3):
            assert classes.same((x, axis), (out, other)) == (axis == other)
    assert not classes.same((w, 0), (x, 1))
    assert not classes.same((w, 1), (x, 1))


def test_query_and_key_axes_are_one_class() -> None:
    graph = traced(lambda x, b: (eager_attention(x, b),), torch.rand(2, 5, 8), torch.rand(5, 5))
    classes = AxisClasses(graph.graph)
    x, bias = placeholders(graph.graph)
    softmax = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.softmax.int)
    members = classes.members((x, 1))
    assert members[softmax] == (2, 3)
    assert members[bias] == (0, 1)
    assert members[x] == (1,)
    out = graph.graph.output_node().args[0][0]
    assert members[out] == (1,)


def test_broadcast_axes_index_nothing() -> None:
    """One row broadcast to two values does not join their token axes."""
    graph = traced(lambda x, y, one: (x + one, y + one), torch.rand(2, 3, 4), torch.rand(2, 5, 4), torch.rand(2, 1, 4))
    classes = AxisClasses(graph.graph)
    x, y, one = placeholders(graph.graph)
    assert not classes.same((x, 1), (y, 1))
    assert not classes.same((x, 1), (one, 1))
    assert classes.same((x, 2), (y, 2))


def test_batches_of_one_do_not_join_rows() -> None:
    graph = traced(lambda x, y: (x * 2 + y,), torch.rand(1, 3), torch.rand(1, 3))
    classes = AxisClasses(graph.graph)
    x, y = placeholders(graph.graph)
    assert classes.same((x, 1), (y, 1))
    assert not classes.same((x, 0), (x, 1))


def test_slices_and_merged_axes_begin_new_classes() -> None:
    graph = traced(lambda x: (x[:, 1:], x.flatten(0, 1)), torch.rand(2, 3, 4))
    classes = AxisClasses(graph.graph)
    (x,) = placeholders(graph.graph)
    cut, merged = graph.graph.output_node().args[0]
    assert not classes.same((cut, 1), (x, 1))
    assert classes.same((cut, 0), (x, 0))
    assert not classes.same((merged, 0), (x, 1))
    assert classes.same((merged, 1), (x, 2))


def test_a_scatter_keeps_positions_though_it_mixes_rows() -> None:
    found = captured("understanding")
    classes = AxisClasses(found.graph.graph)
    ids = node(found.graph, "ids")
    entry = node(found.graph, found.facts.entry)
    assert entry.target is torch.ops.aten.masked_scatter.default
    assert classes.same((ids, 1), (entry, 1))


def test_sizes_that_contradict_the_rules_are_a_bug_of_ours() -> None:
    graph = traced(lambda x: ((x + 1).relu(),), torch.rand(2, 3))
    (x,) = placeholders(graph.graph)
    out = graph.graph.output_node().args[0][0]
    out.meta["val"] = torch.empty(2, 7, device="meta")
    with pytest.raises(InternalError, match=f"axis 1 of {out.name} was followed to an axis of another size"):
        AxisClasses(graph.graph).members((x, 1))


@pytest.mark.parametrize("hidden", [models.TOKENS, models.IMAGE, 2])
def test_the_token_axis_of_a_model_whose_sizes_coincide(hidden: int) -> None:
    """The hidden size is the number of tokens, of image tokens, or of samples."""
    program = tg.capture(models.spec(models.Eager, hidden=hidden, depth=1))
    (facts,) = tg.analyze(program).values()
    graph = program["t"]
    softmax = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.softmax.int)
    for name, axes in facts.token_axes.items():
        shape = node(graph, name).meta["val"].shape
        if len(shape) == 3 and shape[0] == 2:
            assert axes == (1,), name
    assert facts.token_axes[softmax.name] == (2, 3)
    assert not [name for name in facts.token_axes if name.endswith(("weight", "bias"))]

"""The dimensions and rows that published formulas read, read off graphs."""

from __future__ import annotations

import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, by_name, dims
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.sizes import expression
from tokgraph.passes.cost.pathways import pathways

from .published_flops import Rows, Shape

LINEAR = "aten.linear.default"


def published_shape(task: TaskFacts, graph: TaskGraph, tokens: int, visual: int) -> Shape:
    """The dimensions that published formulas read; the feed-forward width is what the block's last linear layer takes.

    Raises:
        AnalysisError: a block has no linear layer.
    """
    nodes = by_name(graph.graph)
    linear = [n for name in task.blocks[0].nodes if str((n := nodes[name]).target) == LINEAR]
    if not linear:
        raise AnalysisError(
            f"task {task.name!r}: block 0 has no linear layer, so published formulas do not fit it",
            help="use --flops-convention exact",
        )
    hidden, intermediate = dims(nodes[task.entry])[-1], dims(argument(linear[-1], "weight"))[1]
    return Shape(len(task.blocks), int(hidden), int(intermediate), tokens, visual)


def planned_rows(task: TaskFacts, rewritten: TaskGraph, shape: Shape) -> Rows:
    """Rows that the blocks of a rewritten graph work on: text counts whole, as in the papers."""
    visual = pathways(rewritten, task).tokens_per_block
    nodes = by_name(rewritten.graph)
    lengths = [_keys(nodes[block.attention[0].node], task, shape) for block in task.blocks if block.attention]
    rows = tuple(shape.text + found for found in visual)
    keys = lengths if len(lengths) == len(rows) else [float(shape.tokens)] * len(rows)
    return Rows(rows, tuple(max(k, r) for k, r in zip(keys, rows, strict=True)), visual)


def _keys(attention: fx.Node, task: TaskFacts, shape: Shape) -> float:
    """Keys of an attention: the example's, and the text that other sizes have more."""
    assert task.cost.sizes is not None
    fused = attention.target is torch.ops.aten.scaled_dot_product_attention.default
    size = expression(dims(argument(attention, "key"))[-2] if fused else dims(attention)[-1])
    return float(size.xreplace(task.cost.sizes.values(tokens=shape.tokens)))

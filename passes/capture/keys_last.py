"""Scores of attention in the order that fused attention has: queries, then keys, on the last two axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, axis_argument, dims, rank, same_size

from ..contract import GraphPass
from ..emitter import Emitter
from ..rules.registry import first_input

aten = torch.ops.aten


@dataclass(frozen=True)
class KeysLast(GraphPass):
    """Scores that lie otherwise, as ``[batch, tokens, keys, heads]`` or ``[batch, tokens, heads, keys]``, are turned for their
    softmax, and back: two views. Which axis has the queries is told by its length, which is that of the keys; what follows
    looks whether it is theirs.
    """

    name: ClassVar[str] = "keys-last"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Turn the operand of every such softmax."""
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        for node in list(graph.nodes):
            order = _order(node) if node.target is aten.softmax.int and rank(node) > 2 else None
            if order is not None:
                turned = emit.call(aten.permute.default, first_input(node), order, origin=node)
                made = emit.call(aten.softmax.int, turned, len(order) - 1, argument(node, "dtype"), origin=node)
                back = [order.index(axis) for axis in range(len(order))]
                node.replace_all_uses_with(emit.call(aten.permute.default, made, back, origin=node))
        graph.eliminate_dead_code()


def _order(softmax: fx.Node) -> list[int] | None:
    """The axes of a softmax with queries and keys last; ``None`` where they are, or nothing looks like queries."""
    sizes, keys = dims(softmax), axis_argument(softmax, softmax)
    alike = [axis for axis in range(len(sizes)) if axis != keys and same_size(sizes[axis], sizes[keys])]
    if not alike or (keys == len(sizes) - 1 and keys - 1 in alike):
        return None
    queries = min(alike, key=lambda axis: (axis == 0, abs(axis - keys)))  # the first axis is rather that of the samples
    return [axis for axis in range(len(sizes)) if axis not in (queries, keys)] + [queries, keys]

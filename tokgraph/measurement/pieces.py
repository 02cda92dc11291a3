"""Attention that is not fused, run some query rows at a time: what lies between its scores and its weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokgraph.errors import SpecError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import by_name, rank, tensor, tensor_inputs
from tokgraph.ir.program import TaskGraph
from tokgraph.passes.rules import axis_map, traits

Edge = tuple[fx.Node, fx.Node]
Run = Callable[[fx.Node, tuple[Any, ...], Mapping[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Region:
    """The nodes of one attention that hold scores or weights, and the weighted sum.

    Args:
        nodes: in graph order; the last one is the weighted sum.
        softmax: the node among them that normalises.
        scores: the product of queries and keys among them.
        narrowed: ``(node, input from outside) -> axis`` of the input that holds the query rows.
        axis: the axis of the weighted sum that holds the query rows.
        live: how many values of the size of the weights are there at once, at most.
    """

    nodes: tuple[fx.Node, ...]
    softmax: fx.Node
    scores: fx.Node
    narrowed: Mapping[Edge, int]
    axis: int
    live: int

    def outside(self) -> set[fx.Node]:
        """Values that the region reads."""
        return {x for node in self.nodes for x in node.all_input_nodes if x not in self.nodes}

    def run(
        self, values: Mapping[fx.Node, Any], run: Run, see: Callable[[Any, torch.Tensor, int], None], max_bytes: int
    ) -> Any:
        """The weighted sum, computed piece by piece.

        Args:
            values: values from outside.
            run: calls a node with the arguments given.
            see: is given the softmax of each piece, the query rows ``[rows]`` that it holds, and how many there are.
            max_bytes: bound of the scores and weights held at once, with what ``see`` makes of them.

        Raises:
            SpecError: a single row of all samples and heads is more than that.
        """
        query, key = (values[x] for x in self.scores.args[:2])  # type: ignore[index]
        total, keys = query.shape[-2], key.shape[-1]
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        row = math.prod(lead) * keys * max(query.element_size(), 4) * (self.live + 2)  # see: a copy, and that widened
        fit = max_bytes // row
        if fit < 1:
            raise SpecError(
                f"max_bytes={max_bytes} does not hold one row of the attention at {self.softmax.name!r} in all samples and "
                f"heads ({row} bytes)",
                help="give a larger max_bytes, smaller batches, or a model with fused attention (sdpa)",
            )
        pieces = []
        for rows in torch.arange(total, device=query.device).split(fit):
            pieces.append(self._piece(values, rows, run, see, total))
        return torch.cat(pieces, self.axis)

    def _piece(
        self,
        values: Mapping[fx.Node, Any],
        rows: torch.Tensor,
        run: Run,
        see: Callable[[Any, torch.Tensor, int], None],
        total: int,
    ) -> Any:
        inside: dict[fx.Node, Any] = {}
        for i, node in enumerate(self.nodes):

            def given(x: fx.Node, node: fx.Node = node) -> Any:
                if x in inside:
                    return inside[x]
                axis = self.narrowed.get((node, x))
                return values[x] if axis is None else values[x].index_select(axis, rows)

            args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
            inside[node] = run(node, args, kwargs)
            del args, kwargs
            if node is self.softmax:
                see(inside[node], rows, total)
            later = {x for n in self.nodes[i + 1 :] for x in n.all_input_nodes} | {self.nodes[-1]}
            for done in set(inside) - later:
                del inside[done]
        return inside[self.nodes[-1]]


def regions(graph: TaskGraph, facts: TaskFacts) -> dict[fx.Node, Region]:
    """Node -> region that it is of, for attentions that can run in pieces.

    Where a score passes something that does not keep rows apart, or is read from elsewhere, an attention runs whole.
    """
    nodes = by_name(graph.graph)
    found: dict[fx.Node, Region] = {}
    for block in facts.blocks:
        inside = {nodes[name] for name in block.nodes}
        for attention in block.attention:
            if attention.kind == "eager":
                region = _region(graph.graph, nodes[attention.node], nodes[attention.output], inside)
                found |= dict.fromkeys(region.nodes, region) if region is not None else {}
    return found


def _region(graph: fx.Graph, softmax: fx.Node, output: fx.Node, block: set[fx.Node]) -> Region | None:
    """Walks from the weighted sum back to the product of queries and keys."""
    axes: dict[fx.Node, int] = {output: rank(output) - 2}  # node -> axis of its query rows
    narrowed: dict[Edge, int] = {}
    scores: list[fx.Node] = []
    todo = [output]
    while todo:
        node = todo.pop()
        described = axis_map(node)
        rows = None if described is None else described.rows[axes[node]]
        if (
            described is None
            or rows is None
            or traits(node.target).sized
            or len(tensor_inputs(node)) != len(node.all_input_nodes)
        ):
            return None
        followed = dict(rows)
        if len(followed) != len(rows) or any(node.args.count(x) > 1 for x in followed):
            return None
        product = any(mix.kind == "contraction" for mix in described.mixes)
        if product and node is not output:
            scores.append(node)
        for x, axis in followed.items():
            if x in block and (not product or node is output):
                if axes.setdefault(x, axis) != axis:
                    return None
                todo.append(x)
            else:
                narrowed[node, x] = axis
    order = tuple(node for node in graph.nodes if node in axes)
    wide = [node for node in order if node is not output]
    if softmax not in axes or len(scores) != 1 or _escapes(wide, axes):
        return None
    return Region(order, softmax, scores[0], narrowed, axes[output], _most_alive(order))


def _escapes(wide: Iterable[fx.Node], inside: Mapping[fx.Node, int]) -> bool:
    """Whether something outside reads scores or weights."""
    return any(tensor(node) is None or user not in inside for node in wide for user in node.users)


def _most_alive(order: tuple[fx.Node, ...]) -> int:
    """How many of these values are there at once, at most; the last one, which is small, is not counted."""
    last = {node: max(order.index(user) for user in node.users) for node in order[:-1]}
    return max(sum(i <= at <= last[node] for i, node in enumerate(order[:-1])) for at in range(len(order) - 1))

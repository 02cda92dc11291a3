"""Streams of other layouts: stacked ones, ``[streams, batch, tokens, hidden]`` or ``[batch, streams, tokens, hidden]``, and
``[tokens, batch, hidden]``.

What crosses from layer to layer is dropped and put back as ``[batch, tokens, ...]``. So a value of another layout, where it may
be such a state, is written in that one and back: two views that cancel each other, between which the rest of the stages
finds the layout that it knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, dims, module_path, rank, same_size, tensor

from ..analysis.axes import AxisClasses
from ..analysis.flow import reads_values
from ..analysis.stream import content_roots
from ..analysis.units import grown
from ..contract import GraphPass
from ..emitter import Emitter
from ..rules import axis_map
from ..rules.registry import Axis, is_one

aten = torch.ops.aten
_MAKES_STATES = (
    aten.add.Tensor, aten.mul.Tensor, aten.stack.default, aten.cat.default, aten.slice_scatter.default, aten.transpose.int,
    torch.ops.tokgraph.routed.default,
)  # fmt: skip
"""Operators that make what leads from layer to layer."""
_REPEATS = (aten.expand.default, aten.repeat.default)
"""Operators that make streams of one value."""


@dataclass(frozen=True)
class BatchFirst(GraphPass):
    """Writes values of tokens that do not begin with batch and tokens in that layout, and back for who reads them."""

    name: ClassVar[str] = "batch-first"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Put two permutations behind every such value."""
        graph = graph_module.graph
        embedded = [node for node in content_roots(graph)[0] if rank(argument(node, "indices")) == 2]
        nodes = [node for node in graph.nodes if any(_may_be_moved(node, rows) for rows in embedded)]
        later = {node for node in graph.nodes if any(_may_be_behind(node, rows) for rows in embedded)}
        both = {*nodes, *later}
        if graph.output_node() not in _reached(embedded, later, forwards=True):  # else they are heads
            nodes = [node for node in graph.nodes if node in both]
        if not nodes:
            return
        classes, emit = AxisClasses(graph), Emitter(graph, self.name)
        tokens = [axis for rows in embedded for axis in grown(graph, classes, (rows, 1))]
        samples = [(rows, 0) for rows in embedded]
        orders = {node: order for node in nodes if (order := _order(node, classes, samples, tokens)) is not None}
        behind = {node for node, order in orders.items() if order[0] == 0}
        states = _states(graph, embedded, behind, classes, tokens) if behind else set()
        orders = {node: order for node, order in orders.items() if node in states or node not in behind}
        if all(node.target is aten.transpose.int for node in orders):  # attentions turn rows for themselves, and back
            return
        for node, order in orders.items():
            readers = list(node.users)
            if not any(_is_moved(reader, order) for reader in readers):
                first = emit.call(aten.permute.default, node, order, origin=node)
                for _, reading in groupby(sorted(readers, key=module_path), key=module_path):
                    _back(Emitter(graph, self.name), first, order, list(reading))


def _back(emit: Emitter, first: fx.Node, order: list[int], readers: list[fx.Node]) -> None:
    """Let readers, which are in one module, read a value in its own layout again, which is made there: behind a boundary of
    layers, if they are.
    """
    axes = [order.index(axis) for axis in range(len(order))]
    back = emit.call(aten.permute.default, first, axes, origin=readers[0])
    for reader in readers:
        reader.replace_input_with(first.args[0], back)  # type: ignore[arg-type]


def _is_moved(reader: fx.Node, order: list[int]) -> bool:
    return reader.target is aten.permute.default and list(argument(reader, "dims")) == order


def _may_be_moved(node: fx.Node, rows: fx.Node) -> bool:
    """Whether sizes allow that a node makes rows of tokens whose samples are not on its first axis."""
    val = tensor(node) if node.target in _MAKES_STATES else None
    if val is None or not val.is_floating_point() or val.dim() < 3 or is_one(rows, 0):
        return False
    return any(same_size(size, dims(rows)[0]) for size in dims(node)[1:-1])


def _may_be_behind(node: fx.Node, rows: fx.Node) -> bool:
    """Whether sizes allow that a node makes rows of tokens behind another axis than that of their samples, which is first."""
    val = tensor(node) if node.target in (*_MAKES_STATES, *_REPEATS) else None
    if val is None or not val.is_floating_point() or val.dim() < 4 or not same_size(dims(node)[0], dims(rows)[0]):
        return False
    return any(same_size(size, dims(rows)[1]) for size in dims(node)[2:-1])


def _states(
    graph: fx.Graph, embedded: list[fx.Node], behind: set[fx.Node], classes: AxisClasses, tokens: list[Axis]
) -> set[fx.Node]:
    """Of values whose tokens stand behind another axis, as those of heads do, those that lead from layer to layer: past all
    that mixes tokens, nothing else leads from the embeddings to the outputs.
    """
    mixing = {node for node in graph.nodes if not reads_values(node) or _attends(node, classes, tokens)}
    output = graph.output_node()
    if output in _reached(embedded, mixing | behind, forwards=True):
        return set()
    way = _reached(embedded, mixing, forwards=True) & _reached([output], mixing, forwards=False)
    return {node for node in behind & way if node.target is not aten.transpose.int}


def _reached(start: list[fx.Node], without: set[fx.Node], forwards: bool) -> set[fx.Node]:
    """What some nodes lead to, or are computed from, past others."""
    seen, stack = set(start), list(start)
    while stack:
        node = stack.pop()
        for other in node.users if forwards else node.all_input_nodes:
            if other not in seen and other not in without:
                seen.add(other)
                stack.append(other)
    return seen


def _attends(node: fx.Node, classes: AxisClasses, tokens: list[Axis]) -> bool:
    """Whether a node is, or is part of, an attention over tokens."""
    described = axis_map(node) if tensor(node) is not None else None
    return any(
        mix.kind in ("attention", "softmax", "contraction")
        and any(classes.same(at, t) for at in mix.axes for t in tokens)
        for mix in (described.mixes if described else ())
    )


def _order(node: fx.Node, classes: AxisClasses, samples: list[Axis], tokens: list[Axis]) -> list[int] | None:
    """The axes of a value, batch and tokens first; ``None`` where they are, or where they cannot be told."""
    found = [list(_of(node, classes, axes)) for axes in (samples, tokens)]
    if [len(axes) for axes in found] != [1, 1] or (found[0] == [0] and found[1] <= [1]):
        return None
    first = [found[0][0], found[1][0]]
    return [*first, *(axis for axis in range(rank(node)) if axis not in first)]


def _of(node: fx.Node, classes: AxisClasses, axes: list[Axis]) -> Iterator[int]:
    """The axes of a value that index the same positions as one of some axes."""
    for at in range(rank(node)):
        if any(classes.same((node, at), axis) for axis in axes):
            yield at

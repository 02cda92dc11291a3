"""What reads the rows of blocks beside the decoder and mixes them: auxiliary losses of routers, penalties, probes.

Rows are followed from values inside of blocks, one by one, through what is no part of a block. Where they are averaged,
an average over fewer rows is that of a shorter sequence; anything else that mixes them has no such meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from tokgraph.ir.blocks import Block, Side
from tokgraph.ir.node import (
    ancestors,
    argument,
    axis_argument,
    axis_arguments,
    by_name,
    dims,
    output_args,
    rank,
    same_sizes,
    tensor_inputs,
)
from tokgraph.ops.averages import AVERAGES

from ..rules import axis_map, traits
from ..rules.registry import Axis, first_input
from .axes import AxisClasses
from .cuts import within
from .doubts import item_of
from .flow import reads_values

aten = torch.ops.aten
_MEANS = (aten.mean.dim, aten.mean.default)


@dataclass(frozen=True)
class _Rows:
    """Rows of blocks in a value.

    Args:
        blocks: numbers of the blocks.
        value: the last value with a token axis of its own.
        axis: that axis.
        batch: its batch axis.
        at: the axis of the rows in the value at hand.
        merged: the rows of all samples are on that axis.
        parts: of several blocks' rows, one after the other: those of each block, and which operand of the join they are.
    """

    blocks: frozenset[int]
    value: fx.Node
    axis: int
    batch: int
    at: int
    merged: bool = False
    parts: tuple[tuple[int, _Rows], ...] = ()

    def of_blocks(self) -> Iterator[tuple[int, _Rows, tuple[int, ...]]]:
        """Number of a block, its rows, and which operands of joins lead to them, from the last join on."""
        if not self.parts:
            (number,) = self.blocks
            yield number, self, ()
        for place, rows in self.parts:
            for number, alone, places in rows.of_blocks():
                yield number, alone, (place, *places)


def with_sides(graph: fx.Graph, blocks: Sequence[Block], classes: AxisClasses, tokens: Axis) -> tuple[Block, ...]:
    """The blocks, each with what mixes its rows beside the decoder."""
    follow = _Follow(graph, blocks, classes, tokens)
    follow.run()
    return tuple(replace(block, sides=tuple(follow.sides.get(block.index, ()))) for block in blocks)


class _Follow:
    def __init__(self, graph: fx.Graph, blocks: Sequence[Block], classes: AxisClasses, tokens: Axis) -> None:
        nodes = by_name(graph)
        self._graph, self._classes, self._tokens = graph, classes, tokens
        self._inside = {nodes[name] for block in blocks for name in block.nodes}
        self._starts = {nodes[name]: block for block in blocks for name in block.before}
        self._ends = {nodes[name]: block for block in blocks for name in block.after}
        self._inner = {nodes[name]: block for block in blocks for name in block.nodes if name not in block.after}
        self._rows: dict[fx.Node, _Rows] = {}
        self.sides: dict[int, list[Side]] = {}

    def run(self) -> None:
        """Follow all rows through the graph, to the outputs."""
        live = ancestors([self._graph.output_node()])
        for end, block in self._ends.items():
            readers = [user for user in end.users if user in live and reads_values(user)]
            module = item_of(block.module) or block.module
            if module and readers and all(within(user, module) and user not in self._inside for user in readers):
                self._refuse(
                    readers[0], end, {block.index}, "is in its own module: there it goes on, as no layer before it"
                )
        for node in self._graph.nodes:
            if node in live and node not in self._inside and node.op == "call_function" and reads_values(node):
                self._visit(node)
        for leaf in dict.fromkeys(output_args(self._graph)):
            if isinstance(leaf, fx.Node) and leaf in {**self._rows, **self._inner}:
                rows = self._rows.get(leaf) or self._begin(leaf, self._inner[leaf])
                number = rows.blocks if isinstance(rows, _Rows) else {self._inner[leaf].index}
                self._refuse(leaf, leaf, number, "leaves the graph with all of them")

    def _visit(self, node: fx.Node) -> None:
        read: dict[fx.Node, _Rows] = {}
        for x in tensor_inputs(node):
            block = self._inner.get(x) or self._of_module(x, node)
            rows = self._rows.get(x) if block is None else self._begin(x, block)
            if rows is None and block is not None:
                self._refuse(node, x, {block.index}, "they cannot be followed there")
            elif rows is not None:
                read[x] = rows
        if not read:
            return
        if node.target in AVERAGES:
            self._averages(node, read)
            return
        joined = self._joined(node, read)
        if joined is not None:
            self._rows[node] = joined
            return
        moved = [self._moved(node, x, rows) for x, rows in read.items()]
        blocks = frozenset().union(*(rows.blocks for rows in read.values()))
        why = next((found for found in moved if isinstance(found, str)), "")
        found = [rows for rows in moved if isinstance(rows, _Rows)]
        if not why and len(found) > 1 and (len({(r.at, r.merged) for r in found}) > 1 or any(r.merged for r in found)):
            why = "combines them after samples and tokens were merged"
        if not why and len({rows.blocks for rows in read.values()}) > 1:
            why = "combines those of several blocks"
        if why:
            self._refuse(node, next(iter(read)), blocks, why)
        elif found:
            self._rows[node] = found[0]

    def _joined(self, node: fx.Node, read: Mapping[fx.Node, _Rows]) -> _Rows | None:
        """The rows of several blocks, one after the other, those of all samples of each: an average is one over all."""
        if node.target is not aten.cat.default:
            return None
        along, operands = axis_argument(node, node), argument(node, "tensors")
        rows = [read.get(x) for x in operands]
        if len(set(operands)) < len(rows) or any(r is None or not r.merged or r.at != along for r in rows):
            return None
        parts = tuple((place, r) for place, r in enumerate(rows) if r is not None)
        blocks = frozenset().union(*(r.blocks for _, r in parts))
        return _Rows(blocks, node, along, along, along, merged=True, parts=parts)

    def _of_module(self, x: fx.Node, reader: fx.Node) -> Block | None:
        """The block that begins or ends with a value, if its reader is in the block's own module."""
        beside = [ends[x] for ends in (self._starts, self._ends) if x in ends]
        return next((block for block in beside if block.module and within(reader, block.module)), None)

    def _begin(self, x: fx.Node, block: Block) -> _Rows | None:
        axes = self._classes.of(x, self._tokens)
        batch = self._classes.sample_axis(x, (self._tokens[0], 0))
        if len(axes) != 1 or batch is None:
            return None
        return _Rows(frozenset({block.index}), x, axes[0], batch, axes[0])

    def _moved(self, node: fx.Node, x: fx.Node, rows: _Rows) -> _Rows | str | None:
        """The rows in the value of ``node``, ``None`` where it averages them, or what else it does."""
        described = axis_map(node)
        if described is None:
            return f"has no token-axis rule ({node.target})"
        if node.target in _MEANS and x is node.args[0]:
            dims = axis_arguments(node, x) or list(range(rank(x)))
            if rows.at in dims:
                if rows.merged and len(tensor_inputs(node)) > 1:
                    return "reads other values beside them"
                self._average(node, rows)
                return None
        if described.groups:
            group = next((group for group in described.groups if rows.at in group.inputs), None)
            if group is None or len(group.outputs) != 1:
                return "splits the axis that they are on"
            if len(group.inputs) == 1:
                return self._on(node, rows, group.outputs[0])
            if rows.merged or list(group.inputs) != [rows.batch, rows.at] or rows.value is not x:
                return "merges the axis that they are on with another"
            return replace(rows, at=group.outputs[0], merged=True)
        to = [axis for axis, follows in enumerate(described.rows) if (x, rows.at) in (follows or ())]
        if len(to) != 1:
            return "mixes them otherwise than by a mean"
        if rows.merged and (len(tensor_inputs(node)) > 1 or node.args[0] is not x):
            return "combines them with other values after samples and tokens were merged"
        return self._on(node, rows, to[0])

    def _on(self, node: fx.Node, rows: _Rows, at: int) -> _Rows | str:
        if rows.merged:
            return replace(rows, at=at)
        batch = self._classes.sample_axis(node, (self._tokens[0], 0))
        return "loses track of samples" if batch is None else replace(rows, value=node, axis=at, batch=batch, at=at)

    def _average(self, node: fx.Node, rows: _Rows) -> None:
        of_blocks = list(rows.of_blocks())
        parts = tuple(number for number, _, _ in of_blocks) if rows.parts else ()
        for number, alone, places in of_blocks:
            side = Side(node.name, alone.value.name, alone.axis, alone.batch, rows.at, rows.merged, parts, places)
            self.sides.setdefault(number, []).append(side)

    def _averages(self, node: fx.Node, read: Mapping[fx.Node, _Rows]) -> None:
        """The rows of several values, averaged as one sequence."""
        operands, weights = node.args[0], node.args[1]
        assert isinstance(operands, (list, tuple))
        assert isinstance(weights, (list, tuple))
        rows = {place: read[x] for place, x in enumerate(operands) if x in read}
        origins = [_before_merge(weights[place], r) if weights else None for place, r in rows.items()]
        why = ""
        if len(rows) < len(operands) or len(set(operands)) < len(operands):
            why = "averages them with rows of something else"
        elif any(not r.merged or r.at != 0 for r in rows.values()):
            why = "averages them over another axis"
        elif any(w in read for w in weights) or (weights and None in origins):
            why = "weighs them by something else than a value for each token of each sample"
        if why:
            self._refuse(node, next(iter(read)), frozenset().union(*(r.blocks for r in read.values())), why)
            return
        parts = tuple(number for r in rows.values() for number, _, _ in r.of_blocks())
        for (place, r), origin in zip(rows.items(), origins, strict=True):
            weights_of = "" if origin is None else origin.name
            for number, alone, further in r.of_blocks():
                found, places = alone.value.name, (place, *further)
                side = Side(node.name, found, alone.axis, alone.batch, 0, True, parts, places, weights_of)
                self.sides.setdefault(number, []).append(side)

    def _refuse(
        self, reader: fx.Node, value: fx.Node, blocks: Sequence[int] | frozenset[int] | set[int], why: str
    ) -> None:
        for number in sorted(blocks):
            self.sides.setdefault(number, []).append(Side(reader.name, value.name, why=why))


def _before_merge(weight: object, rows: _Rows) -> fx.Node | None:
    """``[batch, tokens]``: the weights of rows, before these axes were merged as those of the rows were."""
    while isinstance(weight, fx.Node) and traits(weight.target).copies:
        weight = first_input(weight)
    if not isinstance(weight, fx.Node) or not traits(weight.target).reshape or rows.parts:
        return None
    found, sizes = first_input(weight), dims(rows.value)
    return found if same_sizes(dims(found), (sizes[rows.batch], sizes[rows.axis])) else None

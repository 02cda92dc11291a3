"""Rows that stand side by side: a slice of memory is read where it lies, instead of being gathered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import dims, same_size, value
from tokgraph.ir.values import plain

from ..contract import GraphPass
from ..emitter import RESIDUAL, Emitter, is_selection, remove_dead_code, selection

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph

Bound = fx.Node | int
Range = tuple[Bound, Bound]
"""Positions ``start <= i < stop``, the same ones in every sample."""


@dataclass(frozen=True)
class RangeRows(GraphPass):
    """Selections by an index that is a range become slices, restores and merges by one become concatenations.

    An image that stands at the end of the sequence, or the text before it, is such a range: no row of it moves, and the
    gradient of a concatenation is two slices.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "range-rows"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace each operator whose index is a range; what is returned stays a tensor of its own."""
        graph = graph_module.graph
        emit, known = Emitter(graph, self.name), _Ranges()
        returned = set(graph.output_node().all_input_nodes)
        for node in list(graph.nodes):
            index = _index_of(node)
            found = None if index is None or node in returned else known.of_index(index)
            if found is not None:
                node.replace_all_uses_with(_sliced(emit, node, found[0]))
        remove_dead_code(graph)


def _index_of(node: fx.Node) -> Any:
    """The index by which a node moves rows with gathers and scatters."""
    if is_selection(node) and node.target is not tokgraph.select_range.default:
        return selection(node)[1]
    return node.args[2] if node.target in (tokgraph.restore.default, tokgraph.merge.default) else None


def _sliced(emit: Emitter, node: fx.Node, start: Bound) -> fx.Node:
    if is_selection(node):
        new = emit.call(tokgraph.select_range.default, *selection(node), start, origin=node)
    else:
        restores = node.target is tokgraph.restore.default
        target = tokgraph.restore_range.default if restores else tokgraph.merge_range.default
        new = emit.call(target, *node.args, start, origin=node)
    if node.meta.get(RESIDUAL):
        new.meta[RESIDUAL] = True
    return new


@dataclass
class _Ranges:
    """Which masks and indices are ranges; each value is looked at once."""

    _masks: dict[fx.Node, Range | None] = field(default_factory=dict)
    _indices: dict[fx.Node, Range | None] = field(default_factory=dict)

    def of_index(self, node: fx.Node) -> Range | None:
        """The positions of ``[batch, rows]``, which are checked to be as many as the rows."""
        if node not in self._indices:
            self._indices[node] = self._index(node)
        return self._indices[node]

    def of_mask(self, node: fx.Node) -> Range | None:
        """Where ``[batch, tokens]`` is true."""
        if node not in self._masks:
            self._masks[node] = self._mask(node)
        return self._masks[node]

    def _index(self, node: fx.Node) -> Range | None:
        if node.target is aten.unsqueeze.default:
            return _positions(node)
        if node.target is tokgraph.range_rows.default:
            return node.args[1], node.args[2]  # type: ignore[return-value]
        if node.target is tokgraph.rows.default:
            mask, _, exact = node.args
            return self.of_mask(mask) if exact else None  # type: ignore[arg-type]
        if node.target is tokgraph.keep_rows.default:
            candidates, _, keep, tokens = node.args
            dropped = self.of_index(candidates) if keep == 0 else None  # type: ignore[arg-type]
            return None if dropped is None else _rest(dropped, tokens)
        return None

    def _mask(self, node: fx.Node) -> Range | None:
        if node.target is tokgraph.range_mask.default:
            return node.args[1], node.args[2]  # type: ignore[return-value]
        if node.target is aten.logical_not.default:
            true = self.of_mask(node.args[0])  # type: ignore[arg-type]
            return None if true is None else _rest(true, dims(node)[1])
        if node.target is aten.logical_and.default:
            return _between(*node.args)  # type: ignore[arg-type]
        return None


def _positions(node: Any) -> Range | None:
    """The bounds of ``arange(start, stop).unsqueeze(0)``."""
    made = node.args[0] if node.target is aten.unsqueeze.default and node.args[1] == 0 else None
    return tuple(made.args[:2]) if made is not None and made.target is aten.arange.start else None


def _between(low: fx.Node, high: fx.Node) -> Range | None:
    """The bounds of ``(positions >= start) & (positions < stop)`` of positions from 0 on."""
    if low.target is not aten.ge.Scalar or high.target is not aten.lt.Scalar or low.args[0] is not high.args[0]:
        return None
    positions = _positions(low.args[0])
    return None if positions is None or positions[0] != 0 else (low.args[1], high.args[1])  # type: ignore[return-value]


def _rest(of: Range, tokens: Any) -> Range | None:
    """The positions outside of a range that begins or ends where the axis does."""
    start, stop = of
    if same_size(_size(stop), _size(tokens)):
        return 0, start
    return (stop, tokens) if _size(start) == 0 else None


def _size(bound: Any) -> Any:
    """A bound as a number or an expression."""
    return plain(value(bound)) if isinstance(bound, fx.Node) else bound

"""Rows that are the same for every sample: their index is made once, and has one row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import tensor

from ..contract import GraphPass
from ..emitter import VISUAL_ROWS, Emitter, is_selection, remove_dead_code
from ..order import sort_nodes

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph

_SAMPLE_BY_SAMPLE = frozenset(
    {
        tokgraph.rows.default,
        tokgraph.keep_rows.default,
        tokgraph.demand_mask.default,
        tokgraph.uniform_score.default,
        aten.gather.default,
        aten.logical_and.default,
        aten.logical_not.default,
        aten.logical_or.default,
    }
)
"""Operators whose every sample is computed from that sample alone, by numbers that say nothing of how many there are."""
_INDEX_AT = {
    tokgraph.select.default: 1,
    tokgraph.drop.default: 1,
    tokgraph.select_targets.default: 1,
    tokgraph.restore.default: 2,
    tokgraph.merge.default: 2,
}
"""Operator -> which of its arguments is an index."""


@dataclass(frozen=True)
class UniformRows(GraphPass):
    """Gives selections and restores an index ``[1, rows]`` where all samples keep the same rows.

    In generation the positions of an image are known, and so are the rows that a selector by position keeps. One row of
    an index selects slices of all samples at once, and leaves values without a batch axis (masks, rotary embeddings)
    without one.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "uniform-rows"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Make each index again from one sample, where that can be done."""
        graph = graph_module.graph
        one = _OneSample(Emitter(graph, self.name))
        for node in list(graph.nodes):
            at = _INDEX_AT.get(node.target)
            if at is not None and (index := one.of(node.args[at])) is not None:
                node.update_arg(at, index)
        sort_nodes(graph)
        remove_dead_code(graph)


@dataclass
class _OneSample:
    """Makes ``[1, ...]`` values that hold what every sample of a value holds."""

    emit: Emitter
    _made: dict[fx.Node, fx.Node | None] = field(default_factory=dict)

    def of(self, node: Any) -> fx.Node | None:
        """The value of one sample; ``None`` where samples may differ."""
        if node not in self._made:
            made = self._made[node] = self._make(node)
            if made is not None and VISUAL_ROWS in node.meta:
                made.meta[VISUAL_ROWS] = node.meta[VISUAL_ROWS]
        return self._made[node]

    def _make(self, node: fx.Node) -> fx.Node | None:
        if node.op != "call_function":
            return None
        if node.target is tokgraph.range_rows.default:
            return self._positions(node, *node.args[1:])
        if node.target is tokgraph.range_mask.default:
            return self._between(node, *node.args[1:])
        if node.target is aten.cat.default and node.args[1:] == (1,):
            parts = [self.of(part) for part in node.args[0]]  # type: ignore[union-attr]
            return None if None in parts else self.emit.call(node.target, parts, 1, origin=node)
        along_tokens = is_selection(node) and node.args[2:] in ((), (1, 0))
        if node.target not in _SAMPLE_BY_SAMPLE and not along_tokens:
            return None
        new = [self.of(a) if tensor(a) is not None else a for a in node.args]
        if any(a is None for a, old in zip(new, node.args, strict=True) if old is not None):
            return None
        return self.emit.call(node.target, *new, origin=node, **node.kwargs)

    def _positions(self, of: fx.Node, start: Any, stop: Any) -> fx.Node:
        device = of.meta["val"].device
        positions = self.emit.call(aten.arange.start, start, stop, device=device, origin=of)
        return self.emit.call(aten.unsqueeze.default, positions, 0, origin=of)

    def _between(self, of: fx.Node, start: Any, stop: Any) -> fx.Node:
        positions = self._positions(of, 0, self.emit.size(of, 1))
        low, high = (
            self.emit.call(compare, positions, bound, origin=of)
            for compare, bound in ((aten.ge.Scalar, start), (aten.lt.Scalar, stop))
        )
        return self.emit.call(aten.logical_and.default, low, high, origin=of)

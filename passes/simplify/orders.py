"""Rows that are merged and then taken in another order: they are put one after the other at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts

from ..contract import GraphPass
from ..emitter import Emitter, is_selection, remove_dead_code, selection
from .complements import are_complements

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


@dataclass(frozen=True)
class JoinRows(GraphPass):
    """``select(merge(x, y, i), cat(j, i))`` is ``cat(x, y)``, where ``j`` are the rows of ``x``.

    Attention does not ask in which order its keys stand. Where they are projected apart, they stay apart.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "join-rows"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace selections of merged rows that take first some, then the others."""
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        for node in list(graph.nodes):
            if is_selection(node) and _takes_apart(node):
                merged, order, _, _ = selection(node)
                joined = emit.call(tokgraph.join.default, *merged.args[:2], order, origin=node)
                node.replace_all_uses_with(joined)
        remove_dead_code(graph)


def _takes_apart(node: fx.Node) -> bool:
    """Whether a selection takes all of a merge's first rows and then all of its second."""
    merged, order, dim, batch = selection(node)
    if merged.target is not tokgraph.merge.default or (dim, batch) != (1, 0) or order.target is not aten.cat.default:
        return False
    parts: Any = order.args[0]
    return len(parts) == 2 and parts[1] is merged.args[2] and are_complements(*parts)

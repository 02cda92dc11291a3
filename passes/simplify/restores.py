"""Restores that follow one another: rows that are written again before anyone reads them are written once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts

from ..contract import GraphPass
from ..emitter import is_selection, remove_dead_code, selection

tokgraph = torch.ops.tokgraph


@dataclass(frozen=True)
class MergeRestores(GraphPass):
    """``restore(restore(x, a, i), b, i)`` is ``restore(x, b, i)``, and ``restore(x, drop(x, i), i)`` is ``x``.

    Each block of a span puts its rows back into the residual stream. Once selections have been pushed through, nobody
    reads the rows in between, and without this pass a span would copy the whole stream once a block.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "merge-restores"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Read through overwritten restores, then remove those that nobody reads any more."""
        for node in list(graph_module.graph.find_nodes(op="call_function", target=tokgraph.restore.default)):
            into, rows, index = node.args
            while into.target is tokgraph.restore.default and into.args[2] is index:
                into = into.args[0]
            node.update_arg(0, into)
            if is_selection(rows) and selection(rows) == (into, index, 1, 0):
                node.replace_all_uses_with(into)
        remove_dead_code(graph_module.graph)

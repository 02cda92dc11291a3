"""Rows that are read apart are computed apart, where that spares putting them together first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import tensor

from ..contract import GraphPass
from ..emitter import is_selection, selection
from ..simplify.complements import are_complements
from .pushdown import PushDown
from .wants import STREAM, Declined, commute

tokgraph = torch.ops.tokgraph


@dataclass(frozen=True)
class PartRows(GraphPass):
    """Computes ``f(restore(x, rows, i))`` twice where its readers take the rows ``i`` and others, but none takes all.

    Own projections read text and visual rows apart, and between the blocks of a frozen span the text rows alone change. With
    a norm of each, the restore in between is read by nobody: the text rows are those that it would put back, and the visual
    rows those of the start of the span. As many rows are computed as before.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "part-rows"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Part what lies between each restore and the selections that read it apart, which then move on."""
        graph = graph_module.graph
        parted = False
        for restore in list(graph.find_nodes(op="call_function", target=tokgraph.restore.default)):
            between = _Between(restore)
            if between.parts():
                between.compute_apart()
                parted = True
        if parted:
            PushDown(self.task).call(graph_module, facts)


@dataclass
class _Between:
    """What is computed row by row between a restore and selections.

    Args:
        restore: the restore.
        indices: the selections' indices: the restore's own and another, once found.
        nodes: the calls in between, in order.
    """

    restore: fx.Node
    indices: set[fx.Node] = field(default_factory=set)
    nodes: list[fx.Node] = field(default_factory=list)

    def parts(self) -> bool:
        """Whether nobody reads more than the rows of either of two indices."""
        between = {self.restore}
        node = self.restore
        while node.op != "output":
            node = node.next
            if between.isdisjoint(node.all_input_nodes) or self._reads_apart(node, between):
                continue
            if not self._is_row_by_row(node, between):
                return False
            between.add(node)
            self.nodes.append(node)
        own = self.restore.args[2]
        others = self.indices - {own}
        return bool(self.nodes) and own in self.indices and len(others) == 1

    def _reads_apart(self, node: fx.Node, between: set[fx.Node]) -> bool:
        """Whether a node takes rows of one index, or puts others in the place of the restore's own."""
        own: fx.Node = self.restore.args[2]  # type: ignore[assignment]
        if node.target is tokgraph.restore.default:
            return node.args[0] is self.restore and node.args[1:].count(self.restore) == 0 and node.args[2] is own
        if not is_selection(node) or selection(node)[2:] != (1, 0) or selection(node)[0] not in between:
            return False
        index = selection(node)[1]
        if selection(node)[0] is not self.restore:
            self.indices.add(index)
        return index is own or are_complements(index, own)

    def _is_row_by_row(self, node: fx.Node, between: set[fx.Node]) -> bool:
        if node.op != "call_function" or is_selection(node) or tensor(node) is None:
            return False
        passed = commute(node, STREAM)
        return not isinstance(passed, Declined) and {
            x for x, along in passed if along == STREAM
        } >= between.intersection(node.all_input_nodes)

    def compute_apart(self) -> None:
        """One copy of the calls for each index."""
        graph, own = self.restore.graph, self.restore.args[2]
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            with graph.inserting_after(node):
                copies[node] = graph.node_copy(node, lambda x: copies.get(x, x))
            copies[node].meta["made_by"] = PartRows.name
            for reader in list(node.users):
                if is_selection(reader) and selection(reader)[1] is not own:
                    reader.replace_input_with(node, copies[node])

"""Rows that are read apart are computed apart, where that spares moving them once more."""

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
Indices = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class PartRows(GraphPass):
    """Computes ``f(x)`` once for each of two indices where its readers take the rows of either, and so do those of ``x``.

    Own projections read text and visual rows apart, and between the blocks of a frozen span the text rows alone change. With
    a norm of each, the restore in between is read by nobody: the text rows are those that it would put back, and the visual
    rows those of the start of the span. As many rows are computed as before.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "part-rows"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Part what can be parted, and let the selections move on, until nothing is left to part."""
        while True:
            found = [cone for node in graph_module.graph.nodes if (cone := _cone(node)) is not None]
            if not found:
                return
            for cone in found:
                cone.part()
            PushDown(self.task).call(graph_module, facts)


@dataclass
class _Cone:
    """What is computed row by row, and read at the rows of two indices that part its rows.

    Args:
        indices: the indices.
        nodes: the calls, the last one first.
    """

    indices: Indices
    nodes: list[fx.Node] = field(default_factory=list)

    def part(self) -> None:
        """One copy of the calls for the rows of the second index."""
        copies: dict[fx.Node, fx.Node] = {}
        for node in reversed(self.nodes):
            graph = node.graph
            with graph.inserting_after(node):
                copies[node] = graph.node_copy(node, lambda x: copies.get(x, x))
            copies[node].meta["made_by"] = PartRows.name
            for reader in list(node.users):
                if is_selection(reader) and selection(reader)[1] is self.indices[1]:
                    reader.replace_input_with(node, copies[node])


def _cone(last: fx.Node) -> _Cone | None:
    """What ends in a value, where it is worth parting: all that it is computed from is there, or would be, part by part."""
    indices = _read_apart(last)
    if indices is None:
        return None
    cone, above = _Cone(indices), {last}
    heads: set[fx.Node] = set()
    while above:
        node = max(above)
        above.remove(node)
        sources = _row_by_row(node) if all(_takes_part(x, node, cone) for x in node.users) else None
        if sources is None:
            heads.add(node)
        else:
            cone.nodes.append(node)
            above |= sources
    return cone if cone.nodes and all(_is_there_in_parts(head, cone) for head in heads) else None


def _read_apart(node: fx.Node) -> Indices | None:
    """The two indices at which all readers of a value take its rows."""
    if node.target is tokgraph.restore.default or not node.users:
        return None
    if not all(is_selection(x) and selection(x)[0] is node and selection(x)[2:] == (1, 0) for x in node.users):
        return None
    indices = sorted({selection(x)[1] for x in node.users})
    return (indices[0], indices[1]) if len(indices) == 2 and are_complements(*indices) else None


def _takes_part(reader: fx.Node, node: fx.Node, cone: _Cone) -> bool:
    """Whether a reader of a value is of the cone, or takes the rows of one of its indices."""
    return reader in cone.nodes or _taken(reader, node, cone) is not None


def _taken(reader: fx.Node, node: fx.Node, cone: _Cone) -> fx.Node | None:
    """The index, one of the cone's, whose rows of a value a reader takes."""
    if not is_selection(reader):
        return None
    x, index, *along = selection(reader)
    return index if x is node and along == [1, 0] and index in cone.indices else None


def _row_by_row(node: fx.Node) -> set[fx.Node] | None:
    """The inputs whose rows a call computes its own from, one from one; ``None`` where it does not, or has none."""
    if node.op != "call_function" or is_selection(node) or tensor(node) is None:
        return None
    passed = commute(node, STREAM)
    if isinstance(passed, Declined) or node.target is tokgraph.restore.default:
        return None
    return {x for x, along in passed if along == STREAM} or None


def _is_there_in_parts(head: fx.Node, cone: _Cone) -> bool:
    """Whether both parts of a value are taken already, or it is a restore that nobody would read whole any more."""
    if {_taken(x, head, cone) for x in head.users} >= set(cone.indices):
        return True
    return (
        head.target is tokgraph.restore.default
        and head.args[2] in cone.indices
        and all(_takes_part(x, head, cone) or _overwrites(x, head) for x in head.users)
    )


def _overwrites(node: fx.Node, restore: fx.Node) -> bool:
    """Whether a node puts other rows where a restore put its own."""
    puts = node.target is tokgraph.restore.default and node.args[0] is restore and node.args[2] is restore.args[2]
    return puts and node.args[1] is not restore

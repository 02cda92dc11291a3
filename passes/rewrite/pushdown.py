"""Push-down: move selections towards the inputs as far as every reader allows; work on rows that nobody reads disappears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import is_write
from tokgraph.ir.values import Values

from ..contract import GraphPass
from ..emitter import Emitter, is_check, is_selection, remove_dead_code, selection
from ..order import sort_nodes
from ..rules import traits
from .wants import Along, Chain, Selections, Want, selections, through_restore, through_selection

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
NARROWED = "tokgraph.narrowed"
"""Key of a node's ``meta``: push-down computes it on fewer rows."""
STALE = "tokgraph.stale"


@dataclass(frozen=True)
class PushDown(GraphPass):
    """Moves every selection as far up as it commutes, then drops what nobody reads; always exact.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "push-down"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Find what every value's readers share, then rebuild the calls on fewer rows."""
        graph = graph_module.graph
        found = selections(graph)
        if not any(is_selection(node) for node in found.live):
            return
        rebuild = _Rebuild(graph, found, self.name)
        rebuild.run()
        sort_nodes(graph)
        remove_dead_code(graph)
        _refresh(graph)


def _refresh(graph: fx.Graph) -> None:
    """Recompute the values of nodes that the pass made or narrowed, in order."""
    values = Values(graph)
    for node in graph.nodes:
        if node.meta.pop(STALE, False) and node.op == "call_function":
            values.refresh(node)


class _Rebuild:
    """Gives every live call the rows of its inputs that it now needs."""

    def __init__(self, graph: fx.Graph, found: Selections, made_by: str) -> None:
        self._graph = graph
        self._found = found
        self._emit = Emitter(graph, made_by)
        self._made: dict[tuple[fx.Node, Along, Chain], fx.Node] = {}
        for node in graph.nodes:
            if is_selection(node):  # it may turn out to be where it belongs
                x, index, dim, batch = selection(node)
                self._made.setdefault((x, Along(dim, batch), (index,)), node)

    def run(self) -> None:
        """Find every live node's new arguments, then set them (restores are looked through as they were)."""
        new: dict[fx.Node, tuple[Any, Any]] = {}
        for node in list(self._graph.nodes):
            follows = node in self._found.followers
            if not (follows or node.op == "output" or is_check(node) or is_write(node) or self._stays(node)):
                continue
            wants = self._found.inputs.get(node, {})
            moved = any(wants.get(x) or self._found.own.get(x) or not is_plain(x) for x in node.all_input_nodes)
            if follows or moved or self._found.own.get(node):  # which may make the axis itself, of a size it is told
                narrow = self._left if follows else partial(self._input, wants)
                new[node] = fx.node.map_arg(node.args, narrow), fx.node.map_arg(node.kwargs, narrow)
        for node, (args, kwargs) in new.items():
            node.args, node.kwargs = args, kwargs
            self._fix_sizes(node)
            node.meta[STALE] = True
            if self._found.own.get(node):
                node.meta[NARROWED] = True

    def _stays(self, node: fx.Node) -> bool:
        """Whether a value is needed, and is neither a selection nor a restore that selections cancel."""
        cancelled = node.target is tokgraph.restore.default and node not in self._found.kept_restores
        return node in self._found.live and not is_selection(node) and not cancelled

    def _input(self, wants: Mapping[fx.Node, Want], x: fx.Node) -> fx.Node:
        return self._narrowed(x, wants.get(x, {}))

    def _left(self, x: fx.Node) -> fx.Node:
        """``x`` at the rows that are left of it: of a restore that nobody else reads, those that it put back."""
        while x.target is tokgraph.restore.default and x not in self._found.kept_restores:
            x = x.args[1]  # type: ignore[assignment]
        return self._narrowed(x, {})

    def _narrowed(self, x: fx.Node, want: Want) -> fx.Node:
        """``x`` at the rows of ``want``: from where its own selections leave it, through the gathers that are left."""
        while True:
            if is_selection(x):
                x, want = through_selection(x, want)
            elif x.target is tokgraph.restore.default and (passed := through_restore(x, want)) is not None:
                x, want = passed
            else:
                break
        own = self._found.own.get(x, {})
        for along in sorted(want):
            x = self._gather(x, along, want[along][len(own.get(along, ())) :], want[along])
        return x

    def _gather(self, x: fx.Node, along: Along, rest: Chain, whole: Chain) -> fx.Node:
        for index in rest:
            key = (x, along, (index,))
            if key not in self._made:
                source = x if along.ndim is None else self._emit.with_batch(x, along.ndim, along.batch, index)
                self._made[key] = self._emit.select(source, index, along.dim, along.batch)
            x = self._made[key]
            x.meta[STALE] = True
        return x

    def _fix_sizes(self, node: fx.Node) -> None:
        """Give views and expands of narrowed axes the new size."""
        own = self._found.own.get(node, {})
        if not traits(node.target).sized or not own:
            return
        sizes = list(node.args[1])  # type: ignore[arg-type]
        for along, chain in own.items():
            if sizes[along.dim] != -1:
                sizes[along.dim] = self._emit.size(chain[-1], 1)
        node.update_arg(1, sizes)


def is_plain(node: fx.Node) -> bool:
    """Whether a node is neither a selection nor a restore."""
    return not is_selection(node) and node.target is not tokgraph.restore.default

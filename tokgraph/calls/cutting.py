"""A task's graph cut into steps for the parts of a model, over tensors that are read where they are registered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokgraph.ir.names import OWN, STEP
from tokgraph.ir.program import TIED, TaskGraph
from tokgraph.ir.tensors import HOLDER, target_of, tensor_name
from tokgraph.passes.lower.functional import functional
from tokgraph.passes.lower.pieces import Outputs, Piece, block_count, pieces

from .parts import Registered, Table

AFTER = -1
"""The part that comes after the blocks, however many of these a task has."""


@dataclass(frozen=True)
class Cut:
    """A task's graph in pieces.

    Args:
        graph: the graph.
        pieces: in the order in which they run.
        blocks: how many blocks the graph has.
        inputs: names of the values that the task's inputs are.
        tensors: name of a value -> name of the tensor of the model that it is.
        outputs: what the graph gives.
        count: how many outputs are the task's.
        checks: ``(message, names of the inputs that it is about)`` of the outputs after those, which are true where it holds.
        writes: names of the tensors, and positions of the inputs, that the last outputs are to be written into.
    """

    graph: TaskGraph
    pieces: tuple[Piece, ...]
    blocks: int
    inputs: tuple[str, ...]
    tensors: Mapping[str, str]
    outputs: Outputs
    count: int
    checks: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str | int, ...]

    def part(self, floor: int) -> int:
        """The part of the model in which a piece runs: 0, before the blocks; ``i + 1``, block ``i``; or :data:`AFTER`."""
        return floor if floor <= self.blocks else AFTER

    def readers(self) -> Iterator[tuple[str, int]]:
        """``(name of a tensor of the model, floor that reads it)``."""
        for piece in self.pieces:
            for name in piece.inputs:
                if name in self.tensors:
                    yield self.tensors[name], piece.floor


def cut(graph: TaskGraph, *, checking: bool = True) -> Cut:
    """A task's graph cut at its blocks.

    Args:
        graph: the graph.
        checking: its checks raise where they are; else they are outputs, as compiled code needs them.
    """
    lowered = functional(graph, checking=checking)
    flat = lowered.graph_module.graph
    names = [node.name for node in flat.find_nodes(op="placeholder")]
    inputs = len(names) - len(lowered.tensors)
    return Cut(
        graph,
        tuple(pieces(lowered.graph_module, "block")),
        block_count(flat),
        tuple(names[:inputs]),
        dict(zip(names[inputs:], map(tensor_name, lowered.tensors), strict=True)),
        Outputs(lowered.graph_module),
        lowered.outputs,
        lowered.checks,
        tuple(tensor_name(x) if isinstance(x, str) else x for x in lowered.writes),
    )


class Added(MutableMapping[str, Any]):
    """What plans added to a task, in the graphs of all of them: a tensor that is put here takes its place in each.

    Args:
        graphs: the task's graphs, one a plan.
    """

    def __init__(self, graphs: Sequence[TaskGraph]) -> None:
        self._modules = [graph.graph_module for graph in graphs if hasattr(graph.graph_module, HOLDER)]

    @property
    def _tables(self) -> list[dict[str, Any]]:
        return [module.get_submodule(HOLDER)._parameters for module in self._modules]

    def __getitem__(self, key: str) -> Any:
        return self._of(key)[0][key]

    def __setitem__(self, key: str, x: Any) -> None:
        for table in self._of(key):
            table[key] = x

    def __delitem__(self, key: str) -> None:
        for table in self._of(key):
            del table[key]

    def __iter__(self) -> Iterator[str]:
        return iter({key: None for table in self._tables for key in table})

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _of(self, key: str) -> list[dict[str, Any]]:
        found = [table for table in self._tables if key in table]
        if not found:
            raise KeyError(key)
        return found


class Places:
    """Where the tensors that graphs read are registered.

    Args:
        model: the user's model.
        graph: the graph that holds the plan's step.
        added: what plans added to the task.
    """

    def __init__(self, model: nn.Module, graph: TaskGraph, added: Added) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._graph = graph
        self._added = added
        self._first = dict(graph.graph_module.meta.get(TIED, {}))
        self._further: dict[str, list[str]] = {}
        for further, first in self._first.items():
            self._further.setdefault(first, []).append(further)

    def of(self, name: str) -> list[Registered]:
        """Every place of a tensor of the model, the first name first, or of a parameter of the plan; empty: it is neither."""
        if name.partition(".")[0] == OWN:
            return [Registered(name, self._added, target_of(name).partition(".")[2])]
        first = self._first.get(name, name)
        found = [self._in_model(other) for other in (first, *self._further.get(first, ()))]
        return [x for x in found if x is not None]

    def read(self, name: str, graph: TaskGraph) -> Registered:
        """Where a graph's value of a name is read: in the model, or, of constants and steps, in the graph module."""
        return next(iter(self.of(name)), None) or _in_graph(self._graph if name == STEP else graph, name)

    def _in_model(self, name: str) -> Registered | None:
        path, _, leaf = name.rpartition(".")
        table = _table(self._modules[path], leaf) if path in self._modules else None
        return None if table is None else Registered(name, table, leaf)


def _in_graph(graph: TaskGraph, name: str) -> Registered:
    holder, _, leaf = target_of(name).partition(".")
    inside = graph.graph_module.get_submodule(holder)
    return Registered(name, _table(inside, leaf) or inside._buffers, leaf)


def _table(module: nn.Module, leaf: str) -> Table | None:
    return next((table for table in (module._parameters, module._buffers) if table.get(leaf) is not None), None)

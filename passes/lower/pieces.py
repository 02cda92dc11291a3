"""A functional graph cut into pieces that are compiled one by one, and equal pieces once: a decoder block each."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tokgraph.ir.compilation import By
from tokgraph.ir.node import output_args, tensor, value
from tokgraph.ir.tensors import read

from .functional import LEARNED
from .places import place_of

_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Piece:
    """A part of a graph that runs after those before it.

    Args:
        title: what it is of the model, for messages: ``"block 3"``.
        floor: 0: before the blocks, ``i + 1``: in block ``i``, ``block_count + 1``: after them.
        graph_module: takes the values of ``inputs``, gives those of ``outputs``.
        inputs: names of the whole graph's nodes.
        outputs: names of the whole graph's nodes.
        open: position of an input -> its dimensions whose sizes are symbols.
    """

    title: str
    floor: int
    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    open: dict[int, tuple[int, ...]]

    def key(self) -> tuple[Any, ...]:
        """Equal for pieces that compute the same of their inputs."""
        numbers = {node: i for i, node in enumerate(self.graph_module.graph.nodes)}

        def plain(x: Any) -> Any:
            return repr(fx.node.map_arg(x, lambda node: _Number(numbers[node])))

        return tuple(
            (node.op, node.target if node.op == "call_function" else "", plain(node.args), plain(node.kwargs))
            for node in self.graph_module.graph.nodes
        )


class _Number(int):
    """A node by its position, shown as no number is."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


class Outputs:
    """What a functional graph gives, from the values that its pieces leave.

    Numbers that follow the batch's sizes are computed here, operator by operator: compiled code gives tensors, and would
    take a number for a constant.

    Args:
        graph_module: the graph.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._flat = output_args(graph_module.graph)
        given = list(dict.fromkeys(x for x in self._flat if isinstance(x, fx.Node)))
        sizes = [node for node in given if _is_size(node)]
        self._sizes = _piece("sizes", 0, sizes, sizes)
        tensors = [node.name for node in given if not _is_size(node)]
        self.names = tuple(dict.fromkeys([*tensors, *self._sizes.inputs]))
        """Names of the values that are read after the pieces."""

    def of(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The flat outputs, of values by name."""
        sizes = self._sizes.graph_module(*(values[name] for name in self._sizes.inputs))
        found = {**values, **dict(zip(self._sizes.outputs, sizes, strict=True))}
        return tuple(found[x.name] if isinstance(x, fx.Node) else x for x in self._flat)


def pieces(graph_module: fx.GraphModule, by: By) -> list[Piece]:
    """The pieces of a functional graph, in the order in which they run.

    Args:
        graph_module: the graph; its calls carry their places.
        by: ``"graph"``: one piece.
    """
    graph = graph_module.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    floors = dict.fromkeys(calls, 0) if by == "graph" else floors_of(graph)
    return list(_cut(graph, calls, floors))


def last_reads(cut: Sequence[Piece], kept: Iterable[str]) -> list[list[str]]:
    """For each piece, the values that nothing reads after it.

    Args:
        cut: the pieces, in the order in which they run.
        kept: names of the values that are read after all of them.
    """
    found: list[list[str]] = []
    needed = set(kept)
    for piece in reversed(cut):
        mine = {*piece.inputs, *piece.outputs}
        found.append(sorted(mine - needed))
        needed |= mine
    return found[::-1]


def block_count(graph: fx.Graph) -> int:
    """How many blocks the nodes of a graph are placed in."""
    places = (place_of(node) or {} for node in graph.nodes)
    return max((place["block"] for place in places if place.get("block") is not None), default=-1) + 1


def floors_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """Node -> its piece: 0 before the blocks, ``i + 1`` in block ``i``, the last after them.

    A node is not before what it reads. What depends on no parameter (masks, rotary embeddings, choices of rows that are
    known from the batch) is computed where it can be, not where it is read first: a block would otherwise differ from the
    next one by what both read.
    """
    places = {node: place_of(node) or {} for node in graph.nodes}
    head = block_count(graph) + 1
    floors: dict[fx.Node, int] = {}
    learned: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if _is_parameter(node):
                learned.add(node)
        elif node.op == "call_function":
            below = max((floors.get(x, 0) for x in node.all_input_nodes), default=0)
            if (
                node.target is not operator.getitem
                and not learned.isdisjoint(node.all_input_nodes)
                and tensor(node) is not None
            ):
                block, kind = places[node].get("block"), places[node].get("kind")
                below = max(below, block + 1 if block is not None else head if kind == "head" else 0)
            if not learned.isdisjoint(node.all_input_nodes):
                learned.add(node)
            floors[node] = below
    return floors


def _is_parameter(node: fx.Node) -> bool:
    """Whether an input of a functional graph is one, or what a task's graph reads."""
    if node.op == "placeholder":
        return bool(node.meta.get(LEARNED))
    return node.graph.owning_module is not None and isinstance(read(node.graph.owning_module, node), nn.Parameter)


def _is_size(node: fx.Node) -> bool:
    """Whether a call gives a number: pieces compute it from tensors, compilers would take it for a constant."""
    return node.op == "call_function" and isinstance(value(node), _NUMBERS)


def _cut(graph: fx.Graph, calls: list[fx.Node], floors: dict[fx.Node, int]) -> Iterator[Piece]:
    results = set(graph.output_node().all_input_nodes)
    head = max(floors.values(), default=0)
    for floor in sorted({floors[node] for node in calls if not _is_size(node)}):
        inside = [node for node in calls if floors[node] == floor and not _is_size(node)]
        titles = {0: "what comes before the blocks", head: "what comes after the blocks"}
        title = "the graph" if head == 0 else titles.get(floor, f"block {floor - 1}")
        mine = set(inside)
        outputs = [n for n in inside if n in results or any(_read_outside(user, mine) for user in n.users)]
        yield _piece(title, floor, inside, outputs)


def _read_outside(user: fx.Node, mine: set[fx.Node]) -> bool:
    """Whether a value is needed behind a piece for what reads it; outputs of the graph are known to be."""
    if _is_size(user):
        return any(further.op == "output" or _read_outside(further, mine) for further in user.users)
    return user.op != "output" and user not in mine


def _piece(title: str, floor: int, inside: list[fx.Node], outputs: list[fx.Node]) -> Piece:
    wanted = _with_sizes(inside)
    mine = set(wanted)
    inputs = list(dict.fromkeys(x for node in wanted for x in node.all_input_nodes if x not in mine))
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        copies[node] = made.placeholder(f"x{i}")
        copies[node].meta = dict(node.meta)
    for node in wanted:
        copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(tuple(copies[node] for node in outputs))
    opened = {i: dims for i, node in enumerate(inputs) if (dims := _open(node))}
    names = (tuple(n.name for n in inputs), tuple(n.name for n in outputs))
    return Piece(title, floor, fx.GraphModule({}, made), *names, opened)


def _with_sizes(inside: Iterable[fx.Node]) -> list[fx.Node]:
    """Calls, with the sizes that they need before them."""
    found: dict[fx.Node, None] = {}

    def add(node: fx.Node) -> None:
        for x in node.all_input_nodes:
            if _is_size(x) and x not in found:
                add(x)
        found[node] = None

    for node in inside:
        add(node)
    return list(found)


def _open(node: fx.Node) -> tuple[int, ...]:
    val = value(node)
    return (
        tuple(i for i, d in enumerate(val.shape) if isinstance(d, torch.SymInt))
        if isinstance(val, torch.Tensor)
        else ()
    )

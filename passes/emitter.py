"""Making the nodes that rewrites need: sizes, batch axes, selections along the token axis."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from tokgraph.ir.node import (
    Dim,
    ancestors,
    argument,
    call,
    dims,
    fake_mode,
    is_write,
    rank,
    same_size,
    same_sizes,
    sizes_of,
    tensor,
    value,
)
from tokgraph.ir.tensors import hold, read, target_of
from tokgraph.ir.values import Values
from tokgraph.passes.rules import traits
from tokgraph.passes.rules.registry import first_input, is_one

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph

VISUAL_ROWS = "tokgraph.visual_rows"
"""Key of an index node's ``meta``: how many of its rows are visual."""
RESIDUAL = "tokgraph.residual"
"""Key of a node's ``meta``: the node is a value of the residual stream."""


def is_selection(node: fx.Node) -> bool:
    """Whether the node narrows one axis of its first argument to an index."""
    return node.target in (tokgraph.select.default, tokgraph.drop.default, tokgraph.select_range.default)


def is_check(node: fx.Node) -> bool:
    """Whether the node is a check of the model's, which nothing reads and which must stay."""
    return node.target is tokgraph.check.default


def selection(node: fx.Node) -> tuple[fx.Node, fx.Node, int, int]:
    """``(input, index, token axis, batch axis)`` of a selection."""
    x, index = node.args[:2]
    dim, batch = (1, 0) if node.target is tokgraph.drop.default else node.args[2:4]
    return x, index, dim, batch  # type: ignore[return-value]


class Emitter:
    """Inserts nodes right after the values they need, with the metadata every node has.

    Args:
        graph: the graph to edit.
        made_by: name of the pass.
    """

    def __init__(self, graph: fx.Graph, made_by: str) -> None:
        self.graph = graph
        self.made_by = made_by
        self._cache: dict[tuple[Any, ...], fx.Node] = {}
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]

    def call(self, target: Any, *args: Any, origin: fx.Node, **kwargs: Any) -> fx.Node:
        """A call, the same node for the same arguments."""
        key = (target, *_hashable(args), *_hashable(tuple(kwargs.items())))
        if key not in self._cache:
            last = max([*_nodes((args, kwargs)), *self._inputs[-1:]])
            with self.graph.inserting_after(last):
                self._cache[key] = call(self.graph, target, *args, origin=origin, made_by=self.made_by, **kwargs)
        return self._cache[key]

    def state(self, name: str, initial: torch.Tensor, origin: fx.Node) -> fx.Node:
        """A tensor of the graph's own, read before everything else; made on the device of ``origin`` when it is new."""
        for node in self.graph.find_nodes(op="get_attr", target=target_of(name)):
            return node  # type: ignore[no-any-return]
        val = origin.meta["val"]
        node = self._read(name, initial.to(val.device))
        mode = fake_mode(self.graph)
        node.meta["val"] = initial if mode is None else mode.from_tensor(initial.to(val.device))
        return node

    def parameter(self, name: str, of: fx.Node) -> fx.Node:
        """A parameter of the graph's own, a copy of the one that ``of`` reads; the one of that name, if there is one."""
        for node in self.graph.find_nodes(op="get_attr", target=target_of(name)):
            return node  # type: ignore[no-any-return]
        assert self.graph.owning_module is not None
        original = read(self.graph.owning_module, of)
        copied = torch.nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
        node = self._read(name, copied)
        node.meta["val"] = of.meta["val"]
        return node

    def _read(self, name: str, x: torch.Tensor) -> fx.Node:
        """A node that reads a new tensor of the graph module."""
        module = self.graph.owning_module
        assert module is not None
        target = hold(module, name, x)
        with self.graph.inserting_after(self._inputs[-1] if self._inputs else None):
            return self.graph.get_attr(target)

    def size(self, node: fx.Node, axis: int) -> fx.Node | int:
        """The size of an axis: a number, or a node that computes it from as early a value as there is."""
        dim = dims(node)[axis]
        if isinstance(dim, int):
            return dim
        known = self._known_size(dim, node)
        return known if known is not None else self.call(aten.sym_size.int, node, axis, origin=node)

    def _known_size(self, dim: Dim, of: fx.Node) -> fx.Node | None:
        """A node that computes the size, from no other choice of rows than ``of`` is made by: the choice may itself depend on
        what the size is for.
        """
        node: fx.Node
        for node in self.graph.nodes:
            val = value(node)
            same = isinstance(val, torch.SymInt) and same_size(val.node.expr, dim)
            if same and node.op == "call_function" and _choices(node) <= _choices(of):
                return node
        return None

    def add(self, a: fx.Node | int, b: fx.Node | int, origin: fx.Node) -> fx.Node | int:
        """The sum of two sizes."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0:
            return b
        return a if b == 0 else self.call(operator.add, a, b, origin=origin)

    def with_batch(self, x: fx.Node, ndim: int, batch: int, index: fx.Node) -> fx.Node:
        """``x`` of ``ndim`` dimensions whose batch axis has the size of the index's: axes of size 1 are put before,
        an axis of size 1 is expanded (a mask or RoPE values shared by all samples).
        """
        while rank(x) < ndim:
            x = self.call(aten.unsqueeze.default, x, 0, origin=x)
        if is_one(x, batch) and not is_one(index, 0):
            sizes: list[Any] = [-1] * ndim
            sizes[batch] = self.size(index, 0)
            x = self.call(aten.expand.default, x, sizes, origin=x)
        return x

    def select(self, x: fx.Node, index: fx.Node, dim: int = 1, batch: int = 0) -> fx.Node:
        """Rows ``index`` of ``x``; a ``drop`` where ``x`` is the residual stream."""
        if x.meta.get(RESIDUAL) and (dim, batch) == (1, 0):
            node = self.call(tokgraph.drop.default, x, index, origin=x)
            node.meta[RESIDUAL] = True
            return node
        return self.call(tokgraph.select.default, x, index, dim, batch, origin=x)

    def chain(self, x: fx.Node, indices: Iterable[fx.Node], dim: int = 1, batch: int = 0) -> fx.Node:
        """``x`` narrowed by one index after the other, each relative to the rows the one before left."""
        for index in indices:
            x = self.select(x, index, dim, batch)
        return x


def _choices(node: fx.Node) -> set[fx.Node]:
    """The choices of rows that a node depends on."""
    return {n for n in ancestors([node]) if n.target is tokgraph.keep_rows.default}


def _nodes(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tree, found.append)
    return found


def _hashable(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def read_instead(
    emit: Emitter, reader: fx.Node, operand: fx.Node, old: fx.Node, new: fx.Node, places: Sequence[int] = ()
) -> None:
    """Let a reader that gets ``old`` by ``operand`` read ``new``; arguments are those of :func:`narrowed`."""
    reader.replace_input_with(operand, narrowed(emit, operand, old, new, places))


def narrowed(
    emit: Emitter, operand: fx.Node, old: fx.Node, new: fx.Node, places: Sequence[int] = (), copied: bool = False
) -> fx.Node:
    """What a reader of ``old`` through copies and a view of merged rows is to read for ``new``; what others read stays.

    Args:
        emit: where nodes go.
        operand: what it reads: ``old`` itself, or the last of the operators between.
        old: the value.
        new: the value with fewer rows.
        places: at each ``cat`` between, from the reader on, which of its operands leads to ``old``.
        copied: the operators between are made anew, also where nothing else reads them.
    """
    between = way_to(old, operand, places)
    shared = copied or any(len(node.users) > 1 or node.target is aten.cat.default for node, _ in between)
    for node, place in reversed(between):
        args = [new, *node.args[1:]]
        if node.target is aten.cat.default:
            args[0] = [new if i == place else x for i, x in enumerate(argument(node, "tensors"))]
        if traits(node.target).reshape:
            args[1] = [-1, *list(node.args[1])[1:]]  # type: ignore[arg-type]
        if shared:
            new = emit.call(node.target, *args, origin=node, **node.kwargs)
        else:
            node.args = tuple(args)
            new = node
    return new


def way_to(value: fx.Node, operand: fx.Node, places: Sequence[int]) -> list[tuple[fx.Node, int]]:
    """The operators from what is read down to a value, and which operand of each leads there: of joins, what ``places`` say."""
    found: list[tuple[fx.Node, int]] = []
    left = list(places)
    while operand is not value:
        joins = operand.target is aten.cat.default
        found.append((operand, left.pop(0) if joins else 0))
        operand = argument(operand, "tensors")[found[-1][1]] if joins else first_input(operand)
    return found


def hoist(graph: fx.Graph, node: fx.Node) -> None:
    """Move a node, and what it is computed from, to right after the inputs: it can then be read anywhere."""
    above = ancestors([node])
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for n in [n for n in graph.nodes if n in above and n.op != "placeholder"]:
        last.append(n)
        last = n


def remove_dead_code(graph: fx.Graph) -> None:
    """Remove calls that nothing reads, random ones as well: torch keeps a dead attention, whose dropout may draw numbers.

    What writes into a buffer stays.
    """
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or is_check(node) or is_write(node))


def refresh_after(graph: fx.Graph, changed: Iterable[fx.Node]) -> None:
    """Recompute the values that depend on nodes whose shape changed, as far as shapes keep changing."""
    dirty, values = set(changed), Values(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node not in dirty and any(x in dirty for x in node.all_input_nodes):
            before = tensor(node)
            values.refresh(node)
            after = tensor(node)
            if before is None or after is None or not same_sizes(sizes_of(before), sizes_of(after)):
                dirty.add(node)

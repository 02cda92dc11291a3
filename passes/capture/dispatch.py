"""Experts that take their rows in order: rows that were sorted by expert for a grouped product, and put back behind it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, axis_argument, dims, rank, same_size, same_sizes, tensor, tensor_inputs

from ..contract import GraphPass
from ..emitter import Emitter
from ..rules import axis_map, traits
from ..rules.registry import first_input

aten = torch.ops.aten
_SORTS = (aten.sort.default, aten.sort.stable)
_TAKES = (aten.index.Tensor, aten.index_select.default)
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""Products of sorted rows, the groups one after the other, each with its own matrix: ``(rows, matrices, ends)``."""


@dataclass(frozen=True)
class RowsInOrder(GraphPass):
    """Takes back that rows are sorted, where what is computed of them row by row is put back into their order.

    ``f(x[order])[inverse]`` is ``f(x)`` if ``f`` works row by row, and a product of rows that are sorted by group is one
    of each row with the matrix of its group (``tokgraph.grouped_mm``, which sorts them inside). Rows of which several
    are added to one (``index_add``) are repeated rows that are summed. What reads the order in any other way, as a limit on
    the rows of an expert does, is left as it is.
    """

    name: ClassVar[str] = "rows-in-order"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Follow every order of a list, and rebuild what is put back."""
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        for node in list(graph.nodes):
            keys = _sorted_keys(node)
            if keys is not None:
                _Order(emit, node, keys).run()
        graph.eliminate_dead_code()


def _sorted_keys(node: fx.Node) -> fx.Node | None:
    """The list whose order a node is."""
    if node.target is aten.argsort.default:
        x = first_input(node)
        return x if rank(x) == 1 and not argument(node, "descending", False) else None
    if node.target is operator.getitem and node.args[1] == 1 and first_input(node).target in _SORTS:
        sort = first_input(node)
        x = first_input(sort)
        return x if rank(x) == 1 and not argument(sort, "descending", False) else None
    return None


class _Order:
    """What is computed of the rows that one order takes.

    Args:
        emit: where nodes go.
        order: a permutation of a list.
        keys: the list that it sorts.
    """

    def __init__(self, emit: Emitter, order: fx.Node, keys: fx.Node) -> None:
        self._emit, self._order, self._keys = emit, order, keys
        self._size = dims(keys)[0]
        self._inverse: set[fx.Node] = set()
        self._natural: dict[fx.Node, fx.Node] = {}
        if order.target is operator.getitem:
            values = (user for user in first_input(order).users if user.args[1] == 0)
            self._natural |= dict.fromkeys(values, keys)

    def run(self) -> None:
        """Find the rows in their own order, node by node, and put them where the others are put back."""
        self._natural[self._order] = self._emit.call(
            aten.arange.default,
            self._emit.size(self._keys, 0),
            device=self._order.meta["val"].device,
            origin=self._order,
        )
        for node in list(self._emit.graph.nodes):
            if node in self._natural or not any(x in self._natural or x in self._inverse for x in node.all_input_nodes):
                continue
            if self._is_inverse(node):
                self._inverse.add(node)
                continue
            back = self._put_back(node)
            if back is not None:
                node.replace_all_uses_with(back)
            elif (made := self._taken(node) or self._grouped(node) or self._row_by_row(node)) is not None:
                self._natural[node] = made

    def _is_inverse(self, node: fx.Node) -> bool:
        if _sorted_keys(node) is self._order:
            return True
        if node.target is aten.index_put.default and not argument(node, "accumulate", False):
            indices, values = argument(node, "indices"), argument(node, "values")
            counts = values.target is aten.arange.default and rank(node) == 1 and self._fills(values)
            return indices == [self._order] and counts and self._fills(node)
        return False

    def _fills(self, node: fx.Node) -> bool:
        """Whether a value has as many rows as are sorted."""
        return rank(node) > 0 and same_size(dims(node)[0], self._size)

    def _put_back(self, node: fx.Node) -> fx.Node | None:
        """What a node that puts rows back returns, from rows in their own order."""
        if node.target in _TAKES:
            x, index = first_input(node), _taken_at(node)
            return self._natural.get(x) if index in self._inverse and x in self._natural else None
        if node.target is aten.index_put.default:
            x = argument(node, "values")
            whole = argument(node, "indices") == [self._order] and self._fills(node) and self._fills(x)
            alike = x in self._natural and rank(x) == rank(node) and not argument(node, "accumulate", False)
            return self._natural[x] if whole and alike else None
        if node.target is aten.index_copy.default and axis_argument(node, node) == 0:
            x = argument(node, "source")
            return self._natural.get(x) if argument(node, "index") is self._order and self._fills(node) else None
        return self._added(node)

    def _added(self, node: fx.Node) -> fx.Node | None:
        """Rows that are added to those of another value, several to each."""
        names = {aten.index_add.default: "source", aten.scatter_add.default: "src"}
        if node.target not in names or axis_argument(node, node) != 0 or argument(node, "alpha", 1) != 1:
            return None
        into, index, x = first_input(node), argument(node, "index"), argument(node, names[node.target])
        while node.target is aten.scatter_add.default and index.target in (aten.expand.default, aten.unsqueeze.default):
            index = first_input(index)
        if into in self._natural or x not in self._natural or rank(index) != 1 or not self._fills(x):
            return None
        rows, times = self._natural[x], self._divided(index)
        if times is None or rank(rows) != rank(into) or not same_sizes(dims(rows)[1:], dims(into)[1:]):
            return None
        if not same_size(dims(into)[0] * times, self._size):
            return None
        if times != 1:
            sizes = [self._emit.size(into, 0), times, *(self._emit.size(rows, i) for i in range(1, rank(rows)))]
            rows = self._emit.call(aten.reshape.default, rows, sizes, origin=node)
            rows = self._emit.call(aten.sum.dim_IntList, rows, [1], origin=node)
        return self._emit.call(aten.add.Tensor, into, rows, origin=node)

    def _divided(self, index: fx.Node) -> int | None:
        """How many rows that are sorted have one place, where places are the order divided by a number."""
        if index is self._order:
            return 1
        floors = index.target in (aten.floor_divide.default, aten.floor_divide.Scalar) or (
            index.target in (aten.div.Tensor_mode, aten.div.Scalar_mode) and argument(index, "rounding_mode") == "floor"
        )
        by = index.args[1] if floors and index.args[0] is self._order else None
        return by if isinstance(by, int) and by > 0 else None

    def _taken(self, node: fx.Node) -> fx.Node | None:
        """Rows of a value, taken in that order, in their own."""
        index = _taken_at(node)
        x = first_input(node) if index is not None else node
        if index not in self._natural or x in self._natural:
            return None
        times = self._divided(index)
        if times is not None and same_size(dims(x)[0] * times, self._size):
            return x if times == 1 else self._emit.call(aten.repeat_interleave.self_int, x, times, 0, origin=node)
        return self._emit.call(aten.index.Tensor, x, [self._natural[index]], origin=node)

    def _grouped(self, node: fx.Node) -> fx.Node | None:
        """A product of sorted rows, the groups one after the other."""
        name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
        if name.partition(".")[0] not in _GROUPED or len(tensor_inputs(node)) != 3:
            return None
        x, weight, ends = tensor_inputs(node)
        if x not in self._natural or rank(x) != 2 or rank(weight) != 3 or not self._counts(ends, weight):
            return None
        if len({y.meta["val"].dtype for y in (x, weight, node)}) > 1:
            return None
        return self._emit.call(torch.ops.tokgraph.grouped_mm.default, self._natural[x], weight, self._keys, origin=node)

    def _counts(self, ends: fx.Node, weight: fx.Node) -> bool:
        """Whether a value says where each group ends: the running sum of how many rows each has."""
        ends = _behind_copies(ends)
        if ends.target is not aten.cumsum.default:
            return False
        counts, groups = _behind_copies(first_input(ends)), dims(weight)[0]
        if counts.target is aten.histc.default:
            low, high = argument(counts, "min", 0), argument(counts, "max", 0)
            whole = (low, high) == (0, groups - 1) and argument(counts, "bins", 100) == groups
            return whole and self._are_keys(_behind_copies(first_input(counts)))
        if counts.target is aten.sum.dim_IntList and not argument(counts, "keepdim", False):
            each = _behind_copies(first_input(counts))
            chosen = each.target is aten.one_hot.default and rank(each) == 2 and same_size(dims(each)[1], groups)
            over = argument(counts, "dim") in ([0], [-2])
            return chosen and over and self._are_keys(first_input(each))
        return counts.target is aten.bincount.default and self._are_keys(first_input(counts))

    def _are_keys(self, x: fx.Node) -> bool:
        """Whether a value lists what is sorted, in whatever order."""
        if x is self._keys or self._natural.get(x) is self._keys:
            return True
        listed = traits(x.target).reshape and traits(self._keys.target).reshape and rank(x) == 1
        return listed and first_input(x) is first_input(self._keys)

    def _row_by_row(self, node: fx.Node) -> fx.Node | None:
        """Anything else that works on each row alone."""
        described = axis_map(node) if tensor(node) is not None else None
        sources = {x for x in node.all_input_nodes if x in self._natural}
        if described is None or not described.rows or any(x in self._inverse for x in node.all_input_nodes):
            return None
        drawn = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        if set(described.rows[0] or ()) != {(x, 0) for x in sources} or drawn:
            return None
        if traits(node.target).reshape and not same_size(dims(node)[0], self._size):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda x: self._natural.get(x, x))
        return self._emit.call(node.target, *args, origin=node, **kwargs)


def _taken_at(node: fx.Node) -> fx.Node | None:
    """The one list of positions by which a node takes rows of a value."""
    if node.target is aten.index.Tensor:
        indices = argument(node, "indices")
        found = indices[0] if len(indices) == 1 else None
    elif node.target is aten.index_select.default and axis_argument(node, first_input(node)) == 0:
        found = argument(node, "index")
    else:
        return None
    return found if isinstance(found, fx.Node) and rank(found) == 1 else None


def _behind_copies(node: fx.Node) -> fx.Node:
    while traits(node.target).copies:
        node = first_input(node)
    return node

"""How a graph takes some rows of a value, and how it puts rows back: by a mask, by positions, or by ranges of positions."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from tokgraph.ir.node import Dim, ancestors, argument, axis_argument, dims, rank, same_size, same_sizes, tensor, value

from ..rules import traits
from ..rules.registry import first_input

aten = torch.ops.aten
_WIDE = 2**31
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class Route:
    """Which rows of a value are meant; equal where the same rows are meant in the same order.

    Args:
        kind: ``"mask"``: the true places of a mask over neighbouring axes; ``"list"``: positions along one axis;
            ``"samples"``: positions along one axis, others in each sample; ``"range"``: positions one after the other.
        axis: the first of these axes.
        by: the mask's or the positions' value, or the first and the last but one position of the range.
        index: the node that holds mask or positions, or the value whose range it is; not compared.
    """

    kind: Literal["mask", "list", "samples", "range"]
    axis: int
    by: Any
    index: fx.Node | None = field(default=None, compare=False)

    @property
    def axes(self) -> int:
        """How many axes of the value one axis of the taken rows stands for."""
        return rank(self.index) if self.kind == "mask" and self.index is not None else 1

    @property
    def before(self) -> int:
        """How many axes of the value are before those that its mask has."""
        return 0 if self.kind == "samples" else self.axis

    def whole(self, x: fx.Node) -> Dim:
        """How many rows there are of which it means some."""
        return product(dims(x)[self.axis : self.axis + self.axes])


@dataclass(frozen=True)
class Put:
    """A node that puts rows into a value.

    Args:
        into: the value.
        rows: the rows.
        route: their places.
        adds: they are added to what is there.
        joins: they are put into nothing: the value is what all rows that it gets are joined to.
    """

    into: fx.Node
    rows: fx.Node
    route: Route
    adds: bool = False
    joins: bool = False


class Routes:
    """Reads takes and puts off the nodes of a graph; masks and positions that are computed alike are one."""

    def __init__(self) -> None:
        self._keys: dict[fx.Node, int] = {}
        self._numbers: dict[Any, int] = {}

    def taken(self, node: fx.Node) -> Route | None:
        """The rows of its first input that a node is."""
        if node.op != "call_function" or tensor(node) is None:
            return None
        if node.target is aten.index.Tensor:
            return self._indexed(argument(node, "indices"), dims(first_input(node)))
        if node.target is aten.index_select.default:
            return self._listed(argument(node, "index"), axis_argument(node, first_input(node)))
        if node.target is aten.gather.default:
            return self._spread(argument(node, "index"), axis_argument(node, first_input(node)), first_input(node))
        if node.target is aten.slice.Tensor and argument(node, "step", 1) == 1:
            return self._ranged(node, first_input(node), node)
        return None

    def puts(self, node: fx.Node) -> tuple[Put, ...]:
        """What a node puts where."""
        if node.op != "call_function" or tensor(node) is None:
            return ()
        if node.target is aten.cat.default:
            return _joined(node)
        into, rows, route, adds = self._put(node) or (node, None, None, False)
        if rows is None or route is None or rank(into) <= route.axis + route.axes:
            return ()
        alike = rows.meta["val"].dtype is into.meta["val"].dtype and rank(rows) == rank(into) - route.axes + 1
        features = alike and same_sizes(dims(rows)[route.axis + 1 :], dims(into)[route.axis + route.axes :])
        return (Put(into, rows, route, adds),) if features else ()

    def _put(self, node: fx.Node) -> tuple[fx.Node, fx.Node, Route | None, bool] | None:
        into = first_input(node) if node.args and isinstance(node.args[0], fx.Node) else node
        if node.target is aten.index_put.default:
            route = self._indexed(argument(node, "indices"), dims(into))
            return into, argument(node, "values"), route, bool(argument(node, "accumulate", False))
        if node.target is aten.index_copy.default:
            route = self._listed(argument(node, "index"), axis_argument(node, into))
            return into, argument(node, "source"), route, False
        if node.target is aten.index_add.default and argument(node, "alpha", 1) == 1:
            route = self._listed(argument(node, "index"), axis_argument(node, into))
            return into, argument(node, "source"), route, True
        if node.target in (aten.scatter.src, aten.scatter_add.default):
            route = self._spread(argument(node, "index"), axis_argument(node, into), into)
            return into, argument(node, "src"), route, node.target is aten.scatter_add.default
        if node.target is aten.slice_scatter.default and argument(node, "step", 1) == 1:
            rows = argument(node, "src")
            return into, rows, self._ranged(node, into, rows) if rank(rows) == rank(into) else None, False
        if node.target is aten.masked_scatter.default:
            mask = _narrow(argument(node, "mask"))
            whole = rank(mask) < rank(into) and same_sizes(dims(mask), dims(into)[: rank(mask)])
            return into, argument(node, "source"), self._masked(mask, 0) if whole else None, False
        return None

    def _ranged(self, node: fx.Node, x: fx.Node, rows: fx.Node) -> Route | None:
        """The range of an axis of ``x`` that a slice or a write of one names; ``rows`` has as many."""
        axis = axis_argument(node, x)
        size, count = dims(x)[axis], dims(rows)[axis]
        starts, ends = (_bounds(argument(node, name), size) for name in ("start", "end"))
        found = [(a, b) for a in starts or [0] for b in ends or [size] if same_size(b - a, count)]
        return Route("range", axis, found[0], x) if len(found) == 1 and axis < rank(x) - 1 else None

    def _indexed(self, indices: list[fx.Node | None], sizes: tuple[Dim, ...]) -> Route | None:
        given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
        if not given or [axis for axis, _ in given] != list(range(given[0][0], given[0][0] + len(given))):
            return None
        axis, first = given[0]
        if len(given) == 1:
            if tensor(first) is not None and first.meta["val"].dtype is torch.bool:
                whole = same_sizes(dims(first), sizes[axis : axis + rank(first)])
                return self._masked(first, axis) if whole else None
            return self._listed(first, axis)
        columns = [_column(i) for _, i in given]
        masks = {self.key(c[0]) for c in columns if c is not None}
        if None not in columns and len(masks) == 1:
            mask = columns[0][0]  # type: ignore[index]
            counted = [c[1] for c in columns if c is not None] == list(range(rank(mask)))
            whole = counted and same_sizes(dims(mask), sizes[axis : axis + rank(mask)])
            return self._masked(mask, axis) if whole else None
        if len(given) == 2 and axis == 0 and _counts(first, sizes[0]) and _is_list(given[1][1], 2):
            return Route("samples", 1, self.key(given[1][1]), given[1][1])
        return None

    def _masked(self, mask: fx.Node, axis: int) -> Route:
        return Route("mask", axis, self.key(mask), mask)

    def _listed(self, index: fx.Node, axis: int) -> Route | None:
        column = _column(index)
        if column is not None and rank(column[0]) == 1:
            return self._masked(column[0], axis)
        return Route("list", axis, self.key(index), index) if _is_list(index, 1) else None

    def _spread(self, index: fx.Node, axis: int, x: fx.Node) -> Route | None:
        """Of an index as ``gather`` and ``scatter`` take it: the same for all features."""
        if index.target is not aten.expand.default or rank(index) != rank(x):
            return None
        narrow = _narrow(index)
        if narrow.target is aten.nonzero.default and rank(first_input(narrow)) == 1 and axis == 0:
            return self._masked(first_input(narrow), 0)
        if rank(narrow) == 2 and axis == 1 and _is_list(narrow, 2):
            return Route("samples", 1, self.key(narrow), narrow)
        return self._listed(narrow, axis) if rank(narrow) == 1 and axis == 0 else None

    def key(self, node: fx.Node) -> int:
        """Equal for values that are computed alike."""
        for x in [] if node in self._keys else sorted(ancestors([node])):
            if x not in self._keys:
                pure = x.op == "call_function" and isinstance(x.target, torch._ops.OpOverload)
                drawn = pure and torch.Tag.nondeterministic_seeded in x.target.tags  # type: ignore[union-attr]
                said: Any = x
                if pure and not drawn:
                    keys = [self._keys[y] for y in x.all_input_nodes]
                    order = {y: f"%{i}" for i, y in enumerate(x.all_input_nodes)}
                    said = (x.target, *keys, repr(fx.node.map_arg((x.args, x.kwargs), order.__getitem__)))
                self._keys[x] = self._numbers.setdefault(said, len(self._numbers))
        return self._keys[node]


def product(sizes: Iterable[Dim]) -> Dim:
    """How many elements axes of these sizes have."""
    found: Dim = 1
    for size in sizes:
        found = found * size
    return found


def _joined(node: fx.Node) -> tuple[Put, ...]:
    """The parts of a sequence that a node joins."""
    parts = argument(node, "tensors")
    axis = axis_argument(node, node)
    if axis == rank(node) - 1 or len(parts) < 2 or any(rank(x) != rank(node) for x in parts):
        return ()
    found, start = [], 0
    for x in parts:
        end = start + dims(x)[axis]
        found.append(Put(node, x, Route("range", axis, (start, end), node), joins=True))
        start = end
    return tuple(found)


def _bounds(bound: Any, size: Dim) -> list[Dim]:
    """The positions that a bound of a slice may be, counted from either end; none where it is none."""
    if isinstance(bound, fx.Node):
        bound = value(bound)
    if isinstance(bound, torch.SymInt):
        bound = bound.node.expr
    if isinstance(bound, int):
        return [] if bound >= _WIDE else [size + bound] if bound < 0 else [bound]
    return [] if bound is None else [bound, size + bound]


def _narrow(index: fx.Node) -> fx.Node:
    """An index or a mask without the axes of size 1 behind it that were broadcast over features."""
    while index.target is aten.expand.default or _adds_an_axis(index):
        index = first_input(index)
    return index


def _adds_an_axis(node: fx.Node) -> bool:
    """Whether a node is its input with one axis of size 1 more, behind the others."""
    if node.target is aten.unsqueeze.default:
        return axis_argument(node, node) == rank(node) - 1
    return node.target in _RESHAPES and same_sizes(dims(node), (*dims(first_input(node)), 1))


def _column(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The mask of whose true places a node lists the positions along one axis, and the axis."""
    while traits(node.target).copies:
        node = first_input(node)
    if node.target is aten.nonzero.default:
        return (first_input(node), 0) if rank(first_input(node)) == 1 else None
    if node.target is operator.getitem:
        several = first_input(node)
        column = node.args[1]
    elif node.target is aten.select.int and axis_argument(node, first_input(node)) == 1:
        several, column = first_input(node), argument(node, "index")
    elif node.target in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, *_RESHAPES) and rank(node) == 1:
        several, column = first_input(node), 0
        if several.target is not aten.nonzero.default or rank(first_input(several)) != 1:
            return None
    else:
        return None
    if several.target in (aten.unbind.int, aten.nonzero_numpy.default):
        if several.target is aten.unbind.int and argument(several, "dim", 0) not in (1, -1):
            return None
        several = first_input(several) if several.target is aten.unbind.int else several
    if several.target not in (aten.nonzero.default, aten.nonzero_numpy.default) or not isinstance(column, int):
        return None
    mask = first_input(several)
    boolean = mask.meta["val"].dtype is torch.bool
    return (mask, column % rank(mask)) if boolean and rank(mask) else None


def _counts(node: fx.Node, samples: Dim) -> bool:
    """Whether a node is ``[samples, 1]``, each sample's number."""
    arange = node
    while arange.target in (aten.unsqueeze.default, *_RESHAPES) or traits(arange.target).copies:
        arange = first_input(arange)
    counts = arange.target is aten.arange.default or (
        arange.target in (aten.arange.start, aten.arange.start_step)
        and argument(arange, "start", 0) == 0
        and argument(arange, "step", 1) == 1
    )
    return counts and rank(node) == 2 and same_sizes(dims(node), (samples, 1))


def _is_list(index: fx.Node, ndim: int) -> bool:
    val = tensor(index)
    return val is not None and val.dim() == ndim and val.dtype in (torch.int64, torch.int32)

"""Rows of routed values are taken where they are computed, and put back: work on rows that a mask leaves out disappears."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import CallMethodKey
from torch.utils import _pytree as pytree

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, dims, rank, tensor, tensor_inputs

from ..contract import GraphPass
from ..emitter import Emitter, remove_dead_code
from ..rules import axis_map, traits
from ..rules.registry import first_input, is_one

aten = torch.ops.aten
routed = torch.ops.tokgraph.routed.default
Axes = tuple[int, ...]
_HARMLESS = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default, aten.where.self, aten.expand.default,
    aten.unsqueeze.default, aten.reshape.default, aten.slice.Tensor, aten.select.int, aten.cat.default,
)  # fmt: skip
"""Operators that take less time for all rows than to find some, and have a gradient of 0 where it is asked for with 0."""


@dataclass(frozen=True)
class TakeRoutedRows(GraphPass):
    """``routed(mask, f(x), out)`` becomes ``out[mask] = f(x[mask])``, as a model writes it that has experts for modalities.

    Where the mask is a list of positions that no plan has narrowed, the list is used, and sizes stay those that it has;
    else the true places are counted on each batch. Where ``f`` only adds, multiplies and copies, both values of every row are
    computed and one is chosen: of anything else, rows that are not asked for may have no value (``log`` of 0), and a gradient
    of 0 for them is none.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "take-routed-rows"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace every routed value."""
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=routed):
            groups.setdefault(first_input(node), []).append(node)
        for mask, ends in groups.items():
            axes = _axes(mask, ends[0])
            region = _region(mask, ends, axes) if axes is not None else {}
            if not all(node.target in _HARMLESS or traits(node.target).copies for node in region):
                _Taken(emit, mask, axes or (), region).replace(ends)
            else:
                for node in ends:
                    node.target = aten.where.self
        remove_dead_code(graph)


def _axes(mask: fx.Node, whole: fx.Node) -> Axes | None:
    """The axes of a value along which its mask tells rows apart: samples and rows, or rows that are those of all samples."""
    more = rank(whole) - rank(mask)
    axes = tuple(axis + more for axis in range(rank(mask)) if not is_one(mask, axis))
    return axes if len(axes) == 1 or axes == (0, 1) else None


def _region(mask: fx.Node, ends: Sequence[fx.Node], axes: Axes) -> dict[fx.Node, Axes]:
    """What is computed row by row and read at the rows of the mask alone -> its axes that count them."""
    found: dict[fx.Node, Axes] = {}
    above: set[fx.Node] = {node.args[1] for node in ends}  # type: ignore[misc]
    ended = set(ends)
    while above:
        node = max(above)
        above.remove(node)
        places = {found_at for user in node.users if (found_at := _read_at(user, node, found, ended, axes)) is not None}
        alone = all(_read_at(user, node, found, ended, axes) is not None for user in node.users)
        if alone and len(places) == 1 and _row_by_row(node, (at := places.pop())):
            found[node] = at
            above |= {x for x in tensor_inputs(node) if _at(node, x, at) is not None and x not in found}
    whole = {node for node in found if node.target is operator.getitem and first_input(node) not in found}
    return {node: at for node, at in found.items() if node not in whole}  # rows are taken of tensors, not of several


def _read_at(user: fx.Node, x: fx.Node, found: dict[fx.Node, Axes], ends: set[fx.Node], axes: Axes) -> Axes | None:
    """The axes of a value whose rows a user reads at the mask alone."""
    if user in ends:
        return axes if user.args[1] is x and x not in (user.args[0], user.args[2]) else None
    return _at(user, x, found[user]) if user in found else None


def _at(node: fx.Node, x: fx.Node, axes: Axes) -> Axes | None:
    """The axes of an input that some axes of a call follow, all of them."""
    described = axis_map(node)
    assert described is not None
    found = [[j for y, j in described.rows[axis] or () if y is x] for axis in axes]
    return tuple(each[0] for each in found) if all(len(each) == 1 for each in found) else None


def _row_by_row(node: fx.Node, axes: Axes) -> bool:
    """Whether a call computes each of these rows from those of its inputs, and can be made on fewer of them."""
    described = axis_map(node) if node.op == "call_function" and tensor(node) is not None else None
    if described is None or _draws(node) or not all(described.rows[axis] for axis in axes):
        return False
    followed = {source for axis in axes for source in described.rows[axis] or ()}
    elsewhere = {s for axis, rows in enumerate(described.rows) if axis not in axes for s in rows or ()}
    if followed & elsewhere or any(described.mixed(source) for source in followed):
        return False
    return all(_can_take(node, x, axes) for x in tensor_inputs(node))


def _can_take(node: fx.Node, x: fx.Node, axes: Axes) -> bool:
    """Whether rows of an input can be taken: of its own, or of one that stands for all samples, or all rows."""
    at = _at(node, x, axes)
    if at is not None:
        return at == tuple(range(at[0], at[0] + len(at)))
    described = axis_map(node)
    assert described is not None
    partly = any(y is x for axis in axes for y, _ in described.rows[axis] or ())
    return not partly or (traits(node.target).broadcasts and axes == (0, 1))


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


class _Taken:
    """Computes a region on the rows of its mask.

    Args:
        emit: where nodes go.
        mask: the mask, with axes of size 1 behind those that count rows.
        axes: these axes, of the value that it chooses rows of.
        region: what is computed -> its axes.
    """

    def __init__(self, emit: Emitter, mask: fx.Node, axes: Axes, region: dict[fx.Node, Axes]) -> None:
        self._emit, self._mask, self._axes, self._region = emit, mask, axes, region
        self._index = _listed(mask) if len(axes) == 1 else None
        if self._index is None:
            self._index = self._true_places()
        self._new: dict[fx.Node, fx.Node] = {}

    def _true_places(self) -> fx.Node:
        """The places of the mask, in order, ``[rows]``."""
        flat = self._emit.call(aten.reshape.default, self._mask, [-1], origin=self._mask)
        found = self._emit.call(aten.nonzero.default, flat, origin=self._mask)
        rows = dims(found)[0]
        if not isinstance(rows, int):
            found.meta["unbacked_bindings"] = {rows: (CallMethodKey("size"), pytree.SequenceKey(0))}
        return self._emit.call(aten.squeeze.dim, found, 1, origin=self._mask)

    def replace(self, ends: Sequence[fx.Node]) -> None:
        """Compute the rows that are taken, and put them back."""
        for node in sorted(self._region):
            self._new[node] = self._call(node)
        for node in ends:
            rows, into = node.args[1:]
            assert isinstance(rows, fx.Node)
            assert isinstance(into, fx.Node)
            mine = self._new[rows] if rows in self._region else self._take(rows, self._axes)
            put = self._put(mine, into, node)
            node.target, node.args, node.kwargs = put.target, put.args, put.kwargs  # under its name, as facts know it

    def _call(self, node: fx.Node) -> fx.Node:
        axes = self._region[node]
        new = {x: self._input(node, x, axes) for x in tensor_inputs(node)}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda x: new.get(x, x))
        if traits(node.target).sized:
            sizes: list[Any] = list(args[1])  # type: ignore[arg-type]
            if len(axes) == 2:
                sizes[axes[0]] = 1
            if not isinstance(sizes[axes[-1]], int) or sizes[axes[-1]] != -1:
                sizes[axes[-1]] = self._emit.size(self._index, 0)  # type: ignore[arg-type]
            args = (args[0], sizes, *args[2:])
        return self._emit.call(node.target, *args, origin=node, **kwargs)

    def _input(self, node: fx.Node, x: fx.Node, axes: Axes) -> fx.Node:
        """An input at the rows of the mask."""
        at = _at(node, x, axes)
        if at is not None:
            return self._new[x] if x in self._region else self._take(x, at)
        described = axis_map(node)
        assert described is not None
        if not any(y is x for axis in axes for y, _ in described.rows[axis] or ()):
            return x
        whole = x
        while rank(whole) < rank(node):
            whole = self._emit.call(aten.unsqueeze.default, whole, 0, origin=x)
        sizes: list[Any] = [-1] * rank(whole)
        for axis in axes:
            sizes[axis] = self._emit.size(node, axis)
        return self._take(self._emit.call(aten.expand.default, whole, sizes, origin=x), axes)

    def _take(self, x: fx.Node, axes: Axes) -> fx.Node:
        """The rows of a value; where samples and rows are counted, as those of one sample."""
        first = axes[0]
        if len(axes) == 1:
            return self._emit.call(aten.index_select.default, x, first, self._index, origin=x)
        flat = self._emit.call(aten.reshape.default, x, self._merged(x, first), origin=x)
        taken = self._emit.call(aten.index_select.default, flat, first, self._index, origin=x)
        return self._emit.call(aten.unsqueeze.default, taken, first, origin=x)

    def _put(self, rows: fx.Node, into: fx.Node, origin: fx.Node) -> fx.Node:
        """A value with the rows at their places."""
        first = self._axes[0]
        if len(self._axes) == 1:
            return self._emit.call(aten.index_put.default, into, [*[None] * first, self._index], rows, origin=origin)
        flat = self._emit.call(aten.reshape.default, into, self._merged(into, first), origin=origin)
        mine = self._emit.call(aten.squeeze.dim, rows, first, origin=origin)
        put = self._emit.call(aten.index_put.default, flat, [self._index], mine, origin=origin)
        sizes = [self._emit.size(into, axis) for axis in range(rank(into))]
        return self._emit.call(aten.reshape.default, put, sizes, origin=origin)

    def _merged(self, x: fx.Node, first: int) -> list[Any]:
        sizes: list[Any] = [self._emit.size(x, axis) for axis in range(rank(x))]
        return [*sizes[:first], -1, *sizes[first + 2 :]]


def _listed(mask: fx.Node) -> fx.Node | None:
    """The positions that a mask was made of."""
    while mask.target in (aten.unsqueeze.default, aten.reshape.default) and len(dims(mask)) - dims(mask).count(1) == 1:
        (mask,) = tensor_inputs(mask)
    if mask.target is not aten.index_put.default or rank(mask) != 1:
        return None
    zeros, indices, true = first_input(mask), argument(mask, "indices"), argument(mask, "values")
    filled = zeros.target is true.target is aten.full.default and (zeros.args[1], true.args[1]) == (False, True)
    index: fx.Node = indices[0]
    return index if filled and rank(index) == 1 and index.meta["val"].dtype is torch.int64 else None

"""Masks of the rows that a route names: what positions and ranges become where every row is computed."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tokgraph.ir.node import Dim, argument, dims, rank, same_size, tensor_inputs, value, where
from tokgraph.ops.checks import TWICE

from ..emitter import Emitter
from ..rules import traits
from .routes import Put

aten = torch.ops.aten
_MADE: dict[Any, tuple[str, int | str]] = {
    aten.new_zeros.default: ("size", 0), aten.new_empty.default: ("size", 0), aten.new_full.default: ("size", "fill_value"),
    aten.zeros.default: ("size", 0), aten.empty.memory_format: ("size", 0), aten.full.default: ("size", "fill_value"),
}  # fmt: skip
"""Operator that makes a tensor of its own -> its argument that lists the sizes, and what fills it, or what argument does."""
_FAR = 32
"""How far back a value is looked for whose axes are merged."""


class Masks:
    """Makes masks.

    Args:
        emit: where nodes go.
    """

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit

    def can(self, put: Put) -> bool:
        """Whether the bounds of a range are known where it is needed."""
        return put.route.kind != "range" or all(self._number(bound) is not None for bound in put.route.by)

    def _times(self, a: fx.Node | int, b: fx.Node | int, origin: fx.Node) -> fx.Node | int:
        return (
            a * b if isinstance(a, int) and isinstance(b, int) else self._emit.call(operator.mul, a, b, origin=origin)
        )

    def of(self, puts: list[Put], into: fx.Node) -> fx.Node:
        """Where rows are put, over the axes that are counted: those of all the given puts."""
        put = puts[0]
        route, axis = put.route, put.route.axis
        if route.kind == "mask":
            assert route.index is not None
            return route.index
        size = self._emit.size(into, axis)
        if route.kind == "range":
            return self._filled(size, self._positions(puts, into, size))
        index = route.index
        assert index is not None
        if route.kind == "list":
            mask = self._filled(size, index)
        else:
            sizes, device = [self._emit.size(into, 0), size], index.meta["val"].device
            zeros = self._emit.call(aten.full.default, sizes, False, dtype=torch.bool, device=device, origin=index)
            mask = self._emit.call(aten.scatter.value, zeros, 1, index, True, origin=index)
        self._check_distinct(mask, index)
        return self._apart(mask, put) if axis == 0 else mask

    def _filled(self, size: fx.Node | int, index: fx.Node) -> fx.Node:
        """``[size]`` bool, true at the positions."""
        device = index.meta["val"].device
        zeros = self._emit.call(aten.full.default, [size], False, dtype=torch.bool, device=device, origin=index)
        true = self._emit.call(aten.full.default, [], True, dtype=torch.bool, device=device, origin=index)
        return self._emit.call(aten.index_put.default, zeros, [index], true, origin=index)

    def _positions(self, puts: list[Put], into: fx.Node, size: fx.Node | int) -> fx.Node:
        """The positions of ranges."""
        device = into.meta["val"].device
        everything = self._emit.call(aten.arange.default, size, device=device, origin=into)
        parts = []
        for put in puts:
            start, end = (self._number(bound) for bound in put.route.by)
            parts.append(self._emit.call(aten.slice.Tensor, everything, 0, start, end, origin=into))
        return parts[0] if len(parts) == 1 else self._emit.call(aten.cat.default, parts, 0, origin=into)

    def _number(self, size: Dim) -> fx.Node | int | None:
        """A size as an argument: a number, or a node that computes it."""
        if isinstance(size, int) or size.is_number:
            return int(size)
        for node in self._emit.graph.nodes:
            val = value(node)
            if isinstance(val, torch.SymInt) and same_size(val.node.expr, size):
                return node  # type: ignore[no-any-return]
        return None

    def _check_distinct(self, mask: fx.Node, index: fx.Node) -> None:
        """Check on every batch that no position is given twice: gradients of its row would count twice."""
        place, val = where(index), index.meta["val"]
        count: Any = self._emit.size(index, 0)
        for axis in range(1, val.dim()):
            count = self._times(count, self._emit.size(index, axis), index)
        many = self._emit.call(aten.sum.default, mask, origin=index)
        right = self._emit.call(aten.eq.Scalar, many, count, origin=index)
        said: tuple[Any, ...] = (TWICE, place.source or "", place.module or "", [], [])
        self._emit.call(torch.ops.tokgraph.check.default, right, *said, origin=index)

    def zeros(self, like: fx.Node) -> fx.Node:
        """Zeros of the shape of a value, which they do not read."""
        sizes, val = [self._emit.size(like, axis) for axis in range(rank(like))], like.meta["val"]
        return self._emit.call(aten.full.default, sizes, 0, dtype=val.dtype, device=val.device, origin=like)

    def base(self, into: fx.Node, put: Put) -> fx.Node:
        """What rows are put into; where it is made for them over axes that were merged, written with these apart."""
        sizes, fill = _MADE.get(into.target, (None, 0))
        two = self._merged(put, dims(into)[0]) if sizes is not None and put.route.axis == 0 else None
        if two is None or sizes is None:
            return into
        val, behind = into.meta["val"], list(argument(into, sizes))[1:]
        fill = argument(into, fill) if isinstance(fill, str) else fill
        made = self._emit.call(
            aten.full.default, [*two, *behind], fill, dtype=val.dtype, device=val.device, origin=into
        )  # of no value: it would be read for its shape, merged
        return self._emit.call(aten.reshape.default, made, [-1, *behind], origin=into)

    def _apart(self, mask: fx.Node, put: Put) -> fx.Node:
        """A mask over axes that were merged, written so that they can be told apart."""
        two = self._merged(put, dims(mask)[0])
        if two is None:
            return mask
        mask = self._emit.call(aten.reshape.default, mask, two, origin=mask)
        return self._emit.call(aten.reshape.default, mask, [-1], origin=mask)

    def _merged(self, put: Put, size: Dim) -> list[fx.Node | int] | None:
        """The sizes of the two axes of which the first one, of rows that are put, was made."""
        seen, stack = 0, [put.into, put.rows]
        while stack and seen < _FAR:
            node, seen = stack.pop(0), seen + 1
            inputs = tensor_inputs(node)
            if node.op == "call_function" and traits(node.target).reshape and rank(inputs[0]) == rank(node) + 1:
                x = inputs[0]
                if same_size(dims(x)[0] * dims(x)[1], size):
                    return [self._emit.size(x, 0), self._emit.size(x, 1)]
            stack += inputs
        return None

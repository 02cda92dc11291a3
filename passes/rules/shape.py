"""Rules of operators that move, split, merge, cut or join axes."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from tokgraph.ir.node import Dim, argument, dims, rank, same_size

from .registry import AxisMap, Mix, Rows, broadcast_rows, first_input, is_one, norm_dim, rule

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
SIZED = frozenset((*VIEWS, aten.expand.default))
"""Operators whose size argument lists the output's sizes in order."""


def _size_before(sizes: tuple[Dim, ...], axis: int) -> Dim:
    product: Dim = sympy.expand(sympy.prod([sympy.sympify(s) for s in sizes[:axis]]))
    return product


@rule(*VIEWS)
def view(node: fx.Node) -> AxisMap:
    """An axis survives when its size and the product of the sizes before it survive: then the element at index ``i``
    of the one is at index ``i`` of the other, whatever the sizes are, so equal integers cannot confuse it.
    """
    x = first_input(node)
    old, new = dims(x), dims(node)
    survivors: list[Rows] = []
    for axis, size in enumerate(new):
        before = _size_before(new, axis)
        match = [j for j, s in enumerate(old) if same_size(s, size) and same_size(_size_before(old, j), before)]
        survivors.append(((x, match[0]),) if match else () if size == 1 else None)
    used = {r[0][1] for r in survivors if r}
    lost = [j for j in range(len(old)) if j not in used and not is_one(x, j)]
    return AxisMap(tuple(survivors), (Mix("layout", tuple((x, j) for j in lost)),) if lost else ())


@rule(aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)
def reshape_like(node: fx.Node) -> AxisMap:
    """Views under other names."""
    return view(node)


@rule(aten.transpose.int)
def transpose(node: fx.Node) -> AxisMap:
    """Swaps two axes."""
    x, n = first_input(node), rank(node)
    i, j = (norm_dim(d, n) for d in node.args[1:3])  # type: ignore[arg-type]
    swap = {i: j, j: i}
    return AxisMap(tuple(((x, swap.get(axis, axis)),) for axis in range(n)))


@rule(aten.t.default)
def t(node: fx.Node) -> AxisMap:
    """Reverses the axes of a matrix."""
    x, n = first_input(node), rank(node)
    return AxisMap(tuple(((x, n - 1 - axis),) for axis in range(n)))


@rule(aten.permute.default)
def permute(node: fx.Node) -> AxisMap:
    """Reorders the axes."""
    x = first_input(node)
    return AxisMap(tuple(((x, norm_dim(d, rank(x))),) for d in argument(node, "dims")))


@rule(aten.unsqueeze.default)
def unsqueeze(node: fx.Node) -> AxisMap:
    """Makes an axis of size 1."""
    x, new = first_input(node), norm_dim(argument(node, "dim"), rank(node))
    return AxisMap(tuple(() if axis == new else ((x, axis - (axis > new)),) for axis in range(rank(node))))


@rule(aten.expand.default)
def expand(node: fx.Node) -> AxisMap:
    """Broadcasts axes of size 1."""
    return AxisMap(tuple(broadcast_rows(node, [first_input(node)])))


@rule(aten.repeat.default)
def repeat(node: fx.Node) -> AxisMap:
    """Axes repeated once are row by row; a repeated axis of size 1 is made anew."""
    x = first_input(node)
    times = argument(node, "repeats")
    rows: list[Rows] = []
    for axis, count in enumerate(times):
        j = axis - (len(times) - rank(x))
        rows.append(() if j < 0 or is_one(x, j) else ((x, j),) if count == 1 else None)
    repeated = [source for axis, source in enumerate(range(rank(x) - len(times), rank(x))) if rows[axis] is None]
    return AxisMap(tuple(rows), tuple(Mix("layout", ((x, j),)) for j in repeated))


@rule(aten.slice.Tensor)
def slice_(node: fx.Node) -> AxisMap:
    """Cuts one axis; a slice of the whole axis is the identity."""
    x = first_input(node)
    cut = norm_dim(argument(node, "dim", 0), rank(x))
    whole = is_whole_slice(node)
    mixes = () if whole else (Mix("layout", ((x, cut),)),)
    return AxisMap(tuple(((x, axis),) if whole or axis != cut else None for axis in range(rank(x))), mixes)


def is_whole_slice(node: fx.Node) -> bool:
    """Whether a slice takes every element of its axis."""
    x = first_input(node)
    cut = norm_dim(argument(node, "dim", 0), rank(x))
    start, step = argument(node, "start"), argument(node, "step", 1)
    return start in (None, 0) and step == 1 and same_size(dims(node)[cut], dims(x)[cut])


@rule(aten.select.int)
def select(node: fx.Node) -> AxisMap:
    """Takes one element of an axis, which disappears."""
    x = first_input(node)
    cut = norm_dim(argument(node, "dim"), rank(x))
    left = [axis for axis in range(rank(x)) if axis != cut]
    return AxisMap(tuple(((x, axis),) for axis in left), (Mix("layout", ((x, cut),)),))


@rule(aten.cat.default, aten.stack.default)
def cat(node: fx.Node) -> AxisMap:
    """Joins along one axis; the others are row by row in every operand."""
    operands = [a for a in argument(node, "tensors") if isinstance(a, fx.Node)]
    joined = norm_dim(argument(node, "dim", 0), rank(node))
    stacked = node.target is aten.stack.default
    rows: list[Rows] = []
    for axis in range(rank(node)):
        if axis == joined:
            rows.append(() if stacked else None)
        else:
            rows.append(tuple((x, axis - (stacked and axis > joined)) for x in operands))
    mixes = () if stacked else (Mix("layout", tuple((x, joined) for x in operands)),)
    return AxisMap(tuple(rows), mixes)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def split(node: fx.Node) -> AxisMap:
    """Cuts one axis into several results."""
    x = first_input(node)
    cut = norm_dim(argument(node, "dim", 0), rank(x))
    if node.target is aten.unbind.int:
        left = [axis for axis in range(rank(x)) if axis != cut]
        return AxisMap(tuple(((x, axis),) for axis in left), (Mix("layout", ((x, cut),)),))
    rows = tuple(None if axis == cut else ((x, axis),) for axis in range(rank(x)))
    return AxisMap(rows, (Mix("layout", ((x, cut),)),))


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(node: fx.Node) -> AxisMap:
    """Pads trailing axes."""
    x = first_input(node)
    amounts = argument(node, "pad")
    padded = {rank(x) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    rows = tuple(None if axis in padded else ((x, axis),) for axis in range(rank(x)))
    return AxisMap(rows, tuple(Mix("layout", ((x, axis),)) for axis in sorted(padded)))


@rule(aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default,
      aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.ones.default,
      aten.zeros.default, aten.empty.memory_format, aten.scalar_tensor.default)  # fmt: skip
def creation(node: fx.Node) -> AxisMap:
    """Makes a tensor out of sizes and numbers: no axis follows an input."""
    return AxisMap(tuple(() for _ in range(rank(node))))

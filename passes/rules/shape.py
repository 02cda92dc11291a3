"""Rules of operators that move, split, merge, cut or join axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul

import sympy
import torch
from torch import fx

from tokgraph.ir.node import Dim, argument, axis_argument, axis_arguments, dims, rank, same_size

from .registry import AxisMap, Group, Mix, Rows, broadcast_rows, first_input, is_one, rule

aten = torch.ops.aten


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, sized=True, reshape=True)
@rule(aten.squeeze.dim, aten.squeeze.dims, axes=("dim",))
@rule(aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default)
def view(node: fx.Node) -> AxisMap:
    """An axis survives when its size and the product of the sizes before it survive: then the element at index ``i``
    of the one is at index ``i`` of the other, whatever the sizes are, so equal integers cannot confuse it.
    """
    x = first_input(node)
    old, new = dims(x), dims(node)
    groups = reshape_groups(old, new)
    same: dict[int, int] = {}
    for group in groups:
        if len(group.inputs) == len(group.outputs) == 1:
            same.setdefault(group.outputs[0], group.inputs[0])
    survivors: list[Rows] = [
        ((x, same[axis]),) if axis in same else () if size == 1 else None for axis, size in enumerate(new)
    ]
    lost = [j for j in range(len(old)) if j not in same.values() and not is_one(x, j)]
    return AxisMap(tuple(survivors), (Mix("layout", tuple((x, j) for j in lost)),) if lost else (), groups=groups)


def reshape_groups(old: Sequence[Dim], new: Sequence[Dim]) -> tuple[Group, ...]:
    """The axes that a reshape of sizes ``old`` to sizes ``new`` keeps, merges and splits, in the order of its input axes.

    Axes correspond where as many elements lie before them in both shapes, and as many in them. That is compared as
    polynomials in the graph's symbols: sizes that only happen to be equal, before other axes, are not confused. Axes of
    size 1 belong to the groups beside them or do not, so groups may overlap. Axes that only correspond several to several,
    as ``[2, 6] -> [4, 3]``, are in no group.
    """
    return _reshape_groups(tuple(map(_expanded, old)), tuple(map(_expanded, new)))


@lru_cache(maxsize=1024)  # blocks reshape alike
def _reshape_groups(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> tuple[Group, ...]:
    before = [_expanded(count) for count in accumulate(old[:-1], mul, initial=1)]
    starts = [_expanded(count) for count in accumulate(new[:-1], mul, initial=1)]
    return tuple(
        group
        for i in range(len(old))
        for j in range(len(new))
        if before[i] == starts[j]
        for group in _groups_from(old, new, i, j)
    )


def _groups_from(old: Sequence[Dim], new: Sequence[Dim], i: int, j: int) -> Iterator[Group]:
    """The groups that begin with input axis ``i`` and output axis ``j``, which lie behind as many elements."""
    for stop, merged in _runs(old, i):
        if merged == new[j]:
            yield Group(range(i, stop), range(j, j + 1))
    for stop, split in _runs(new, j):
        if split == old[i] and stop > j + 1:  # that of one axis is above
            yield Group(range(i, i + 1), range(j, stop))


def _runs(sizes: Sequence[Dim], start: int) -> Iterator[tuple[int, Dim]]:
    """End and number of elements of the runs of neighbouring axes that begin with an axis."""
    elements: Dim = 1
    for axis in range(start, len(sizes)):
        elements = _expanded(elements * sizes[axis])
        yield axis + 1, elements


def _expanded(size: Dim) -> Dim:
    """One form for all ways to write a polynomial."""
    return size if isinstance(size, int) or size.is_Symbol else sympy.expand(size)


@rule(aten.transpose.int, axes=("dim0", "dim1"))
def transpose(node: fx.Node) -> AxisMap:
    """Swaps two axes."""
    x, n = first_input(node), rank(node)
    i, j = axis_arguments(node, x, "dim0", "dim1")
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
    return AxisMap(tuple(((x, axis),) for axis in axis_arguments(node, x, "dims")))


@rule(aten.unsqueeze.default, axes=("dim",))
def unsqueeze(node: fx.Node) -> AxisMap:
    """Makes an axis of size 1."""
    x, new = first_input(node), axis_argument(node, node)
    return AxisMap(tuple(() if axis == new else ((x, axis - (axis > new)),) for axis in range(rank(node))))


@rule(aten.expand.default, sized=True)
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


@rule(aten.repeat_interleave.self_int, axes=("dim",))
def repeat_interleave(node: fx.Node) -> AxisMap:
    """Repeats the elements of one axis, as heads of grouped keys; of none: all axes are merged before."""
    x = first_input(node)
    if argument(node, "dim") is None:
        return AxisMap((None,), tuple(Mix("layout", ((x, axis),)) for axis in range(rank(x))))
    repeated = axis_argument(node, x)
    rows: list[Rows] = [((x, axis),) for axis in range(rank(x))]
    if is_one(x, repeated):
        rows[repeated] = ()  # made anew
    elif argument(node, "repeats") != 1:
        rows[repeated] = None
    return AxisMap(tuple(rows), () if rows[repeated] is not None else (Mix("layout", ((x, repeated),)),))


@rule(aten.slice.Tensor, axes=("dim",))
def slice_(node: fx.Node) -> AxisMap:
    """Cuts one axis; a slice of the whole axis is the identity."""
    x = first_input(node)
    cut = axis_argument(node, x)
    whole = is_whole_slice(node)
    mixes = () if whole else (Mix("layout", ((x, cut),)),)
    return AxisMap(tuple(((x, axis),) if whole or axis != cut else None for axis in range(rank(x))), mixes)


def is_whole_slice(node: fx.Node) -> bool:
    """Whether a slice takes every element of its axis, wherever its start is counted from (``x[:, -n:]`` of ``n``)."""
    x = first_input(node)
    cut = axis_argument(node, x)
    return bool(argument(node, "step", 1) == 1) and same_size(dims(node)[cut], dims(x)[cut])


@rule(aten.glu.default, axes=("dim",))
def glu(node: fx.Node) -> AxisMap:
    """Gates the first half of an axis by the second; the other axes are row by row."""
    x = first_input(node)
    halved = axis_argument(node, x)
    rows: tuple[Rows, ...] = tuple(None if axis == halved else ((x, axis),) for axis in range(rank(x)))
    return AxisMap(rows, (Mix("layout", ((x, halved),)),))


@rule(aten.unfold.default, axes=("dimension",))
def unfold(node: fx.Node) -> AxisMap:
    """Windows of one axis, their elements on a new last one; the other axes are row by row."""
    x = first_input(node)
    cut = axis_argument(node, x, "dimension")
    rows: tuple[Rows, ...] = tuple(None if axis == cut else ((x, axis),) for axis in range(rank(x)))
    return AxisMap((*rows, None), (Mix("window", ((x, cut),)),))


@rule(aten.view_as_real.default, axes=())
def view_as_real(node: fx.Node) -> AxisMap:
    """Real and imaginary parts on a new last axis."""
    x = first_input(node)
    return AxisMap((*(((x, axis),) for axis in range(rank(x))), ()))


@rule(aten.view_as_complex.default, axes=())
def view_as_complex(node: fx.Node) -> AxisMap:
    """Complex numbers of a last axis of size 2."""
    x = first_input(node)
    last = rank(x) - 1
    return AxisMap(tuple(((x, axis),) for axis in range(last)), (Mix("layout", ((x, last),)),))


@rule(aten.select.int, axes=("dim",))
def select(node: fx.Node) -> AxisMap:
    """Takes one element of an axis, which disappears."""
    x = first_input(node)
    cut = axis_argument(node, x)
    left = [axis for axis in range(rank(x)) if axis != cut]
    return AxisMap(tuple(((x, axis),) for axis in left), (Mix("layout", ((x, cut),)),))


@rule(aten.cat.default, aten.stack.default, axes=("dim",))
def cat(node: fx.Node) -> AxisMap:
    """Joins along one axis; the others are row by row in every operand."""
    operands = [a for a in argument(node, "tensors") if isinstance(a, fx.Node)]
    joined = axis_argument(node, node)
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
    cut = axis_argument(node, x)
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


@rule(
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.ones.default,
    aten.zeros.default, aten.empty.memory_format, aten.scalar_tensor.default,
)  # fmt: skip
@rule(aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default, shape_only=True)
def creation(node: fx.Node) -> AxisMap:
    """Makes a tensor out of sizes and numbers: no axis follows an input."""
    return AxisMap(tuple(() for _ in range(rank(node))))

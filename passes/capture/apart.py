"""Calls on values of which some axes are apart: an axis that stands for several is written as those, one after the other."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from tokgraph.ir.node import Dim, argument, dims, rank, same_size, tensor_inputs

from ..emitter import Emitter
from ..rules import axis_map, traits
from ..rules.contraction import einsum_letters
from ..rules.registry import Axis, AxisMap, first_input, is_one

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.matmul.default)
_ORDERS = (aten.transpose.int, aten.t.default, aten.permute.default)
_WITHOUT_AXES = (aten.matmul.default, aten.index.Tensor, aten.expand.default)
OF_RESULT = (aten.unsqueeze.default, aten.stack.default)
"""Operators whose axis arguments count axes of the result."""


@dataclass(frozen=True)
class Apart:
    """A value whose axes are apart, in row-major order equal to one in which some are merged.

    Args:
        value: the value.
        runs: for each axis of the merged value, how many neighbouring axes of ``value`` stand for it.
    """

    value: fx.Node
    runs: tuple[int, ...]

    def fine(self, axis: int) -> range:
        """The axes of the value that stand for an axis of the merged one."""
        start = sum(self.runs[:axis])
        return range(start, start + self.runs[axis])

    def sizes(self, axis: int) -> tuple[Dim, ...]:
        """Their sizes."""
        return tuple(dims(self.value)[i] for i in self.fine(axis))


def call_apart(emit: Emitter, node: fx.Node, apart: Mapping[fx.Node, Apart]) -> Apart | None:
    """The call on values whose axes are apart, if the rules show that it computes the same.

    Args:
        emit: where nodes go.
        node: the call.
        apart: what is known apart; the call reads some of it.
    """
    sources = {x: apart[x] for x in node.all_input_nodes if x in apart}
    described = axis_map(node) if sources else None
    if described is None or not described.rows:
        return None
    repeated = _repeated(emit, node, sources)
    if repeated is not None:
        return repeated
    runs = _runs(node, described, sources)
    if runs is None or _of_rank(node, sum(runs) - len(runs)):
        return None
    made = _made(emit, node, described, sources, runs)
    if made is None:
        return None
    call, operands = made
    return Apart(call, runs) if _computes_same(call, node, runs, operands) else None


def _runs(node: fx.Node, described: AxisMap, sources: Mapping[fx.Node, Apart]) -> tuple[int, ...] | None:
    """How many axes each axis of the result stands for, ``None`` where what it follows does not agree, or a run is mixed."""
    followed: set[Axis] = set()
    runs = []
    for rows in described.rows:
        found = {sources[x].runs[j] if x in sources else 1 for x, j in rows or ()}
        sizes = {sources[x].sizes(j) for x, j in rows or () if x in sources}
        if len(found) > 1 or (len(sizes) > 1 and found != {1}):
            return None
        followed |= set(rows or ())
        runs.append(found.pop() if found else 1)
    lost = ((x, j) for x, y in sources.items() for j, run in enumerate(y.runs) if run > 1 and (x, j) not in followed)
    return None if any(True for _ in lost) else tuple(runs)


def _made(
    emit: Emitter, node: fx.Node, described: AxisMap, sources: Mapping[fx.Node, Apart], runs: Sequence[int]
) -> tuple[fx.Node, dict[fx.Node, Apart]] | None:
    """The call on the axes apart, and what takes the place of each operand."""
    target: Any = node.target
    operands = {x: sources.get(x) or Apart(x, (1,) * rank(x)) for x in tensor_inputs(node)}
    new: dict[fx.Node, fx.Node] = {x: y.value for x, y in sources.items()}
    if target is operator.getitem:
        return emit.call(target, new[first_input(node)], node.args[1], origin=node), operands
    if target in _ORDERS:
        x = first_input(node)
        order = [i for rows in described.rows for _, j in rows or () for i in operands[x].fine(j)]
        if any(run > 1 for run in runs) and order != list(range(len(order))):
            return emit.call(aten.permute.default, new[x], order, origin=node), operands
    if target is aten.addmm.default:
        return _as_linear(emit, node, operands, new)
    if target in _PRODUCTS and _as_einsum(node, operands):
        factors = [x for x in node.args[:2] if isinstance(x, fx.Node)]  # one value may be both
        return _einsum(emit, node, _product_equation(node), factors, operands, new)
    if target is aten.einsum.default:
        return _einsum(emit, node, argument(node, "equation"), argument(node, "tensors"), operands, new)
    target = aten.matmul.default if target in _PRODUCTS else target
    names = () if target in _WITHOUT_AXES else traits(target).axes
    if names is None:
        return None
    if traits(target).broadcasts or (target is aten.matmul.default and min(map(rank, operands)) >= 2):
        for x in operands:
            operands[x] = _spread(emit, x, operands[x], node, runs, 2 if target is aten.matmul.default else 0)
            new[x] = operands[x].value
    counted = runs if target in OF_RESULT else operands[tensor_inputs(node)[0]].runs
    args, kwargs = shifted(node, names, counted)
    if target is aten.expand.default:
        args = (
            args[0],
            [size for s, run in zip(args[1], runs, strict=True) for size in ([s] if run == 1 else [-1] * run)],
        )
    args, kwargs = fx.node.map_arg((args, kwargs), lambda x: new.get(x, x))
    return emit.call(target, *args, origin=node, **kwargs), operands


def _spread(emit: Emitter, x: fx.Node, source: Apart, node: fx.Node, runs: Sequence[int], own: int) -> Apart:
    """An operand that aligns from the back, with as many axes of size 1 as an axis of the result stands for.

    Args:
        emit: where nodes go.
        x: the operand.
        source: its value, perhaps with axes apart.
        node: the call.
        runs: how many axes each axis of the result stands for.
        own: how many of the operand's last axes do not align (rows and columns of a product).
    """
    more, value, wanted = rank(node) - rank(x), source.value, list(source.runs)
    for axis in range(rank(x) - own):
        if is_one(x, axis) and axis + more >= 0:
            for _ in range(runs[axis + more] - wanted[axis]):
                value = emit.call(aten.unsqueeze.default, value, sum(wanted[:axis]), origin=x)
            wanted[axis] = max(runs[axis + more], wanted[axis])
    return Apart(value, tuple(wanted))


def _as_linear(
    emit: Emitter, node: fx.Node, operands: dict[fx.Node, Apart], new: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node, dict[fx.Node, Apart]] | None:
    """``bias + x @ weight`` as a linear map, where its bias is a vector and its weight a matrix."""
    bias, x, weight = node.args[:3]
    assert isinstance(bias, fx.Node)
    assert isinstance(weight, fx.Node)
    scaled = argument(node, "beta", 1) != 1 or argument(node, "alpha", 1) != 1
    if scaled or rank(bias) != 1 or weight in new or bias in new or is_one(bias, 0):
        return None
    turned = emit.call(aten.t.default, weight, origin=node)
    return emit.call(aten.linear.default, new[x], turned, bias, origin=node), operands  # type: ignore[index]


def _as_einsum(node: fx.Node, operands: Mapping[fx.Node, Apart]) -> bool:
    """Whether a product is to be an einsum: a matrix product of a batch would copy the operand beside rows that are apart,
    and columns that are apart are no columns.
    """
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if min(rank(left), rank(right)) < 2 or left is right:
        return False
    rows, columns = operands[left].runs[-2] > 1, operands[right].runs[-1] > 1
    return (rows and rank(right) > 2) or columns


def _product_equation(node: fx.Node) -> str:
    left, right = (rank(x) for x in node.args[:2])  # type: ignore[arg-type]
    batch = "abcdefgh"[: max(left, right) - 2]
    return f"{batch[len(batch) - left + 2 :]}xy,{batch[len(batch) - right + 2 :]}yz->{batch}xz"


def _einsum(
    emit: Emitter,
    node: fx.Node,
    equation: str,
    tensors: Sequence[fx.Node],
    operands: dict[fx.Node, Apart],
    new: Mapping[fx.Node, fx.Node],
) -> tuple[fx.Node, dict[fx.Node, Apart]] | None:
    """An einsum in which a letter stands for a run of letters."""
    letters, result = einsum_letters(equation, [rank(x) for x in tensors])
    used = sorted(set("".join(letters)))
    alphabet = iter([chr(i) for i in (*range(97, 123), *range(65, 91))])
    runs: dict[str, int] = {}
    for x, own in zip(tensors, letters, strict=True):
        for letter, run in zip(own, operands[x].runs, strict=True):
            if runs.setdefault(letter, run) != run:
                return None
    named = {letter: "".join(next(alphabet, "") for _ in range(runs[letter])) for letter in used}
    if sum(runs.values()) > 52:
        return None
    inputs = ",".join("".join(named[letter] for letter in own) for own in letters)
    written = f"{inputs}->{''.join(named[letter] for letter in result)}"
    return emit.call(aten.einsum.default, written, [new.get(x, x) for x in tensors], origin=node), operands


def _repeated(emit: Emitter, node: fx.Node, sources: Mapping[fx.Node, Apart]) -> Apart | None:
    """A repetition along an axis that stands for several: one more among them, behind or before the others."""
    if node.target not in (aten.repeat_interleave.self_int, aten.repeat.default) or first_input(node) not in sources:
        return None
    x = first_input(node)
    source = sources[x]
    if node.target is aten.repeat_interleave.self_int and argument(node, "dim") is not None:
        axis, times, behind = argument(node, "dim") % rank(x), argument(node, "repeats"), True
    elif node.target is aten.repeat.default and len(argument(node, "repeats")) == rank(x):
        repeats = list(argument(node, "repeats"))
        more = [axis for axis, count in enumerate(repeats) if count != 1]
        if len(more) != 1:
            return None
        axis, times, behind = more[0], repeats[more[0]], False
    else:
        return None
    if source.runs[axis] == 1:
        return None
    fine = source.fine(axis)
    at = fine.stop if behind else fine.start
    value = emit.call(aten.unsqueeze.default, source.value, at, origin=node)
    sizes: list[Any] = [-1] * rank(value)
    sizes[at] = times
    value = emit.call(aten.expand.default, value, sizes, origin=node)
    return Apart(value, tuple(run + (i == axis) for i, run in enumerate(source.runs)))


def _of_rank(node: fx.Node, more: int) -> bool:
    """Whether the call works, or works well, on values of its rank and not on those with more axes: memory formats have
    four or five, the kernels of fused attention four.
    """
    if node.target is aten.scaled_dot_product_attention.default:
        return rank(node) + more > 4
    return argument(node, "memory_format") in (torch.channels_last, torch.channels_last_3d)


def shifted(node: fx.Node, axes: Collection[str], runs: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments, with those that name axes further back, where axes before them stand for several."""
    places = list(accumulate(runs, initial=0))

    def shift(dim: Any) -> Any:
        if isinstance(dim, (list, tuple)):
            return [shift(d) for d in dim]
        return places[dim % len(runs)] if isinstance(dim, int) and not isinstance(dim, bool) and runs else dim

    names = [schema.name for schema in node.target._schema.arguments]  # type: ignore[union-attr]
    args = (shift(a) if name in axes else a for name, a in zip(names, node.args, strict=False))
    return tuple(args), {name: shift(a) if name in axes else a for name, a in node.kwargs.items()}


def _computes_same(made: fx.Node, node: fx.Node, runs: Sequence[int], operands: Mapping[fx.Node, Apart]) -> bool:
    """Whether the new call treats axes that are apart row by row, and every other axis as the old call does."""
    old, new = axis_map(node), axis_map(made)
    if old is None or new is None or rank(made) != sum(runs):
        return False
    at = 0
    for axis, (rows, run) in enumerate(zip(old.rows, runs, strict=True)):
        places = range(at, at + run)
        at += run
        if run == 1:
            (place,) = places
            size, was = dims(made)[place], dims(node)[axis]
            expected = [None if rows is None else {(operands[x].value, operands[x].fine(j)[-1]) for x, j in rows}]
            if not same_size(size, was):
                return False
        else:
            expected = [{(operands[x].value, operands[x].fine(j)[i]) for x, j in rows or ()} for i in range(run)]
        for place, wanted in zip(places, expected, strict=True):
            found = new.rows[place]
            if (found is None) != (wanted is None):
                return False
            if wanted is not None and {a for a in found or () if not is_one(*a) or is_one(made, place)} != {
                a for a in wanted if not is_one(*a) or is_one(made, place)
            }:
                return False
    return True

"""Rules of operators that sum products over an axis: linear, matmul and its kin, convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from tokgraph import ops  # noqa: F401  (registers torch.ops.tokgraph)
from tokgraph.ir.node import argument, rank

from .registry import Axis, AxisMap, Mix, Rows, is_one, rule

aten = torch.ops.aten


@rule(aten.linear.default, products=True, axes=())
def linear(node: fx.Node) -> AxisMap:
    """``[..., in] x [out, in]``: every leading axis is row by row, the last one is contracted."""
    x = argument(node, "input")
    last = rank(node) - 1
    rows: list[Rows] = [((x, axis),) for axis in range(last)]
    return AxisMap((*rows, None), (Mix("contraction", ((x, last),)),))


def _product(node: fx.Node, left: fx.Node, right: fx.Node) -> AxisMap:
    """Rows come from the left operand, columns from the right, batch axes broadcast; query and key axes may share a
    symbol, so the operand and not the size tells them apart.
    """
    ndim, nl, nr = rank(node), rank(left), rank(right)
    whole = ndim + (nl == 1) + (nr == 1)  # the rank before the axis that a vector is given is taken away again
    rows: list[Rows] = []
    for axis in range(ndim):
        if nl >= 2 and axis == ndim - (2 if nr >= 2 else 1):
            rows.append(((left, nl - 2),))
        elif nr >= 2 and axis == ndim - 1:
            rows.append(((right, nr - 1),))
        else:
            aligned = [(x, axis - (whole - n)) for x, n in ((left, nl), (right, nr)) if n > 2]
            rows.append(tuple((x, j) for x, j in aligned if j >= 0 and (not is_one(x, j) or is_one(node, axis))))
    return AxisMap(tuple(rows), (Mix("contraction", ((left, nl - 1), (right, max(nr - 2, 0)))),))


@rule(aten.matmul.default, products=True, axes=())
@rule(aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default, products=True)
def matmul(node: fx.Node) -> AxisMap:
    """``[..., n, k] @ [..., k, m]``."""
    return _product(node, *node.args[:2])  # type: ignore[arg-type]


@rule(aten.addmm.default, aten.baddbmm.default, products=True)
def addmm(node: fx.Node) -> AxisMap:
    """``bias + left @ right``; the bias broadcasts."""
    bias, left, right = node.args[:3]
    product = _product(node, left, right)  # type: ignore[arg-type]
    assert isinstance(bias, fx.Node)
    extra = rank(node) - rank(bias)
    rows = tuple(
        r if r is None or axis < extra or is_one(bias, axis - extra) else (*r, (bias, axis - extra))
        for axis, r in enumerate(product.rows)
    )
    return AxisMap(rows, product.mixes)


@rule(
    aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    products=True,
)  # fmt: skip
def convolution(node: fx.Node) -> AxisMap:
    """Only a batch axis is row by row: spatial axes are windows, channels are contracted (depthwise or not)."""
    x = argument(node, "input")
    n = rank(x)
    batched = n == rank(argument(node, "weight"))
    rows: list[Rows] = [((x, 0),) if batched else None, *[None] * (n - 1)]
    return AxisMap(tuple(rows), tuple(Mix("window", ((x, axis),)) for axis in range(batched, n)))


@rule(aten.einsum.default, products=True)
def einsum(node: fx.Node) -> AxisMap:
    """Axes of one letter are row by row; those of letters that the result lacks are summed over, those of one twice in an
    operand mixed.
    """
    operands: list[fx.Node] = argument(node, "tensors")
    letters, result = einsum_letters(argument(node, "equation"), [rank(x) for x in operands])
    places: dict[str, list[Axis]] = {}
    for x, own in zip(operands, letters, strict=True):
        for axis, letter in enumerate(own):
            places.setdefault(letter, []).append((x, axis))
    twice = {letter for own in letters for letter in own if own.count(letter) > 1}
    rows: list[Rows] = []
    for axis, letter in enumerate(result):
        follows = tuple((x, j) for x, j in places[letter] if not is_one(x, j) or is_one(node, axis))
        rows.append(None if letter in twice else follows)
    diagonal = tuple(Mix("layout", tuple(places[letter])) for letter in sorted(twice))
    summed = [at for letter, at in places.items() if letter not in result and letter not in twice]
    return AxisMap(
        tuple(rows), (*diagonal, *(Mix("contraction" if len(at) > 1 else "reduction", tuple(at)) for at in summed))
    )


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """A letter for each axis of every operand and of the result; the axes of an ellipsis get capital Greek ones.

    Args:
        equation: as ``torch.einsum`` takes it.
        ranks: the ranks of the operands.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    hidden = [n - len(own.replace("...", "")) if "..." in own else 0 for own, n in zip(operands, ranks, strict=True)]
    broadcast = "".join(chr(0x391 + i) for i in range(max(hidden, default=0)))
    letters = [own.replace("...", broadcast[len(broadcast) - n :]) for own, n in zip(operands, hidden, strict=True)]
    if not arrow:
        every = "".join(operands).replace("...", "")
        result = "..." * ("..." in inputs) + "".join(sorted(x for x in set(every) if every.count(x) == 1))
    return letters, result.replace("...", broadcast)


@rule(torch.ops.tokgraph.grouped_mm.default, products=True, axes=())
def grouped_mm(node: fx.Node) -> AxisMap:
    """Ours: ``[..., k]`` times the matrix, of several, that each row's group has."""
    x, weight, groups = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    assert isinstance(groups, fx.Node)
    last = rank(node) - 1
    rows: tuple[Rows, ...] = tuple(((x, axis), (groups, axis)) for axis in range(last))
    order = Mix("order", ((weight, 0),))
    return AxisMap((*rows, ((weight, 2),)), (Mix("contraction", ((x, last), (weight, 1))), order))

"""What is known of the elements of a graph's values: masks are followed from ``arange``, comparisons and shape operators.

A mask that is the lower triangle is then known to be, however a model writes it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokgraph.ir.node import argument, axis_argument, dims, rank, tensor

from ..emitter import is_selection, selection
from .known import AtMostZero, Choice, Constant, Known, Linear, Number, linear, opposite, remade

aten = torch.ops.aten


@dataclass
class Positions:
    """What is known of the elements of a graph's values; each value is looked at once."""

    _found: dict[fx.Node, Known | None] = field(default_factory=dict)

    def of(self, node: Any) -> Known | None:
        """What is known of a node, or of a Python number."""
        if not isinstance(node, fx.Node):
            return Constant(node) if isinstance(node, (bool, int, float)) else None
        if node not in self._found:
            rule = _RULES.get(node.target) if node.op == "call_function" else None
            if is_selection(node):
                rule = _selected
            found = None if rule is None or tensor(node) is None else rule(self, node)
            self._found[node] = remade(found, lambda number: _within(number, node))
        return self._found[node]

    def number(self, node: Any) -> Linear | None:
        """What is known of an integer."""
        found = self.of(node)
        if isinstance(found, Constant) and isinstance(found.number, int):
            return Linear(int(found.number))
        return found if isinstance(found, Linear) else None


def _within(number: Linear, node: fx.Node) -> Linear | None:
    """A number without terms along axes of size 1: the position is 0 there, and broadcasting makes others of it."""
    single = [t for t in number.terms if dims(node)[t[0]] == 1]
    if any(rows for _, _, rows in single):
        return None
    return Linear(number.offset, tuple(t for t in number.terms if t not in single))


Rule = Callable[[Positions, fx.Node], Known | None]
_RULES: dict[Any, Rule] = {}
_WIDE = (torch.int32, torch.int64)
"""Types in which no position overflows."""


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, function))
        return function

    return add


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(positions: Positions, node: fx.Node) -> Known | None:
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    if not isinstance(start, int) or not isinstance(step, int) or node.meta["val"].dtype not in _WIDE:
        return None
    return linear(start, [(-1, step, ())])


@_rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(positions: Positions, node: fx.Node) -> Known | None:
    return _typed(argument(node, "fill_value"), node)


@_rule(aten.ones.default, aten.new_ones.default, aten.ones_like.default)
def _ones(positions: Positions, node: fx.Node) -> Known | None:
    return _typed(1, node)


@_rule(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def _zeros(positions: Positions, node: fx.Node) -> Known | None:
    return _typed(0, node)


@_rule(aten.scalar_tensor.default)
def _scalar(positions: Positions, node: fx.Node) -> Known | None:
    return _typed(node.args[0], node)


def _typed(number: Any, node: fx.Node) -> Constant | None:
    """A constant as the node's type holds it."""
    if not isinstance(number, (bool, int, float)):
        return None
    return Constant(torch.tensor(number, dtype=node.meta["val"].dtype).item())


@_rule(aten.unsqueeze.default)
def _unsqueeze(positions: Positions, node: fx.Node) -> Known | None:
    new = axis_argument(node, node) - rank(node)
    return remade(positions.of(node.args[0]), lambda n: n.moved(lambda axis: axis if axis > new else axis - 1))


@_rule(aten.expand.default)
def _expand(positions: Positions, node: fx.Node) -> Known | None:
    return positions.of(node.args[0])  # along an axis of size 1 nothing changes, and no term speaks of it


@_rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _reshape(positions: Positions, node: fx.Node) -> Known | None:
    """Only where axes of size 1 come or go."""
    x: Any = node.args[0]
    before, after = ([i - rank(n) for i, d in enumerate(dims(n)) if d != 1] for n in (x, node))
    if [dims(x)[i] for i in before] != [dims(node)[i] for i in after]:
        found = positions.of(x)
        return found if isinstance(found, Constant) else None
    to = dict(zip(before, after, strict=True))
    return remade(positions.of(x), lambda n: n.moved(to.__getitem__) if all(a in to for a, _, _ in n.terms) else None)


@_rule(
    aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh_copy.default
)
def _same(positions: Positions, node: fx.Node) -> Known | None:
    return positions.of(node.args[0])


@_rule(aten._to_copy.default, aten.to.dtype)
def _converted(positions: Positions, node: fx.Node) -> Known | None:
    found, (x, to) = positions.of(node.args[0]), (tensor(node.args[0]), node.meta["val"].dtype)
    assert x is not None
    if isinstance(found, Constant):
        return _typed(found.number, node)
    if x.dtype is to or (isinstance(found, Linear) and to in _WIDE):
        return found
    if isinstance(found, AtMostZero) and to is not torch.bool:
        return Choice(found, 1, 0)
    if isinstance(found, Choice):
        return Choice(found.condition, *(torch.tensor(n, dtype=to).item() for n in (found.yes, found.no)))
    return None


@_rule(aten.slice.Tensor)
def _slice(positions: Positions, node: fx.Node) -> Known | None:
    x, axis = node.args[0], axis_argument(node, node) - rank(node)
    start, step = argument(node, "start") or 0, argument(node, "step", 1)
    if not isinstance(start, int) or start < 0 or step != 1:
        found = positions.of(x)
        return found if isinstance(found, Constant) else None

    def change(number: Linear) -> Linear | None:
        factor, rows = next(((f, rows) for a, f, rows in number.terms if a == axis), (0, ()))
        if rows and start:  # where narrowed rows stand is not known
            return None
        return Linear(number.offset + factor * start, number.terms)

    return remade(positions.of(x), change)


def _selected(positions: Positions, node: fx.Node) -> Known | None:
    x, index, dim, _ = selection(node)
    axis = dim % rank(node) - rank(node)

    def change(number: Linear) -> Linear:
        return Linear(
            number.offset, tuple((a, f, (*rows, index) if a == axis else rows) for a, f, rows in number.terms)
        )

    return remade(positions.of(x), change)


@_rule(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def _add(positions: Positions, node: fx.Node) -> Known | None:
    if argument(node, "alpha", 1) != 1:
        return None
    sign = 1 if node.target in (aten.add.Tensor, aten.add.Scalar) else -1
    a, b = positions.number(node.args[0]), positions.number(node.args[1])
    if a is not None and b is not None and not node.meta["val"].is_floating_point():
        return a + b.times(sign)
    return _arithmetic(positions, node, operator.add if sign == 1 else operator.sub)


@_rule(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(positions: Positions, node: fx.Node) -> Known | None:
    return None if argument(node, "alpha", 1) != 1 else _arithmetic(positions, node, lambda a, b: b - a)


@_rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(positions: Positions, node: fx.Node) -> Known | None:
    return _arithmetic(positions, node, operator.mul)


def _arithmetic(positions: Positions, node: fx.Node, of: Callable[[Any, Any], Number]) -> Known | None:
    """An operation on constants, or on the two sides of a choice and a constant, in the node's type."""
    a, b = positions.of(node.args[0]), positions.of(node.args[1])

    def result(x: Number, y: Number) -> Number:
        dtype = node.meta["val"].dtype
        made = of(torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype))
        number: Number = made.item()  # type: ignore[union-attr]
        return number

    if isinstance(a, Constant) and isinstance(b, Constant):
        return Constant(result(a.number, b.number))
    if isinstance(a, Choice) and isinstance(b, Constant):
        return Choice(a.condition, result(a.yes, b.number), result(a.no, b.number))
    if isinstance(a, Constant) and isinstance(b, Choice):
        return Choice(b.condition, result(a.number, b.yes), result(a.number, b.no))
    return None


_COMPARISONS = {"le": (1, 0), "lt": (1, 1), "ge": (-1, 0), "gt": (-1, 1)}
"""Comparison of a and b -> ``(s, c)``: it holds where ``s * (a - b) + c <= 0``."""


@_rule(*(getattr(getattr(aten, name), kind) for name in (*_COMPARISONS, "eq", "ne") for kind in ("Tensor", "Scalar")))
def _compare(positions: Positions, node: fx.Node) -> Known | None:
    a, b = positions.number(node.args[0]), positions.number(node.args[1])
    difference = None if a is None or b is None else a + b.times(-1)
    if difference is None:
        return None
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    if not difference.terms:
        return Constant(bool(getattr(operator, name)(difference.offset, 0)))
    if name not in _COMPARISONS:
        return None
    sign, more = _COMPARISONS[name]
    number = difference.times(sign)
    return AtMostZero(Linear(number.offset + more, number.terms))


@_rule(aten.logical_not.default, aten.bitwise_not.default)
def _not(positions: Positions, node: fx.Node) -> Known | None:
    found = positions.of(node.args[0])
    if isinstance(found, AtMostZero):
        return opposite(found)
    return Constant(not found.number) if isinstance(found, Constant) and isinstance(found.number, bool) else None


_AND = (aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)
_OR = (aten.__or__.Tensor, aten.logical_or.default, aten.bitwise_or.Tensor)


@_rule(*_AND, *_OR)
def _and_or(positions: Positions, node: fx.Node) -> Known | None:
    if node.meta["val"].dtype is not torch.bool:
        return None
    a, b = positions.of(node.args[0]), positions.of(node.args[1])
    neutral = node.target in _AND
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Constant):
            return y if x.number is neutral else x
    return a if a == b else None


@_rule(aten.tril.default, aten.triu.default)
def _triangle(positions: Positions, node: fx.Node) -> Known | None:
    found, diagonal = positions.of(node.args[0]), argument(node, "diagonal", 0)
    if not isinstance(found, Constant) or not isinstance(diagonal, int):
        return None
    below = node.target is aten.tril.default  # tril: j - i - diagonal <= 0; triu keeps what tril(diagonal - 1) does not
    kept = AtMostZero(linear(-diagonal if below else 1 - diagonal, [(-1, 1, ()), (-2, -1, ())]))
    zero = type(found.number)(0)
    return _chosen(kept, *((found.number, zero) if below else (zero, found.number)))


@_rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(positions: Positions, node: fx.Node) -> Known | None:
    condition, yes, no = (positions.of(a) for a in node.args)
    if isinstance(condition, Constant):
        return yes if condition.number else no
    return _chosen_of(condition, yes, no, node)


@_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(positions: Positions, node: fx.Node) -> Known | None:
    x, mask, fill = (positions.of(a) for a in node.args)
    if isinstance(mask, Constant):
        return fill if mask.number else x
    return _chosen_of(mask, fill, x, node)


def _chosen_of(condition: Known | None, yes: Known | None, no: Known | None, node: fx.Node) -> Known | None:
    if isinstance(condition, AtMostZero) and isinstance(yes, Constant) and isinstance(no, Constant):
        sides = [_typed(side.number, node) for side in (yes, no)]
        if all(side is not None for side in sides):
            return _chosen(condition, *(side.number for side in sides if side is not None))
    return None


def _chosen(condition: AtMostZero, yes: Number, no: Number) -> Known:
    """A choice, or the condition itself where it chooses between true and false."""
    if isinstance(yes, bool) and isinstance(no, bool) and yes is not no:
        return condition if yes else opposite(condition)
    return Choice(condition, yes, no)


@_rule(aten.diff.default)
def _diff(positions: Positions, node: fx.Node) -> Known | None:
    """Differences of what grows evenly, also past an element that goes before it."""
    x, axis = node.args[0], axis_argument(node, node) - rank(node)
    found, before = positions.number(x), argument(node, "prepend")
    if found is None or argument(node, "n", 1) != 1 or argument(node, "append") is not None:
        return None
    factor = next((f for a, f, rows in found.terms if a == axis and not rows), 0)
    if any(a == axis and rows for a, _, rows in found.terms):
        return None
    if before is not None:
        others = [t for t in found.terms if t[0] != axis]
        if dims(before)[axis] != 1 or positions.number(before) != linear(found.offset - factor, others):
            return None
    return Linear(factor)


@_rule(aten.cumsum.default)
def _cumsum(positions: Positions, node: fx.Node) -> Known | None:
    found = positions.of(node.args[0])
    return Constant(0) if isinstance(found, Constant) and not found.number else None


@_rule(aten.index.Tensor)
def _index(positions: Positions, node: fx.Node) -> Known | None:
    """A value at positions that are known themselves, one for each of its axes."""
    x, indices = node.args
    found = positions.of(x)
    if isinstance(found, Constant):
        return found
    at = [positions.number(i) for i in indices]  # type: ignore[union-attr]
    if found is None or len(at) != rank(x) or any(i is None or not _not_negative(i) for i in at):  # type: ignore[arg-type]
        return None

    def change(number: Linear) -> Linear | None:
        total: Linear | None = Linear(number.offset)
        for axis, factor, rows in number.terms:
            index = at[axis]
            if rows or total is None or index is None:
                return None
            total = total + index.times(factor)
        return total

    return remade(found, change)


def _not_negative(number: Linear) -> bool:
    return number.offset >= 0 and all(factor >= 0 for _, factor, _ in number.terms)

"""Sums over the rows of several values, divided by how many rows there are, become one average over these rows.

So libraries balance the routers of all layers without a tensor that has the rows of all. As one operator it is known to be an
average, which over fewer rows is that of a shorter sequence.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import ToFloat

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, axis_argument, axis_arguments, dims, rank, same_sizes, tensor, value

from ..contract import GraphPass
from ..emitter import Emitter
from ..rules.registry import first_input, is_one, traits

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
_DIVISIONS = (aten.div.Tensor, aten.true_divide.Tensor)
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
_SUMS = (aten.sum.dim_IntList, aten.sum.default)


@dataclass(frozen=True)
class _Sum:
    """A sum over the rows of a value.

    Args:
        rows: the value, its rows on its first axes.
        axes: how many axes of it are summed, from the first on.
        weights: ``[rows]``: by what each row is multiplied before; ``None``: by nothing.
        bins: the rows are classes, so many, and what is summed is how often each is chosen.
    """

    rows: fx.Node
    axes: int
    weights: fx.Node | None = None
    bins: int | None = None


@dataclass(frozen=True)
class RowAverages(GraphPass):
    """``(x.sum(0) + y.sum(0)) / (len(x) + len(y))``, and with weights of rows, becomes ``tokgraph.mean_of_rows``; numbers of
    chosen classes (``histc``, ``scatter_add``) so divided become ``tokgraph.class_shares``.
    """

    name: ClassVar[str] = "row-averages"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace every such quotient that is a vector or more: a quotient that is one number may be the loss of a task."""
        graph, found = graph_module.graph, False
        emit = Emitter(graph, self.name)
        for node in list(graph.nodes):
            average = _average(emit, node) if node.target in _DIVISIONS and rank(node) else None
            if average is not None:
                node.replace_all_uses_with(average)
                found = True
        if found:
            graph.eliminate_dead_code()


def _average(emit: Emitter, node: fx.Node) -> fx.Node | None:
    """The average that a quotient is, made."""
    total, count = node.args[:2]
    leaves = _added(total)
    sums = [_sum_over_rows(leaf) if same_sizes(dims(leaf), dims(node)) else None for leaf in leaves or ()]
    known = [s for s in sums if s is not None]
    if not known or len(known) < len(sums) or len({(s.bins, s.weights is None) for s in known}) > 1:
        return None
    weights = [s.weights for s in known if s.weights is not None]
    counted = _weighed(count, weights) if weights else _counted(count, known)
    if counted is None:
        return None
    axes, times = counted
    rows = [_merged(emit, s, n, node) for s, n in zip(known, axes, strict=True)]
    dtype, bins = node.meta["val"].dtype, known[0].bins
    if bins is None:
        made = emit.call(tokgraph.mean_of_rows.default, rows, weights, origin=node)
    else:
        made = emit.call(tokgraph.class_shares.default, rows, weights, bins, dtype, origin=node)
    if times > 1:
        made = emit.call(aten.div.Tensor, made, times, origin=node)
    return made if made.meta["val"].dtype is dtype else None


def _added(x: object) -> list[fx.Node] | None:
    """What a value is the sum of, without zeros; ``None``: a number other than 0 is added."""
    if not isinstance(x, fx.Node):
        return [] if x == 0 else None
    if x.target in (aten.add.Tensor, operator.add) and argument(x, "alpha", 1) == 1:
        parts = [_added(a) for a in x.args[:2]]
        return None if None in parts else [leaf for part in parts for leaf in part or ()]
    return [] if _is_zero(x) else [x]


def _is_zero(x: fx.Node) -> bool:
    x = _cast_of(x)
    return x.target in _ZEROS or (x.target is aten.full.default and argument(x, "fill_value") == 0)


def _sum_over_rows(x: fx.Node) -> _Sum | None:
    """A sum over the first axes of a value, or of the classes that it chooses."""
    if x.target in _SUMS:
        over, of = argument(x, "dim", None), first_input(x)
        axes = list(range(rank(of))) if over is None else sorted(axis_arguments(x, of))
        plain = not argument(x, "keepdim", False) and axes == list(range(len(axes))) and axes
        return _unweighed(of, len(axes)) if plain and argument(x, "dtype", None) is None else None
    if x.target is aten.histc.default:
        bins, low, high = (argument(x, name, 0) for name in ("bins", "min", "max"))
        classes = _without(first_input(x), casts=True)
        exact = classes.meta["val"].dtype is torch.int64 and low == 0 and high in (bins, bins - 1)
        return _Sum(classes, rank(classes), bins=bins) if exact else None
    if x.target is aten.scatter_add.default:
        return _scattered(x)
    return None


def _scattered(x: fx.Node) -> _Sum | None:
    """Classes counted by adding ones, or weights of their rows, to zeros."""
    zeros, classes, added = first_input(x), _without(argument(x, "index")), argument(x, "src")
    bins = dims(zeros)[0] if _is_zero(zeros) and rank(zeros) == 1 else None
    if not isinstance(bins, int) or axis_argument(x, zeros) != 0:
        return None
    if added.target in _ONES:
        return _Sum(classes, rank(classes), bins=bins)
    repeats = added.target is aten.repeat_interleave.self_int and rank(classes) == 2
    if repeats and argument(added, "repeats") == dims(classes)[1] and argument(added, "dim", None) in (None, 0):
        return _Sum(classes, 2, first_input(added), bins)
    return None


def _unweighed(x: fx.Node, axes: int) -> _Sum:
    """A sum over the first axes of a value: what is summed, and the weight of each row, if it is a product with one."""
    if x.target is aten.mul.Tensor and axes == 1:
        for value, weight in (x.args[:2], x.args[1::-1]):
            if isinstance(value, fx.Node) and isinstance(weight, fx.Node) and same_sizes(dims(value), dims(x)):
                flat = _flat(weight, rank(x))
                if flat is not None and rank(x) > 1:
                    return _Sum(value, 1, flat)
    return _Sum(x, axes)


def _flat(weight: fx.Node, ndim: int) -> fx.Node | None:
    """``[rows]``: what was given axes of size 1 behind, to weigh rows."""
    if rank(weight) != ndim or not all(is_one(weight, axis) for axis in range(1, ndim)) or is_one(weight, 0):
        return None
    while rank(weight) > 1:
        if weight.target is not aten.unsqueeze.default and not traits(weight.target).reshape:
            return None
        weight = first_input(weight)
    return weight


def _without(x: fx.Node, casts: bool = False) -> fx.Node:
    """What was laid out as one axis, and cast."""
    while (traits(x.target).reshape and rank(x) == 1) or (casts and _keeps_values(x)):
        x = first_input(x)
    return x


def _weighed(count: object, weights: Sequence[fx.Node]) -> tuple[list[int], int] | None:
    """As :func:`_counted`, of rows that have weights: the divisor is the sum of the weights of all of them."""
    leaves = _added(count)
    if leaves is None or not all(x.target in _SUMS and rank(x) == 0 for x in leaves):
        return None
    summed = sorted(_cast_of(first_input(x)).name for x in leaves)
    return ([1] * len(weights), 1) if summed == sorted(_cast_of(w).name for w in weights) else None


def _cast_of(x: fx.Node) -> fx.Node:
    """What was cast, to types that keep its values."""
    while _keeps_values(x):
        x = first_input(x)
    return x


def _keeps_values(x: fx.Node) -> bool:
    """Whether a node is a cast, but for one to whole numbers of others, or to truth values."""
    if x.target is not aten._to_copy.default:
        return False
    old, new = first_input(x).meta["val"].dtype, x.meta["val"].dtype
    return new.is_floating_point or old is new or not (old.is_floating_point or new is torch.bool)


def _counted(count: object, sums: Sequence[_Sum]) -> tuple[list[int], int] | None:
    """Of each value, how many of its first axes make up the rows that a divisor counts, and how often it counts each row:
    once, or as often as a row chooses classes.
    """
    if isinstance(count, fx.Node) and tensor(count) is not None:
        return None
    divisor = _expression(value(count) if isinstance(count, fx.Node) else count)
    if divisor is None:
        return None
    most = max(s.axes for s in sums)
    choices = {dims(s.rows)[-1] if rank(s.rows) > 1 else 1 for s in sums if s.bins is not None}
    for left in [most] if choices and most == 1 else [most - 1] if choices else range(most, 0, -1):
        axes = [min(left, s.axes) for s in sums]
        rows = sum(sympy.Mul(*dims(s.rows)[:n]) for s, n in zip(sums, axes, strict=True))
        for times in (1, *(choices if len(choices) == 1 else ())):
            if isinstance(times, int) and sympy.expand(times * rows - divisor) == 0:
                return axes, times
    return None


def _expression(x: object) -> sympy.Expr | None:
    """A number or a size as an expression over whole numbers."""
    if isinstance(x, (torch.SymInt, torch.SymFloat)):
        expression: sympy.Expr = x.node.expr.replace(ToFloat, lambda y: y)
        return expression
    return sympy.Integer(int(x)) if isinstance(x, (int, float)) and math.isfinite(x) and x == int(x) else None


def _merged(emit: Emitter, summed: _Sum, axes: int, origin: fx.Node) -> fx.Node:
    """``[rows, ...]``: a value with its rows on one axis, what is summed of each row summed; of classes ``[rows, choices]``."""
    x, left = summed.rows, summed.axes
    if summed.bins is None and left > axes:
        x = emit.call(aten.sum.dim_IntList, x, list(range(axes, left)), origin=origin)
        left = axes
    alone = summed.bins is not None and left == axes  # each row chooses one class
    if axes == 1 and not alone:
        return x
    behind = [1] if alone else [emit.size(x, axis) for axis in range(axes, rank(x))]
    return emit.call(aten.reshape.default, x, [-1, *behind], origin=origin)

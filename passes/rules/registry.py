"""The registry of token-axis rules, and what a rule says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import fx

from tokgraph.ir.node import argument, dims, rank, tensor_inputs

Axis = tuple[fx.Node, int]
Rows = tuple[Axis, ...] | None
MixKind = Literal["attention", "softmax", "contraction", "reduction", "scan", "window", "order", "layout"]


@dataclass(frozen=True)
class Mix:
    """Axes over which an operator mixes rows.

    Args:
        kind: what it does to them: ``"attention"`` (fused), ``"softmax"`` (normalises), ``"contraction"`` (sums
            products), ``"reduction"``, ``"scan"`` (running sums), ``"window"`` (convolution, pooling), ``"order"``
            (sorting, scattering by order), ``"layout"`` (splits, merges, cuts or joins the axis).
        axes: the input axes that are mixed with one another.
    """

    kind: MixKind
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class AxisMap:
    """What an operator does to the axes of its inputs.

    Args:
        rows: for each output axis, the input axes it follows row by row: row ``i`` of the output needs row ``i`` of
            these and of no other; ``()``: the axis does not come from an input; ``None``: rows are mixed.
        mixes: the input axes whose rows are mixed.
        aligned: ``(output axis, input axis)`` pairs that index the same positions although rows are mixed.
    """

    rows: tuple[Rows, ...]
    mixes: tuple[Mix, ...] = ()
    aligned: tuple[tuple[int, Axis], ...] = ()

    def mixed(self, axis: Axis) -> Mix | None:
        """The mix that ``axis`` takes part in."""
        return next((mix for mix in self.mixes if axis in mix.axes), None)


Rule = Callable[[fx.Node], AxisMap]
_RULES: dict[object, Rule] = {}


def rule(*operators: object) -> Callable[[Rule], Rule]:
    """Register a rule for one or more operators (``aten.linear.default``).

    A rule reads the call's arguments and the shapes in ``meta["val"]`` and returns an :class:`AxisMap`. It may assume
    that the call is valid, and nothing else: where it cannot tell, it answers ``None`` for the axis.

    Raises:
        ValueError: an operator has a rule already.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator in _RULES:
                raise ValueError(f"{operator} has a rule already: {_RULES[operator]}")
            _RULES[operator] = function
        return function

    return register


def has_rule(node: fx.Node) -> bool:
    """Whether the node's operator has a rule."""
    return node.op == "call_function" and node.target in _RULES


def ruled_operators() -> dict[object, Rule]:
    """Operator -> rule, a copy."""
    return dict(_RULES)


def axis_map(node: fx.Node) -> AxisMap | None:
    """What the node does to its inputs' axes; ``None`` when its operator has no rule."""
    return _RULES[node.target](node) if has_rule(node) else None


# ------------------------------------------------------------------ what most rules need


def norm_dim(dim: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return dim % ndim if ndim else 0


def is_one(node: fx.Node, axis: int) -> bool:
    """Whether an axis is known to have size 1."""
    return bool(dims(node)[axis] == 1)


def broadcast_rows(node: fx.Node, inputs: list[fx.Node] | None = None) -> list[Rows]:
    """Rows of an operator that broadcasts its inputs: axes align from the back, axes of size 1 are not followed."""
    ndim = rank(node)
    rows: list[Rows] = []
    for axis in range(ndim):
        follows = []
        for x in tensor_inputs(node) if inputs is None else inputs:
            j = axis - (ndim - rank(x))
            if j >= 0 and (not is_one(x, j) or is_one(node, axis)):
                follows.append((x, j))
        rows.append(tuple(follows))
    return rows


def identity_rows(node: fx.Node, x: fx.Node) -> list[Rows]:
    """Rows of an operator whose output axes are those of ``x``, in order."""
    return [((x, axis),) for axis in range(rank(node))]


def first_input(node: fx.Node) -> fx.Node:
    """The tensor that the operator's first argument names."""
    x = node.args[0] if node.args else argument(node, "self")
    assert isinstance(x, fx.Node)
    return x

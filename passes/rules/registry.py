"""The registry of token-axis rules, and what a rule says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
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
class Group:
    """Neighbouring input axes that hold, in row-major order, the same elements as neighbouring output axes.

    One of the two sides is a single axis: the input axes are merged to it, or it is split into the output axes, or (one
    axis each) it survives.

    Args:
        inputs: axes of the input.
        outputs: axes of the output.
    """

    inputs: range
    outputs: range


@dataclass(frozen=True)
class AxisMap:
    """What an operator does to the axes of its inputs.

    Args:
        rows: for each output axis, the input axes it follows row by row: row ``i`` of the output needs row ``i`` of
            these and of no other; ``()``: the axis does not come from an input; ``None``: rows are mixed.
        mixes: the input axes whose rows are mixed.
        aligned: ``(output axis, input axis)`` pairs that index the same positions although rows are mixed.
        groups: of a reshape: the axes that survive, are merged, and are split.
    """

    rows: tuple[Rows, ...]
    mixes: tuple[Mix, ...] = ()
    aligned: tuple[tuple[int, Axis], ...] = ()
    groups: tuple[Group, ...] = ()

    def mixed(self, axis: Axis) -> Mix | None:
        """The mix that ``axis`` takes part in."""
        return next((mix for mix in self.mixes if axis in mix.axes), None)


Rule = Callable[[fx.Node], AxisMap]


@dataclass(frozen=True)
class Traits:
    """What else there is to know of an operator, said beside its rule.

    Args:
        products: it multiplies matrices.
        broadcasts: its inputs align from the back: a missing batch axis can be put before an input without changing it.
        axes: names of the arguments that name axes of its first input or its result. With these moved, a call computes the
            same on values with more leading axes. ``None``: it may not work on such values.
        sized: its second argument lists the sizes of the result in order.
        reshape: as ``sized``, and the elements stay in row-major order.
        copies: it returns its one input's values, perhaps in another type, layout or place.
        shape_only: it reads its input's shape, not its values.
        lookup: it reads only the rows of its first input that it returns.
        normalises: it is a norm of features.
        turns: it moves rows to other places of its axes.
    """

    products: bool = False
    broadcasts: bool = False
    axes: tuple[str, ...] | None = None
    sized: bool = False
    reshape: bool = False
    copies: bool = False
    shape_only: bool = False
    lookup: bool = False
    normalises: bool = False
    turns: bool = False


@dataclass(frozen=True)
class Entry:
    """What is registered for an operator."""

    rule: Rule
    traits: Traits


_ENTRIES: dict[object, Entry] = {}
_NONE_KNOWN = Traits()


def rule(*operators: object, **traits: Any) -> Callable[[Rule], Rule]:
    """Register a rule for one or more operators (``aten.linear.default``).

    A rule reads the call's arguments and the shapes in ``meta["val"]`` and returns an :class:`AxisMap`. It may assume
    that the call is valid, and nothing else: where it cannot tell, it answers ``None`` for the axis.

    Args:
        operators: operators, or ``torch.Tag.pointwise``: every operator that carries the tag and has no rule of its own.
        traits: fields of :class:`Traits`. Operators of one rule that differ in them are named in decorators of their own.

    Raises:
        TypeError: there is no such trait.
        ValueError: an operator has a rule already.
    """
    said = Traits(**traits)

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator in _ENTRIES:
                raise ValueError(f"{operator} has a rule already: {_ENTRIES[operator].rule}")
            _ENTRIES[operator] = Entry(function, said)
        return function

    return register


@cache
def is_tagged_pointwise(operator: object) -> bool:
    """Whether torch, or who wrote the operator, says that it is element by element, and the rule can describe it.

    An operator that writes to an argument, returns something else than tensors (``equal``), or draws random numbers (no
    two runs agree, so nothing can be verified) needs a rule of its own.
    """
    if not isinstance(operator, torch._ops.OpOverload) or torch.Tag.pointwise not in operator.tags:
        return False
    schema = operator._schema
    return (
        torch.Tag.nondeterministic_seeded not in operator.tags
        and not schema.is_mutable
        and bool(schema.returns)
        and all(isinstance(result.type, torch.TensorType) for result in schema.returns)
    )


def entry(operator: object) -> Entry | None:
    """What is registered for an operator, itself or by its tag."""
    found = _ENTRIES.get(operator)
    if found is None and is_tagged_pointwise(operator):
        return _ENTRIES[torch.Tag.pointwise]
    return found


def has_rule(node: fx.Node) -> bool:
    """Whether the node's operator has a rule."""
    return node.op == "call_function" and entry(node.target) is not None


def traits(operator: object) -> Traits:
    """The traits of an operator; none where it has no rule."""
    found = entry(operator)
    return _NONE_KNOWN if found is None else found.traits


def ruled_operators() -> dict[object, Rule]:
    """Operator -> rule, of every operator that torch knows now: those registered, and those that carry the tag."""
    loaded = map(_overload, torch._C._dispatch_get_all_op_names())
    tagged = dict.fromkeys(filter(is_tagged_pointwise, loaded), _ENTRIES[torch.Tag.pointwise])
    found = {**tagged, **_ENTRIES}
    return {operator: known.rule for operator, known in found.items() if operator is not torch.Tag.pointwise}


def _overload(name: str) -> object:
    """``torch.ops.aten.add.Tensor`` of ``"aten::add.Tensor"``; ``None`` for what cannot be called from Python."""
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, space), packet, None)
    return getattr(found, overload or "default", None)


def axis_map(node: fx.Node) -> AxisMap | None:
    """What the node does to its inputs' axes; ``None`` when its operator has no rule."""
    found = entry(node.target) if node.op == "call_function" else None
    return None if found is None else found.rule(node)


# ------------------------------------------------------------------ what most rules need


def is_one(node: fx.Node, axis: int) -> bool:
    """Whether an axis is known to have size 1."""
    return bool(dims(node)[axis] == 1)


def broadcast_rows(node: fx.Node, inputs: list[fx.Node] | None = None) -> list[Rows]:
    """Rows of an operator that broadcasts its inputs: axes align from the back, axes of size 1 are not followed."""
    sizes = dims(node)
    operands = [(x, dims(x)) for x in (tensor_inputs(node) if inputs is None else inputs)]
    rows: list[Rows] = []
    for axis, size in enumerate(sizes):
        follows = []
        for x, own in operands:
            j = axis - (len(sizes) - len(own))
            if j >= 0 and (own[j] != 1 or size == 1):
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

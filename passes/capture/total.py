"""Operators that have a value, and a gradient, whatever finite rows they are given.

A model that takes rows may rely on what these rows are: that a count is not 0 where it divides by it. Computed for all rows
instead, the others become infinite or NaN, and a gradient of 0 for them is NaN as well.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from tokgraph.ir.node import argument

from ..rules import traits
from ..rules.registry import first_input

aten = torch.ops.aten
_TOTAL = frozenset({
    aten.abs.default, aten.add.Scalar, aten.add.Tensor, aten.addcmul.default, aten.clamp.default, aten.clamp_max.default,
    aten.clamp_min.default, aten.cos.default, aten.elu.default, aten.gelu.default, aten.hardsigmoid.default,
    aten.hardswish.default, aten.hardtanh.default, aten.leaky_relu.default, aten.log_sigmoid.default, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.maximum.default, aten.minimum.default, aten.mish.default, aten.mul.Scalar,
    aten.mul.Tensor, aten.neg.default, aten.relu.default, aten.rsub.Scalar, aten.rsub.Tensor, aten.sigmoid.default,
    aten.silu.default, aten.sin.default, aten.softplus.default, aten.square.default, aten.sub.Scalar, aten.sub.Tensor,
    aten.tanh.default, aten.where.self, torch.ops.tokgraph.routed.default,
})  # fmt: skip
"""Elementwise operators of which that is true."""
_DIVIDES = (aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.true_divide.Scalar)
_ROOTS = (aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default)
_NOT_NEGATIVE = frozenset({
    aten.abs.default, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.relu.default, aten.sigmoid.default,
    aten.softplus.default, aten.square.default, aten.var.correction,
})  # fmt: skip
_MEANS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
_PLACES = (aten.expand.default, aten.expand_as.default, aten.unsqueeze.default)
_ROOTS_OF_SUMS = (aten.std.correction, aten.std_mean.correction)
"""Their gradient where all features are equal is a division by 0."""


def is_total(node: fx.Node, rows: Collection[fx.Node]) -> bool:
    """Whether a call has a value and a gradient for all finite rows.

    Args:
        node: the call.
        rows: those of its inputs that are rows; the others are the same whichever rows there are.
    """
    if node.target in _DIVIDES:
        divisor = node.args[1]
        return divisor not in rows or _is_positive(divisor)
    if node.target in _ROOTS:
        return _is_positive(first_input(node))
    if node.target is aten.pow.Tensor_Scalar:
        exponent = argument(node, "exponent")
        return exponent in (1, 2, 3, 4)
    if node.target in _ROOTS_OF_SUMS:
        return False
    elementwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    val = node.meta["val"]
    exact = isinstance(val, torch.Tensor) and not val.is_floating_point()  # comparisons, which have no gradient
    return not elementwise or exact or node.target in _TOTAL or traits(node.target).copies


def _is_positive(x: object) -> bool:
    """Whether a value is known to be greater than 0."""
    if not isinstance(x, fx.Node):
        return isinstance(x, (int, float)) and x > 0
    if x.target in (aten.add.Tensor, aten.add.Scalar):
        return any(_is_positive(a) and _is_not_negative(b) for a, b in (x.args[:2], x.args[1::-1]))
    if x.target is aten.clamp_min.default or x.target is aten.clamp.default:
        return _is_positive(argument(x, "min", None))
    if x.target in _ROOTS or x.target in _PLACES or _moves(x):
        return _is_positive(first_input(x))
    return False


def _is_not_negative(x: object) -> bool:
    """Whether a value is known to be 0 or greater."""
    if not isinstance(x, fx.Node):
        return isinstance(x, (int, float)) and x >= 0
    if x.target is aten.pow.Tensor_Scalar:
        return argument(x, "exponent") in (2, 4)
    if x.target is aten.mul.Tensor:
        return x.args[0] is x.args[1]
    if x.target in _MEANS or x.target in _PLACES or _moves(x):
        return _is_not_negative(first_input(x))
    return x.target in _NOT_NEGATIVE or _is_positive(x)


def _moves(x: fx.Node) -> bool:
    return traits(x.target).copies or traits(x.target).reshape

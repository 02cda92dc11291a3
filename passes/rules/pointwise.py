"""Rules of elementwise operators: every output element needs the element at the same place, inputs broadcast."""

from __future__ import annotations

import operator

import torch
from torch import fx

from tokgraph.ir.node import dims, rank, same_size, tensor

from .registry import AxisMap, broadcast_rows, first_input, identity_rows, rule

aten = torch.ops.aten


@rule(
    torch.Tag.pointwise,
    # what torch does not tag, nor take apart before a graph is captured
    aten.__and__.Scalar, aten.__and__.Tensor, aten.__or__.Scalar, aten.__or__.Tensor, aten._conj.default,
    aten._neg_view.default, aten._prelu_kernel.default, aten.complex.default, aten.detach.default,
    aten.expand_as.default, aten.floor_divide.Scalar, aten.floor_divide.default, aten.hardswish.default,
    aten.log_sigmoid.default, aten.log_sigmoid_forward.default, aten.masked_fill.Tensor, aten.polar.default,
    aten.rsub.Tensor, aten.true_divide.Scalar, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf,
    # random numbers, drawn for every element on its own: with other rows beside it a row gets others, as likely
    aten.bernoulli.default, aten.bernoulli.Tensor, aten.bernoulli.p, aten.dropout.default, aten.native_dropout.default,
    broadcasts=True, axes=(),
)  # fmt: skip
@rule(
    aten._to_copy.default, aten.alias.default, aten.clone.default, aten.contiguous.default,
    aten.lift_fresh_copy.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.prim_Device,
    aten.to.prim_dtype, aten.to.prim_other,
    broadcasts=True, axes=(), copies=True,
)  # fmt: skip
@rule(
    aten.empty_like.default, aten.full_like.default, aten.ones_like.default, aten.zeros_like.default,
    broadcasts=True, axes=(), shape_only=True,
)  # fmt: skip
def pointwise(node: fx.Node) -> AxisMap:
    """Elementwise; size-1 axes broadcast."""
    return AxisMap(tuple(broadcast_rows(node)))


@rule(aten.type_as.default, aten.to.other, broadcasts=True, axes=())
def of_type(node: fx.Node) -> AxisMap:
    """A cast to the type of another tensor, of which neither the shape nor the values are read."""
    return AxisMap(tuple(broadcast_rows(node, [first_input(node)])))


@rule(operator.getitem)
def getitem(node: fx.Node) -> AxisMap:
    """One result of an operator with several; the axes of all results are taken to be those of the operator."""
    x = first_input(node)
    if tensor(node) is None or rank(x) != rank(node):
        return AxisMap((None,) * (0 if tensor(node) is None else rank(node)))
    same = [same_size(a, b) for a, b in zip(dims(x), dims(node), strict=True)]
    return AxisMap(tuple(row if same[axis] else None for axis, row in enumerate(identity_rows(node, x))))

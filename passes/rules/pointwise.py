"""Rules of elementwise operators: every output element needs the element at the same place, inputs broadcast."""

from __future__ import annotations

import operator

import torch
from torch import fx

from tokgraph.ir.node import dims, rank, same_size, tensor

from .registry import AxisMap, broadcast_rows, first_input, identity_rows, rule

aten = torch.ops.aten

UNARY = (
    "abs alias bitwise_not ceil celu clone contiguous cos dropout elu erf exp expm1 floor gelu hardsigmoid hardswish "
    "hardtanh isinf isnan leaky_relu log log1p log_sigmoid logical_not lift_fresh_copy mish neg reciprocal relu relu6 "
    "round rsqrt selu sigmoid sign silu sin softplus sqrt square tanh detach detach_ zeros_like ones_like full_like "
    "empty_like nan_to_num rsub _to_copy to clamp clamp_min clamp_max threshold bernoulli native_dropout positive"
).split()
BINARY = (
    "add sub mul div pow maximum minimum fmod remainder floor_divide true_divide eq ne lt le gt ge __and__ __or__ "
    "__xor__ bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor where masked_fill lerp addcmul "
    "addcdiv type_as expand_as atan2 copysign hypot xlogy"
).split()


def _overloads(names: list[str]) -> list[object]:
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    chosen = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return [
        op
        for op in chosen
        if not op._schema.is_mutable
        and "out" not in op._overloadname.split("_")
        and all(isinstance(result.type, torch.TensorType) for result in op._schema.returns)  # not where(condition)
    ]


BROADCASTING = frozenset((*_overloads(UNARY), *_overloads(BINARY)))
"""Operators whose inputs align from the back: a missing batch axis can be put before an input without changing them."""
_OF_TYPE = (aten.type_as.default, aten.to.other)
"""Operators that read the type of their second tensor, and neither its shape nor its values."""


@rule(*sorted(BROADCASTING, key=str))
def pointwise(node: fx.Node) -> AxisMap:
    """Elementwise; size-1 axes broadcast."""
    return AxisMap(tuple(broadcast_rows(node, [first_input(node)] if node.target in _OF_TYPE else None)))


@rule(operator.getitem)
def getitem(node: fx.Node) -> AxisMap:
    """One result of an operator with several; the axes of all results are taken to be those of the operator."""
    x = first_input(node)
    if tensor(node) is None or rank(x) != rank(node):
        return AxisMap((None,) * (0 if tensor(node) is None else rank(node)))
    same = [same_size(a, b) for a, b in zip(dims(x), dims(node), strict=True)]
    return AxisMap(tuple(row if same[axis] else None for axis, row in enumerate(identity_rows(node, x))))

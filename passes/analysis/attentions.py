"""Attentions over the token axis: the operators that mix tokens, and what each of them reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from tokgraph.ir.blocks import Attention, KeyOperand
from tokgraph.ir.node import argument, rank, tensor_inputs

from ..rules import axis_map, traits
from ..rules.registry import Axis, Mix
from .axes import AxisClasses

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default,)  # not bmm: it merges batch and heads


@dataclass(frozen=True)
class TokenMix:
    """An operator that mixes rows of the token axis.

    Args:
        node: the operator.
        mix: how it mixes them.
    """

    node: fx.Node
    mix: Mix


def token_mixes(nodes: Iterable[fx.Node], classes: AxisClasses, tokens: Axis) -> list[TokenMix]:
    """The operators among ``nodes`` that mix rows of the token axis, each with the mix that does it."""
    found = []
    for node in nodes:
        described = axis_map(node)
        for mix in described.mixes if described else ():
            if any(classes.same(axis, tokens) for axis in mix.axes):
                found.append(TokenMix(node, mix))
    return found


def attentions(nodes: Iterable[fx.Node]) -> list[TokenMix]:
    """What is, or may be part of, an attention among ``nodes``, over whatever axes."""
    mixes = ((node, described) for node in nodes if (described := axis_map(node)) is not None)
    return [TokenMix(node, mix) for node, d in mixes for mix in d.mixes if mix.kind in ("attention", "softmax")]


def as_attention(mixing: TokenMix, classes: AxisClasses, tokens: Axis) -> Attention | None:
    """The attention that a mix is, or is part of; ``None`` where it is none that tokgraph knows."""
    samples = (tokens[0], 0)
    if mixing.mix.kind == "attention":
        node = mixing.node
        names = {argument(node, name): name for name in ("key", "value", "attn_mask") if argument(node, name)}
        operands = tuple(
            KeyOperand(node.name, x.name, axis, names[x], classes.sample_axis(x, samples))
            for x, axis in mixing.mix.axes
        )
        scores, rows = node, (argument(node, "query"), rank(node) - 2)
        output = node
        kind: Literal["sdpa", "eager"] = "sdpa"
    elif mixing.mix.kind == "softmax":
        ((scores, axis),) = mixing.mix.axes
        product = weighted_sum(mixing.node, axis)
        if product is None:
            return None
        values = product.args[1]
        assert isinstance(values, fx.Node)
        operands = (
            KeyOperand(mixing.node.name, scores.name, axis, "scores", classes.sample_axis(scores, samples)),
            KeyOperand(product.name, values.name, rank(values) - 2, "value", classes.sample_axis(values, samples)),
        )
        rows, output, kind = (scores, rank(scores) - 2), product, "eager"
    else:
        return None
    batch = classes.sample_axis(scores, samples) if classes.same(rows, tokens) else None
    return Attention(kind, mixing.node.name, operands, output.name, batch)


def weighted_sum(softmax: fx.Node, axis: int) -> fx.Node | None:
    """The matmul that the softmax's weights reach through row-wise operators alone, contracting their key axis."""
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in _PRODUCTS and user.args[0] is node:
            return user if axis == rank(node) - 1 else None
        described = axis_map(user)
        if (
            described is None
            or traits(user.target).sized
            or len(tensor_inputs(user)) != 1
            or described.rows[axis : axis + 1] != (((node, axis),),)
        ):
            return None
        node = user
    return None

"""Attentions over the token axis: the operators that mix tokens, and what each of them reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from tokgraph.ir.blocks import Attention, KeyOperand
from tokgraph.ir.node import argument, rank, tensor

from ..rules import axis_map
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
    last = all(k.axis == rank(scores) - 1 for k in operands if k.role == "scores")
    batch = classes.sample_axis(scores, samples) if last and classes.same(rows, tokens) else None
    return Attention(kind, mixing.node.name, operands, output.name, batch)


def weighted_sum(softmax: fx.Node, axis: int) -> fx.Node | None:
    """The matmul that the softmax's weights reach through row-wise operators alone, contracting their key axis."""
    found = weights_of(softmax, axis)
    return found[0] if found is not None else None


def weights_of(softmax: fx.Node, axis: int) -> tuple[fx.Node, dict[fx.Node, int]] | None:
    """The weighted sum of a softmax's weights, and the values between the two, each with its key axis.

    Args:
        softmax: the softmax.
        axis: the axis over which it normalises.

    Returns:
        ``None`` where not all that is made of the weights is read by one product, as its left operand; or where something in
        between does not work on each key alone, or reads other values that have an axis of keys, unless these are weights
        as well (the difference of two attentions).
    """
    flow = {softmax: axis}
    stack, product = [softmax], None
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.target in _PRODUCTS and user.args[0] is node and user.args[1] is not node:
                if flow[node] != rank(node) - 1 or product not in (None, user):
                    return None
                product = user
                continue
            place = _key_axis(user, node, flow)
            if place is None:
                return None
            if user not in flow:
                flow[user] = place
                stack.append(user)
    return None if product is None else (product, flow)


def _key_axis(user: fx.Node, node: fx.Node, flow: dict[fx.Node, int]) -> int | None:
    """The axis of keys of a value that is made of weights, if it is made of each of them alone."""
    described = axis_map(user) if tensor(user) is not None else None
    if described is None:
        return None
    followed = [a for a, rows in enumerate(described.rows) if (node, flow[node]) in (rows or ())]
    if len(followed) != 1 or described.mixed((node, flow[node])) is not None:
        return None
    others = [(x, j) for x, j in described.rows[followed[0]] or () if x is not node]
    return followed[0] if all(_weights(x, j) for x, j in others) else None


def _weights(x: fx.Node, axis: int) -> bool:
    """Whether a value is made of attention weights, and of nothing else that has an axis of keys."""
    described = axis_map(x) if tensor(x) is not None and x.op == "call_function" else None
    if described is None:
        return False
    if any(mix.kind == "softmax" and (axis, mix.axes[0]) in described.aligned for mix in described.mixes):
        return True
    rows = described.rows[axis]
    return bool(rows) and all(_weights(y, j) for y, j in rows or ())

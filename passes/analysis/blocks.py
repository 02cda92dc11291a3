"""Decoder blocks and their attentions: residual segments grouped by where tokens mix, confirmed by the module stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.facts import Attention, Block, KeyOperand
from tokgraph.ir.node import argument, rank, tensor, tensor_inputs, where
from tokgraph.ir.program import TaskGraph

from ..rules import axis_map, traits
from ..rules.registry import Axis, Mix
from .axes import AxisClasses
from .projections import find_projections
from .stream import Segment

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


def token_axis(graph: TaskGraph, segments: Sequence[Segment], classes: AxisClasses) -> tuple[fx.Node, int]:
    """The stream's first value and its token axis: the axis over which the segments' attentions mix.

    Raises:
        AnalysisError: no attention mixes an axis of the stream, or the stream is not ``[batch, tokens, hidden]``.
    """
    entry = segments[0].start
    votes: Counter[int] = Counter()
    for segment in segments:
        for node in segment.nodes:
            described = axis_map(node)
            for mix in described.mixes if described else ():
                if mix.kind in ("attention", "softmax"):
                    votes.update(a for a in range(rank(entry)) if classes.same((entry, a), mix.axes[0]))
    if not votes:
        raise AnalysisError(
            f"task {graph.name!r}: no attention over the residual stream was found",
            where=where(entry),
            help="tokgraph understands scaled_dot_product_attention and softmax followed by matmul",
        )
    axis = votes.most_common(1)[0][0]
    if rank(entry) != 3 or axis != 1:
        raise AnalysisError(
            f"task {graph.name!r}: the residual stream has shape {tuple(tensor(entry).shape)} with its tokens on axis "  # type: ignore[union-attr]
            f"{axis}; tokgraph needs [batch, tokens, hidden]",
            where=where(entry),
        )
    return entry, axis


def find_blocks(segments: Sequence[Segment], classes: AxisClasses, tokens: Axis) -> tuple[Block, ...]:
    """Group residual segments into blocks.

    A block begins where tokens mix; segments that mix none (the FFN) belong to the block before them, and those before the
    first mix (what is added to embeddings) to none. Neighbours that both mix tokens are one block when the module stack
    says that one module holds both (self- and cross-attention).
    """
    groups: list[list[Segment]] = []
    for segment in segments:
        mixes = bool(token_mixes(segment.nodes, classes, tokens))
        if not groups and not mixes:
            continue
        together = bool(groups) and segment.module != "" and _same_layer(groups[-1][0].module, segment.module)
        if groups and (not mixes or together):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return tuple(_block(index, group, classes, tokens) for index, group in enumerate(groups))


def _same_layer(a: str, b: str) -> bool:
    shorter, longer = sorted((a.split("."), b.split(".")), key=len)
    return bool(shorter[-1]) and longer[: len(shorter)] == shorter and any(part.isdigit() for part in shorter)


def _block(index: int, group: list[Segment], classes: AxisClasses, tokens: Axis) -> Block:
    nodes = tuple(node for segment in group for node in segment.nodes)
    found = tuple(
        attention
        for mixing in token_mixes(nodes, classes, tokens)
        if (attention := _attention(mixing, classes)) is not None
    )
    module = min((s.module for s in group), key=len)
    names = tuple(n.name for n in nodes)
    projections = find_projections(found, nodes)
    return Block(index, module, group[0].start.name, group[-1].end.name, names, found, projections)


def token_mixes(nodes: Sequence[fx.Node], classes: AxisClasses, tokens: Axis) -> list[TokenMix]:
    """The operators among ``nodes`` that mix rows of the token axis, each with the mix that does it."""
    found = []
    for node in nodes:
        described = axis_map(node)
        for mix in described.mixes if described else ():
            if any(classes.same(axis, tokens) for axis in mix.axes):
                found.append(TokenMix(node, mix))
    return found


def _attention(mixing: TokenMix, classes: AxisClasses) -> Attention | None:
    if mixing.mix.kind == "attention":
        node = mixing.node
        names = {argument(node, name): name for name in ("key", "value", "attn_mask") if argument(node, name)}
        operands = tuple(KeyOperand(node.name, x.name, axis, names[x]) for x, axis in mixing.mix.axes)
        return Attention("sdpa", node.name, operands, node.name)
    if mixing.mix.kind == "softmax":
        ((scores, axis),) = mixing.mix.axes
        product = _weighted_sum(mixing.node, axis)
        if product is not None:
            values = product.args[1]
            assert isinstance(values, fx.Node)
            operands = (
                KeyOperand(mixing.node.name, scores.name, axis, "scores"),
                KeyOperand(product.name, values.name, rank(values) - 2, "value"),
            )
            return Attention("eager", mixing.node.name, operands, product.name)
    return None


def _weighted_sum(softmax: fx.Node, axis: int) -> fx.Node | None:
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
            or described.rows[axis] != ((node, axis),)
        ):
            return None
        node = user
    return None

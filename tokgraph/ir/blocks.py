"""Decoder blocks as data: their attentions, what crosses their boundaries, and what was found beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class KeyOperand:
    """An operand of an attention that has the key axis.

    Args:
        user: node that reads the operand (the fused attention, the softmax, or the weighted sum).
        node: the operand.
        axis: its key axis.
        role: ``"key"``, ``"value"``, ``"attn_mask"`` or ``"scores"``.
        batch: its batch axis; ``None``: it has none of its own.
    """

    user: str
    node: str
    axis: int
    role: str
    batch: int | None = 0


@dataclass(frozen=True)
class Attention:
    """One attention over the token axis.

    Args:
        kind: ``"sdpa"``: one fused node; ``"eager"``: softmax, row-wise operators, weighted sum.
        node: the fused node, or the softmax.
        keys: the operands that are narrowed when keys are hidden.
        output: the node whose rows are the attention's output rows.
        batch: batch axis of its scores, ``[..., tokens, keys]``; ``None``: they have no such axis, or several, or their
            rows are not the tokens.
        direct: its keys and values are made of the stream as it is before the block, and of nothing that the block has
            added to it already.
    """

    kind: Literal["sdpa", "eager"]
    node: str
    keys: tuple[KeyOperand, ...]
    output: str
    batch: int | None = 0
    direct: bool = True


@dataclass(frozen=True)
class Unplaced:
    """An attention over the token axis whose layer is no block.

    Args:
        node: the attention, or its softmax.
        module: path of the module that it is in.
        block: the block that holds it beside attentions of other layers; ``None``: it is in no block.
        source: ``file:line`` of the call, where export kept it.
    """

    node: str
    module: str
    block: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Between:
    """Something with parameters of its own that is added to the stream between two layers, and may be part of either.

    Args:
        node: its first operator with a parameter.
        module: the path of its item in a list of modules (``cross.1``).
        source: ``file:line`` of the call, where export kept it.
    """

    node: str
    module: str
    source: str | None = None


@dataclass(frozen=True)
class Projection:
    """A linear map by which an attention gets its queries, keys or values from the residual stream.

    Args:
        node: the ``linear`` call.
        weight: name of its weight.
        bias: name of its bias.
        keys: keys or values are among what it makes; else queries only.
    """

    node: str
    weight: str
    bias: str | None
    keys: bool


@dataclass(frozen=True)
class Stream:
    """A further value of the state that blocks hand on: one of several streams.

    Args:
        start: the value before a block.
        end: what takes its place after it.
    """

    start: str
    end: str


@dataclass(frozen=True)
class Side:
    """Something beside the decoder that mixes rows which a block makes: the mean of a router's probabilities.

    Args:
        reader: the node that mixes them.
        value: the value before it whose token axis is still its own; what lies between works on each row alone.
        axis: the token axis of that value.
        batch: its batch axis.
        at: the axis of the reader's operand that the rows are on, those of all samples one after the other where ``merged``.
        merged: the rows of all samples are on one axis.
        parts: numbers of the blocks whose rows are joined on that axis, in order; empty: those of this block alone.
        places: at each join between, from the reader on, which of its operands leads to the value.
        weights: ``[batch, tokens]``: the value that weighs the rows, before its axes are merged as theirs are; empty: none.
        why: why the reader cannot be given fewer rows, as a clause about it; empty: it can, being a mean.
    """

    reader: str
    value: str
    axis: int = 1
    batch: int = 0
    at: int = 1
    merged: bool = False
    parts: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    weights: str = ""
    why: str = ""


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Args:
        index: its number, from 0.
        module: module path, ``""`` when export recorded none.
        start: the residual stream before the block.
        end: the residual stream after it.
        nodes: its nodes, in graph order.
        attention: its attentions over the token axis.
        projections: the projections of these attentions; none where one is no ``linear`` of the model's own parameters.
        tensors: names of the model's parameters and buffers that it reads.
        streams: further streams beside the residual one, each before and after the block.
        beside: values beside the streams that later blocks read and that depend on its attention.
        sides: what reads its rows beside the decoder and mixes them.
    """

    index: int
    module: str
    start: str
    end: str
    nodes: tuple[str, ...]
    attention: tuple[Attention, ...]
    projections: tuple[Projection, ...] = ()
    tensors: tuple[str, ...] = field(default=(), repr=False)
    streams: tuple[Stream, ...] = ()
    beside: tuple[str, ...] = ()
    sides: tuple[Side, ...] = ()

    @property
    def before(self) -> tuple[str, ...]:
        """The state before the block."""
        return (self.start, *(stream.start for stream in self.streams))

    @property
    def after(self) -> tuple[str, ...]:
        """The state after it."""
        return (self.end, *(stream.end for stream in self.streams))

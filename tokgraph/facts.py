"""What analysis finds, as data: visual flow, blocks, attention, demand and pathways of each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .program import Dimension


@dataclass(frozen=True)
class VisualFlow:
    """Where the visual tokens of a task enter the residual stream.

    Args:
        kind: ``"ids"``: an id range of an input; ``"mask"``: a boolean node; ``"range"``: a range of positions.
        entry: node at which visual and text rows are together for the first time (the stream's first value).
        source: node that is the mask, or the ids; ``None`` for a range.
        low: smallest id (``"ids"``).
        high: largest id, inclusive (``"ids"``).
        start: first position (``"range"``), negative from the end; or the nodes whose sizes add up to it.
        stop: position after the last (``"range"``), ``None``: the end.
        before: nodes (and their axis) whose sizes come before the range, when ``entry`` concatenates.
        width: the node (and its axis) whose size is the range's length, when ``entry`` concatenates.
        carriers: the values through which visual rows pass, entry and block boundaries, in order.
        exits: nodes that read the stream after the last block (loss and outputs).
        count: visual tokens of each sample.
        runs: contiguous runs of visual tokens of a sample, the most in the example batch.
    """

    kind: Literal["ids", "mask", "range"]
    entry: str
    count: int
    runs: int
    source: str | None = None
    low: int | None = None
    high: int | None = None
    start: int | None = None
    stop: int | None = None
    before: tuple[tuple[str, int], ...] = ()
    width: tuple[str, int] | None = None
    carriers: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attention:
    """One attention over the token axis.

    Args:
        kind: ``"sdpa"``: one fused node; ``"eager"``: softmax, row-wise ops, matmul.
        node: the fused node, or the softmax.
        keys: ``(node, axis)`` pairs that form the key axis where the semantics of *hide* apply: the operands of the
            fused node (key, value, mask), or the softmax's input and the value operand of the matmul.
        query: the query operand.
        output: the node whose rows are the attention's output rows.
    """

    kind: Literal["sdpa", "eager"]
    node: str
    keys: tuple[tuple[str, int, str], ...]
    output: str


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
    """

    index: int
    module: str
    start: str
    end: str
    nodes: tuple[str, ...]
    attention: tuple[Attention, ...]


@dataclass(frozen=True)
class Demand:
    """Which rows the task's loss reads.

    Args:
        reads: ``"text"``, ``"visual"`` or ``"all"``.
        rows: number of demanded rows of a sample, the most in the example batch.
        visual: how many of them are visual, the most in the example batch.
        skipped: number of rows of a sample that are not demanded, the least in the example batch.
        tokens: length of the token axis in the example batch.
    """

    reads: str
    rows: int
    visual: int
    skipped: int
    tokens: int


@dataclass(frozen=True)
class TaskFacts:
    """Everything analysis knows of one task.

    Args:
        name: the task.
        entry: node that is the stream's first value, ``[batch, tokens, hidden]``.
        batch_axis: axis of ``entry`` that is the batch.
        token_axis: axis of ``entry`` that is the token axis.
        blocks: decoder blocks in order.
        visual: where visual tokens are.
        demand: which rows are read.
        token_axes: node -> its axes that are the token axis (query and key axes alike).
        parameters: parameter name -> share of the task's demanded-reaching visual tokens that it transforms.
        dimensions: dimensions asked to be dynamic.
        unruled: operators on the token axis that have no rule, by node.
    """

    name: str
    entry: str
    batch_axis: int
    token_axis: int
    blocks: tuple[Block, ...]
    visual: VisualFlow
    demand: Demand
    token_axes: Mapping[str, tuple[int, ...]] = field(repr=False)
    parameters: Mapping[str, float] = field(repr=False)
    dimensions: tuple[Dimension, ...] = ()
    unruled: tuple[tuple[str, str], ...] = ()

    @property
    def stream(self) -> tuple[str, ...]:
        """The residual cut points: one before every block and one after the last."""
        return (*(block.start for block in self.blocks), self.blocks[-1].end)


class Facts(Mapping[str, TaskFacts]):
    """Task name -> :class:`TaskFacts`."""

    def __init__(self, tasks: Mapping[str, TaskFacts]) -> None:
        self._tasks = dict(tasks)

    def __getitem__(self, task: str) -> TaskFacts:
        return self._tasks[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def shared_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that every task's visual tokens pass."""
        names = [{p for p, share in facts.parameters.items() if share > 0} for facts in self.values()]
        return tuple(sorted(set.intersection(*names))) if names else ()

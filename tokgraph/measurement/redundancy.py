"""How much visual rows change from block to block, and how many directions they span."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.program import TaskGraph

from .observe import Call, Watched, observe


@dataclass(frozen=True)
class Redundancy:
    """Redundancy of the visual rows of the residual stream, a number a block.

    Args:
        cosine: mean cosine similarity of a visual row before and after the block: 1 where the block changes nothing.
        effective_rank: effective rank of the visual rows after the block, between 1 and the smaller of their number and
            the hidden size.
    """

    cosine: tuple[float, ...]
    effective_rank: tuple[float, ...]


def effective_rank(rows: torch.Tensor) -> float:
    """The exponential of the entropy of the normalised singular values.

    Args:
        rows: ``[rows, hidden]``, floating.

    Returns:
        A number between 1 and ``min(rows, hidden)``; 0 for rows that are all zero.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. 3 to 5.
    """
    values = torch.linalg.svdvals(rows.double())
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


class RedundancyMeter:
    """Adds up cosine similarities over rows and effective ranks over samples.

    Args:
        facts: facts of the task that runs.
    """

    def __init__(self, facts: TaskFacts) -> None:
        blocks = len(facts.blocks)
        self._position = {name: i for i, name in enumerate(facts.stream)}
        self._cosine, self._rank = [0.0] * blocks, [0.0] * blocks
        self._rows = self._samples = 0
        self._visual = self._before = torch.empty(0)

    def nodes(self) -> Iterable[str]:
        """The residual stream before the first block and after each."""
        return self._position

    def begin(self, batch: Watched) -> None:
        """Count what the batch will add."""
        self._visual = batch.visual
        self._rows += int(batch.visual.sum())
        self._samples += int(batch.visual.any(1).sum())

    def see(self, call: Call) -> None:
        """Compare the visual rows with those before the block, and take their rank."""
        stream: torch.Tensor = call.result.flatten(2)  # several streams side by side
        visual = self._visual.to(stream.device)
        after, block = stream[visual], self._position[call.node.name] - 1
        if block >= 0:
            wide = torch.promote_types(after.dtype, torch.float32)  # half precision would round the sum of products
            alike = F.cosine_similarity(self._before.to(wide), after.to(wide), dim=-1)
            self._cosine[block] += float(alike.double().sum())
            self._rank[block] += sum(effective_rank(x[v]) for x, v in zip(stream, visual, strict=True) if v.any())
        self._before = after

    def result(self) -> Redundancy:
        """The means so far; NaN before the first visual row."""
        return Redundancy(
            tuple(_mean(total, self._rows) for total in self._cosine),
            tuple(_mean(total, self._samples) for total in self._rank),
        )


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan


def visual_redundancy(
    graph: TaskGraph,
    facts: TaskFacts,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Redundancy:
    """Measure the redundancy of a captured task's visual rows.

    Args:
        graph: the captured task graph.
        facts: its facts.
        batches: inputs by name; ``None``: the example batch. Cosines are averaged over all visual rows, ranks over samples.
        dtype: the type to compute in; ``None``: the model's own.

    Raises:
        AnalysisError: the model is on the meta device.
        BatchError: a batch does not fit the graph.
    """
    meter = RedundancyMeter(facts)
    observe(graph, facts, [meter], batches, dtype)
    return meter.result()

"""Everything that a forward pass shows of a task's visual tokens, from one interpretation of each batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.program import TaskGraph

from .attention import MAX_BYTES, Allocation, AllocationMeter
from .observe import observe
from .redundancy import Redundancy, RedundancyMeter


@dataclass(frozen=True)
class ForwardMeasures:
    """What was measured of one task.

    Args:
        allocation: attention between segments.
        redundancy: change and rank of the visual rows.
    """

    allocation: Allocation
    redundancy: Redundancy


def measure_forward(
    graph: TaskGraph,
    facts: TaskFacts,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    queries: Sequence[str] | None = None,
    max_bytes: int = MAX_BYTES,
    dtype: torch.dtype | None = None,
) -> ForwardMeasures:
    """Measure attention allocation and redundancy together; each batch runs once.

    Args:
        graph: the captured task graph.
        facts: its facts.
        batches: inputs by name; ``None``: the example batch.
        queries: as in :func:`~.attention.attention_allocation`, and so the others.
        max_bytes: bound of the attention weights held at once.
        dtype: the type to compute in; ``None``: the model's own.

    Raises:
        AnalysisError: as in :func:`~.attention.attention_allocation`, and so the others.
        BatchError: a batch does not fit the graph.
        SpecError: a segment or ``max_bytes`` is not usable.
    """
    allocation, redundancy = AllocationMeter(graph, facts, queries, max_bytes), RedundancyMeter(facts)
    observe(graph, facts, [allocation, redundancy], batches, dtype, max_bytes)
    return ForwardMeasures(allocation.result(), redundancy.result())

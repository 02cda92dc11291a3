"""A second batch, of other sizes, to check an exported graph on: what holds for one batch only is no graph of the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tokgraph.errors import BatchError
from tokgraph.ir.program import Dimension, TaskGraph

Batch = dict[str, Any]
_BATCH_AXIS = 0


def other_sizes(graph: TaskGraph, inputs: Mapping[str, Any]) -> tuple[Batch, dict[str, int]] | None:
    """A batch like ``inputs`` in which every dimension that the graph leaves open has another size.

    Open dimensions at axis 0 are repeated in reverse order; in others one position is there twice. Which position, the
    program decides: a text token's (another number of visual tokens is refused).

    Args:
        graph: the task's graph.
        inputs: the example batch.

    Returns:
        The batch and the sizes of its open dimensions, by the user's names; ``None`` where the graph fixes all sizes.
    """
    batch = _repeat(graph, inputs)
    changed = any(batch[key] is not inputs[key] for key in inputs) and _runs(graph, batch)
    batch = batch if changed else dict(inputs)
    for dims in _lengths(graph).values():
        longer = next((b for b in _longer(dims, batch) if _runs(graph, b)), None)
        if longer is not None:
            batch, changed = longer, True
    return (batch, _sizes(graph, batch)) if changed else None


def _open(graph: TaskGraph) -> list[Dimension]:
    return [d for d in graph.dimensions if d.symbol is not None]


def _repeat(graph: TaskGraph, inputs: Mapping[str, Any]) -> Batch:
    rows = {d.input for d in _open(graph) if d.dim == _BATCH_AXIS}
    return {
        key: torch.cat([x, x.flip(0)[: max(1, len(x) - 1)]]) if key in rows and isinstance(x, torch.Tensor) else x
        for key, x in inputs.items()
    }


def _lengths(graph: TaskGraph) -> dict[str, list[Dimension]]:
    """Name -> open dimensions that are not at axis 0."""
    found: dict[str, list[Dimension]] = {}
    for d in _open(graph):
        if d.dim != _BATCH_AXIS:
            found.setdefault(d.name, []).append(d)
    return found


def _longer(dims: list[Dimension], inputs: Mapping[str, Any]) -> Iterator[Batch]:
    """Batches in which one position is there twice, the first and the last before others."""
    shortest = min(d.size for d in dims)
    for position in dict.fromkeys((0, shortest - 1, *range(shortest))):
        batch = dict(inputs)
        for d in dims:
            batch[d.input] = _twice(batch[d.input], d.dim, position)
        yield batch


def _twice(x: torch.Tensor, dim: int, position: int) -> torch.Tensor:
    return torch.cat([x.narrow(dim, 0, position + 1), x.narrow(dim, position, x.shape[dim] - position)], dim)


def _runs(graph: TaskGraph, batch: Mapping[str, Any]) -> bool:
    with torch.no_grad():
        try:
            graph.graph_module(*(x.clone() if isinstance(x, torch.Tensor) else x for x in graph.flatten(batch)))
        except (BatchError, RuntimeError):
            return False
    return True


def _sizes(graph: TaskGraph, batch: Mapping[str, Any]) -> dict[str, int]:
    return {d.name: int(batch[d.input].shape[d.dim]) for d in _open(graph)}

"""What a training step keeps for its backward pass where blocks are computed again there: activation checkpointing."""

from __future__ import annotations

from torch import fx

from tokgraph.ir.program import TaskGraph

from ..cost.works import Counted, count_nodes, example_number
from .pieces import block_count, floors_of


def kept_bytes(graph: TaskGraph, *, checkpoint: bool, counted: Counted | None = None) -> int:
    """Bytes that are kept between forward and backward on the example batch, beside parameters and the batch.

    Args:
        graph: a captured or rewritten graph; its calls carry their places.
        checkpoint: blocks keep what they read only, and compute their values again.
        counted: spares counting anew.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    number = example_number(graph)
    held = (counted or count_nodes(graph)).held
    floors, last = floors_of(graph.graph), block_count(graph.graph)
    storages: set[fx.Node] = set()
    beside = 0.0
    for node, x in held.items():
        if checkpoint and 0 < floors[node] <= last:
            storages |= {held[i].storage for i in node.all_input_nodes if i in held and floors[i] != floors[node]}
        else:
            storages |= x.saved
            beside += number(x.beside)
    return int(beside + sum(number(held[x].bytes) for x in storages if x in held and held[x].storage is x))

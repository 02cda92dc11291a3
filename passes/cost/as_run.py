"""A captured graph as it is run and counted: experts of modalities compute their own rows, as the model's code has them do."""

from __future__ import annotations

from tokgraph.ir.program import TaskGraph

from ..pipeline import Pipeline
from ..simplify.taken import TakeRoutedRows, routed


def as_run(graph: TaskGraph) -> TaskGraph:
    """The graph in which rows of routed values are taken; itself, where it has none."""
    if not graph.graph.find_nodes(op="call_function", target=routed):
        return graph
    return Pipeline([TakeRoutedRows()]).run_task(graph)

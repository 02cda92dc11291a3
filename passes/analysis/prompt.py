"""Where a task's labels are, and so where its prompt ends: read off its cross entropy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tokgraph.ir.facts import Prompt, Window
from tokgraph.ir.node import argument, axis_argument, by_name, descendants
from tokgraph.ir.program import TaskGraph

from .axes import AxisClasses
from .loss_rows import LossRows, loss_rows


def find_prompt(
    graph: TaskGraph, last: Sequence[fx.Node], classes: AxisClasses, windows: tuple[Window, ...]
) -> Prompt | None:
    """The labels of the first cross entropy over rows of the token axis, or of a slice of it that starts at a fixed row.

    Args:
        graph: the task graph.
        last: the streams after the last block.
        classes: the graph's axes.
        windows: slices of the token axis.
    """
    later = descendants(last)
    for node in graph.graph.nodes:
        rows = loss_rows(node) if node in later else None
        first = None if rows is None else _first_row(graph, rows, last[0], classes, windows)
        if rows is not None and first is not None:
            return Prompt(rows.targets.name, argument(node, "ignore_index", -100), first)
    return None


def _first_row(
    graph: TaskGraph, rows: LossRows, after: fx.Node, classes: AxisClasses, windows: tuple[Window, ...]
) -> int | None:
    mine = (rows.logits, rows.axis)
    if classes.same(mine, (after, 1)):
        return 0
    nodes = by_name(graph.graph)
    for window in windows:
        node = nodes[window.node]
        axis, start = axis_argument(node, node), argument(node, "start") or 0
        if classes.same(mine, (node, axis)) and isinstance(start, int) and start >= 0:
            return start
    return None

"""Which rows a task's loss reads (DESIGN: demanded positions), counted on the example batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.nn import functional as F

from tokgraph.ir.facts import Demand, Window
from tokgraph.ir.node import argument, axis_argument, descendants, value
from tokgraph.ir.program import TaskGraph

from ..rules.registry import first_input
from .axes import AxisClasses


def demanded(visual: torch.Tensor, reads: str) -> torch.Tensor:
    """``[batch, tokens]`` bool: rows of the kind that is read, and rows whose successor is of that kind.

    A next-token loss reads row ``i`` to predict token ``i + 1``; some models shift the labels inside, so rows of the kind
    itself count as well (a safe superset).

    Args:
        visual: ``[batch, tokens]`` bool, the visual tokens.
        reads: ``"text"``, ``"visual"`` or ``"all"``.
    """
    if reads == "all":
        return torch.ones_like(visual)
    kind = visual if reads == "visual" else ~visual
    return kind | F.pad(kind[:, 1:], (0, 1), value=False)


def find_demand(graph: TaskGraph, visual: torch.Tensor) -> Demand:
    """The demand of a task, every row when its outputs are to stay whole."""
    reads = "all" if graph.task.outputs == "full" else graph.task.reads
    rows = demanded(visual, reads)
    seen = (rows & visual).sum(1)
    even = bool((seen == seen[0]).all())
    return Demand(
        reads, int(rows.sum(1).max()), int(seen.max()), visual.shape[1], even, int((visual & ~rows).sum(1).min())
    )


def find_windows(
    graph: TaskGraph, last: Sequence[fx.Node], classes: AxisClasses, visual: torch.Tensor, reads: str
) -> tuple[Window, ...]:
    """The slices of the token axis among what is computed from ``last``, the streams after the last block."""
    read, found, later = demanded(visual, reads), [], descendants(last)
    after = last[0]
    for node in graph.graph.nodes:
        if node in later and node.target is torch.ops.aten.slice.Tensor:
            x = first_input(node)
            axis = axis_argument(node, x)
            rows_of_samples = axis > 0 and classes.sample_axis(x, (after, 0)) == 0
            if rows_of_samples and classes.same((x, axis), (after, 1)) and argument(node, "step", 1) == 1:
                taken = slice(_hint(argument(node, "start")), _hint(argument(node, "end")))
                rows, seen = read[:, taken], visual[:, taken]
                found.append(Window(node.name, rows.shape[1], int(rows.sum(1).max()), int(seen.sum(1).max())))
    return tuple(found)


def _hint(bound: object) -> int | None:
    """A slice bound in the example batch."""
    if isinstance(bound, fx.Node):
        size = value(bound)
        return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
    return bound if isinstance(bound, int) else None

"""FLOPs of a training step on the example batch, summed over the nodes of a task graph."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from tokgraph.ir.program import TaskGraph

from .as_run import as_run
from .works import example_symbols, node_works


@dataclass(frozen=True)
class Flops:
    """FLOPs of one training step on the example batch; a multiply-add is two, element-wise work is not counted.

    Args:
        forward: of the forward pass.
        backward: of the backward pass, for the parameters that require gradients.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def count_flops(graph: TaskGraph) -> Flops:
    """Count the FLOPs of one training step of a task graph on its example batch.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    graph = as_run(graph)
    example = example_symbols(graph)
    works = node_works(graph).values()
    totals = [sympy.Add(*(getattr(w, name) for w in works)) for name in ("forward_flops", "backward_flops")]
    return Flops(*(int(total.xreplace(example)) for total in totals))

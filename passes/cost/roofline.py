"""How long a training step takes at least, node by node: by its FLOPs or by the bytes that it moves.

The roofline model (Williams et al., 2009, doi 10.1145/1498765.1498785), operator by operator: fused kernels can be faster,
as they move fewer bytes. Time that passes between kernels is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import fx

from tokgraph.ir.cost import Work
from tokgraph.ir.node import tensor, value
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.rates import Rates
from tokgraph.ops import NAMESPACE, OF_MODELS

from .works import Counted, count_nodes, example_number

Bound = Literal["matmul", "memory", "rows"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)


@dataclass(frozen=True)
class NodeTime:
    """The least that a node takes.

    Args:
        node: its name.
        bound: ``"matmul"`` where the FLOPs of its forward pass take longer than its bytes, ``"rows"`` for operators that
            move rows of dropped tokens, else ``"memory"``.
        forward: seconds.
        backward: seconds.
    """

    node: str
    bound: Bound
    forward: float
    backward: float


def roofline(graph: TaskGraph, rates: Rates, counted: Counted | None = None) -> list[NodeTime]:
    """Every call's least time in a training step on the example batch; ``counted`` spares counting anew.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    number = example_number(graph)
    works = (counted or count_nodes(graph)).works
    return [_least(node, Work(*map(number, work.amounts())), rates) for node, work in works.items()]


def _least(node: fx.Node, work: Work, rates: Rates) -> NodeTime:
    x = tensor(node)
    rate = rates.flops(x.dtype if x is not None and x.is_floating_point() else torch.float32)
    compute, move = work.forward_flops / rate, (work.forward_read + work.forward_written) / rates.copy
    backward = max(work.backward_flops / rate, (work.backward_read + work.backward_written) / rates.copy)
    ours = getattr(node.target, "namespace", "") == NAMESPACE and node.target not in OF_MODELS
    moves_rows = ours and isinstance(value(node), torch.Tensor)
    bound: Bound = "rows" if moves_rows else "matmul" if compute > move else "memory"
    return NodeTime(node.name, bound, max(compute, move), backward)


def seconds_by_bound(times: Iterable[NodeTime], backward: bool = True) -> dict[str, float]:
    """Seconds of each bound, of the forward pass or of a whole step."""
    found: dict[str, float] = dict.fromkeys(BOUNDS, 0.0)
    for time in times:
        found[time.bound] += time.forward + (time.backward if backward else 0.0)
    return found

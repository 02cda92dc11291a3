"""A task on another batch than its example: the same graph, its sizes checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.utils import _pytree as pytree

from tokgraph.errors import AnalysisError, BatchError
from tokgraph.ir.node import dims, tensor
from tokgraph.ir.program import TaskGraph, is_meta, model_device


def on_batch(graph: TaskGraph, batch: Mapping[str, Any] | None) -> TaskGraph:
    """The task graph with ``batch`` in place of its example batch, on the model's device.

    Args:
        graph: a captured task graph.
        batch: inputs by name; ``None``: the example batch.

    Raises:
        AnalysisError: the model is on the meta device.
        BatchError: the batch is no batch of this task, or of sizes that the graph does not take.
    """
    if is_meta(graph.graph_module):
        raise AnalysisError(
            f"task {graph.name!r}: the model is on the meta device, so there are no values to measure",
            help="build the model with storage, and measure a smaller size of it",
        )
    batch = graph.task.inputs if batch is None else graph.completed(batch, aside=True)
    _check_sizes(graph, graph.flatten(batch))
    device = model_device(graph.graph_module)
    ordered = {key: batch[key] for key in graph.task.inputs}
    inputs: dict[str, Any] = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), ordered)
    return replace(graph, task=replace(graph.task, inputs=inputs))


def _check_sizes(graph: TaskGraph, leaves: list[Any]) -> None:
    """Refuse leaves whose sizes contradict the graph's, or one another where the graph has them equal."""
    bound: dict[sympy.Expr, int] = {}
    for (node, name), leaf in zip(graph.leaf_names().items(), leaves, strict=True):
        if tensor(node) is None:
            continue
        wanted = dims(node)
        fits = isinstance(leaf, torch.Tensor) and leaf.dim() == len(wanted)
        if not fits or any(
            size != (dim if isinstance(dim, int) else bound.setdefault(dim, size))
            for dim, size in zip(wanted, leaf.shape, strict=True)
        ):
            shape = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise BatchError(
                f"task {graph.name!r}: input {name!r} is {shape}, and the captured graph takes "
                f"({', '.join(str(dim if isinstance(dim, int) else bound.get(dim, dim)) for dim in wanted)})",
                help="declare the dimensions that vary in the task's dynamic=, or pass a batch of the captured sizes",
            )

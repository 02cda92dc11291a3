"""Running part of a graph on the example batch, for facts that depend on its values (which ids are visual)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from tokgraph.errors import AnalysisError

from .devices import device_map
from .node import ancestors, dims, tensor, where
from .program import TaskGraph, model_device
from .tensors import read


def example_leaves(graph: TaskGraph) -> list[Any]:
    """The example batch in placeholder order, as the user gave it (never on the meta device unless the user's is)."""
    return pytree.tree_leaves(dict(graph.task.inputs))


def evaluate(graph: TaskGraph, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
    """The values of ``nodes`` on the example batch: where the model is, or the batch where the model has no storage.

    Raises:
        AnalysisError: one depends on values that have no storage (meta parameters or inputs).
    """
    needed = ancestors(nodes)
    device, given = model_device(graph.graph_module), example_leaves(graph)
    if device.type == "meta":
        device = next((x.device for x in given if isinstance(x, torch.Tensor)), device)
    mapped = device_map(graph.graph_module, device)
    leaves = iter(given)
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for n in graph.graph.nodes:
            leaf = next(leaves) if n.op == "placeholder" else None
            if n not in needed:
                continue
            if n.op == "placeholder":
                env[n] = leaf.to(device) if isinstance(leaf, torch.Tensor) and device.type != "meta" else leaf
            elif n.op == "get_attr":
                held = read(graph.graph_module, n)
                _require_storage(graph, n, held)
                env[n] = held.to(device)  # a constant of the graph's own stays where the graph was captured
            else:
                args, kwargs = fx.node.map_arg(pytree.tree_map(mapped, (n.args, n.kwargs)), env.__getitem__)
                env[n] = n.target(*args, **kwargs)
    for node in nodes:
        _require_storage(graph, node, env[node])
    return [env[node] for node in nodes]


def _require_storage(graph: TaskGraph, node: fx.Node, result: object) -> None:
    if isinstance(result, torch.Tensor) and result.device.type == "meta":
        raise AnalysisError(
            f"task {graph.name!r}: which tokens are visual or stay depends on values without storage",
            where=where(node),
            help="give the example batch as real tensors (they may stay on the CPU when the model is on meta)",
        )


def size_hint(node: fx.Node, axis: int) -> int:
    """The size of an axis in the example batch."""
    val = tensor(node)
    assert val is not None
    size = val.shape[axis]
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def actual_size(graph: TaskGraph, node: fx.Node, axis: int) -> int:
    """The size of an axis for the task's inputs, which may be others than those that the graph was captured with.

    Raises:
        AnalysisError: the inputs differ in size from the captured ones, and do not tell the size of this axis.
    """
    dim = dims(node)[axis]
    if isinstance(dim, int):
        return dim
    sizes, captured = _input_sizes(graph)
    size = sympy.sympify(dim).subs(list(sizes.items()))
    if size.is_Integer:
        return int(size)
    if sizes == captured:
        return size_hint(node, axis)
    raise AnalysisError(
        f"task {graph.name!r}: the inputs do not tell the size of dimension {axis} ({dim})",
        where=where(node),
        help="pass a batch of the captured sizes, or capture the task with dimensions that are sizes of its inputs",
    )


def _input_sizes(graph: TaskGraph) -> tuple[dict[sympy.Symbol, int], dict[sympy.Symbol, int]]:
    """Symbols that are sizes of inputs -> their values in the task's inputs, and when the graph was captured."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    sizes: dict[sympy.Symbol, int] = {}
    captured: dict[sympy.Symbol, int] = {}
    for node, leaf in zip(placeholders, example_leaves(graph), strict=True):
        if isinstance(leaf, torch.Tensor) and tensor(node) is not None:
            for axis, (dim, size) in enumerate(zip(dims(node), leaf.shape, strict=True)):
                if isinstance(dim, sympy.Symbol):
                    sizes[dim], captured[dim] = size, size_hint(node, axis)
    return sizes, captured

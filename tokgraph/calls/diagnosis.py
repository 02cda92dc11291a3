"""Why a task's graph does not run on a batch: what of the batch differs from the example batch, and where the graph fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from tokgraph.errors import BatchError, InternalError, Where
from tokgraph.ir.node import dims, tensor, where
from tokgraph.ir.program import TaskGraph, model_device

_VALUES = ("out of range", "out of bounds", "number of elements of source")
"""What torch says of ids, labels and masks that ask for more than there is."""


def explain(graph: TaskGraph, leaves: Sequence[Any], error: Exception) -> BatchError | InternalError:
    """The error to raise for one that a task's graph raised.

    Args:
        graph: the task's graph.
        leaves: the batch, in placeholder order.
        error: what running the graph on it raised.

    Returns:
        A :class:`BatchError` that says in what the batch differs from the example batch, or which values it cannot have; an
        :class:`InternalError` where the batch looks right.
    """
    said = f"{type(error).__name__}: {_first_line(error)}"
    if "CUDA error" in said:  # nothing more can run on the device
        return BatchError(
            f"task {graph.name!r}: a check on the device does not hold for this batch, or a kernel failed: {said}",
            help="run the batch on the CPU, which names the check",
        )
    differing, place = list(_differences(graph, leaves)), _failing(graph, leaves)
    if differing:
        return BatchError(
            f"task {graph.name!r} does not run on this batch: {'; '.join(differing)} ({said})",
            where=place,
            help="make the batch like the example batch of the task, or capture the task again for batches like this",
        )
    if isinstance(error, IndexError) or any(words in said for words in _VALUES):
        return BatchError(
            f"task {graph.name!r} does not run on the values of this batch: {said}",
            where=place,
            help="an id, a label or a mask asks for more than the model has; the model's own forward refuses it as well",
        )
    at = "" if place is None else "\n" + "\n".join(place.lines())
    return InternalError(
        f"task {graph.name!r} does not run on a batch that looks like its example batch: {said}; please report this{at}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def _differences(graph: TaskGraph, leaves: Sequence[Any]) -> Iterator[str]:
    """In what a batch differs from the example batch, of all that the graph may depend on."""
    examples, names = pytree.tree_leaves(dict(graph.task.inputs)), graph.leaf_names()
    device = model_device(graph.graph_module)
    sizes: dict[sympy.Symbol, tuple[str, int]] = {}
    for (node, name), example, given in zip(names.items(), examples, leaves, strict=True):
        if not isinstance(example, torch.Tensor):
            if type(given) is not type(example) or given != example:
                yield f"input {name!r} is {_kind(given)}, and was {example!r} when the task was captured"
        elif not isinstance(given, torch.Tensor):
            yield f"input {name!r} is {_kind(given)}, and must be a tensor"
        else:
            if given.dtype is not example.dtype:
                yield f"input {name!r} is of type {_dtype(given)}, not {_dtype(example)}"
            if given.device != device:
                yield f"input {name!r} is on {given.device}, and the model on {device}"
            if given.is_inference() and torch.is_grad_enabled():
                yield f"input {name!r} was made under torch.inference_mode, and has no gradients"
            yield from _other_sizes(node, name, given, sizes)


def _other_sizes(
    node: fx.Node, name: str, given: torch.Tensor, sizes: dict[sympy.Symbol, tuple[str, int]]
) -> Iterator[str]:
    """Sizes of an input that the graph does not have, or that contradict those of inputs before."""
    if tensor(node) is None or len(dims(node)) != given.dim():
        yield f"input {name!r} has {given.dim()} dimensions {tuple(given.shape)}, not {len(dims(node))}"
        return
    for axis, (expected, size) in enumerate(zip(dims(node), given.shape, strict=True)):
        if isinstance(expected, int):
            if expected != size:
                yield f"input {name!r} has size {size} in dimension {axis}, which the capture fixed to {expected}"
        elif isinstance(expected, sympy.Symbol):
            other, known = sizes.setdefault(expected, (f"dimension {axis} of {name!r}", size))
            if known != size:
                yield f"dimension {axis} of {name!r} is {size}, and {other} is {known}; the model takes them to be equal"


def _kind(x: object) -> str:
    kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
    return f"{x!r}" if isinstance(x, (bool, int, float, str, type(None))) else f"a {kind}"


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


class _Traced(fx.Interpreter):
    """Runs a graph and remembers the node that it came to."""

    last: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.last = n
        return super().run_node(n)


def _failing(graph: TaskGraph, leaves: Sequence[Any]) -> Where | None:
    """The node at which the graph fails, found by running it again."""
    traced = _Traced(graph.graph_module)
    traced.extra_traceback = False
    try:
        with torch.no_grad():
            traced.run(*leaves, enable_io_processing=False)
    except Exception:
        return None if traced.last is None else where(traced.last)
    return None

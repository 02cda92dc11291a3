"""Why a task's graph fails on a batch that passed the checks of a call: what else of the batch differs, and where it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from tokgraph.errors import BatchError, InternalError, StaleError, Where
from tokgraph.ir.devices import same_device
from tokgraph.ir.node import value, where
from tokgraph.ir.program import TaskGraph, model_device
from tokgraph.ir.tensors import read, tensor_name

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What operators raise; others are signals, as that of ``torch.utils.checkpoint`` that it has recomputed enough."""
_VALUES = ("out of range", "out of bounds", "number of elements of source")
"""What torch says of ids, labels and masks that ask for more than there is."""


def explain(
    graph: TaskGraph, leaves: Sequence[Any], error: Exception, *, again: bool = True
) -> BatchError | StaleError | InternalError:
    """The error to raise for one that a task's graph raised.

    Args:
        graph: the task's graph.
        leaves: the batch, in placeholder order.
        error: what running the graph on it raised.
        again: find the operator that fails by running the graph again; it cannot be where its tensors are sharded.

    Returns:
        A :class:`StaleError` where a tensor of the model was converted, which the checks of a call look at for some only; a
        :class:`BatchError` that says in what the batch differs from the example batch, or which values it cannot have; an
        :class:`InternalError` where the batch looks right.
    """
    said = f"{type(error).__name__}: {_first_line(error)}"
    if "CUDA error" in said:  # nothing more can run on the device
        return BatchError(
            f"task {graph.name!r}: a check on the device does not hold for this batch, or a kernel failed: {said}",
            help="run the batch on the CPU, which names the check",
        )
    differing, place = list(_differences(graph, leaves)), _failing(graph, leaves) if again else None
    converted = next(_converted(graph), None)
    if converted:
        return StaleError(
            f"task {graph.name!r}: the model is not the captured one: {converted} ({said})",
            where=place,
            help="accelerated.refresh() captures it as it is now, with the same plan; convert it back if that was not meant",
        )
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
    """In what a batch that has the types and sizes of the capture differs from the example batch."""
    device = model_device(graph.graph_module)
    for name, given in zip(graph.leaf_names().values(), leaves, strict=True):
        if isinstance(given, torch.Tensor):
            if given.dim() and not same_device(given.device, device):
                yield f"input {name!r} is on {given.device}, and the model on {device}"
            if given.is_inference() and torch.is_grad_enabled():
                yield f"input {name!r} was made under torch.inference_mode, and has no gradients"


def _converted(graph: TaskGraph) -> Iterator[str]:
    """Tensors of the model that have another type, or are on another device, than at capture."""
    for node in graph.graph.find_nodes(op="get_attr"):
        then, now = value(node), read(graph.graph_module, node)
        if not isinstance(then, torch.Tensor) or not isinstance(now, torch.Tensor):
            continue
        if (then.dtype, then.device) != (now.dtype, now.device):
            yield f"{tensor_name(node)} was {then.dtype} on {then.device}, it is {now.dtype} on {now.device}"


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

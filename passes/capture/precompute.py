"""Cutting submodules out of a task's forward: their results in the example batch become inputs of the task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokgraph.errors import CaptureError, SpecError, TokgraphError, Where
from tokgraph.ir.precomputed import Precomputed, PrecomputedCall, Recorded, called_at, parted, recording
from tokgraph.ir.program import model_device
from tokgraph.ir.spec import Task

from .failures import does_not_run
from .watch import place_of

aten = torch.ops.aten
_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)
_ROWS = 3
"""Scores of attention have at least so many axes."""


def precomputing(model: nn.Module, name: str, task: Task, inputs: Mapping[str, Any], call: Callable[..., Any]) -> Task:
    """The task as its graph sees it: what the precomputed calls gave for the example batch is among its inputs.

    Args:
        model: the user's model.
        name: the task's name.
        task: what the user wrote.
        inputs: the example batch, on the model's device.
        call: runs the task's forward on inputs.

    Returns:
        ``task`` itself, where nothing is precomputed.

    Raises:
        CaptureError: a submodule is not called, gives something else than tensors, or is called after the decoder; or the model
            has no storage.
        SpecError: an input has the name of one that stands for a result.
    """
    if not task.precomputed:
        return task
    if model_device(model).type == "meta":
        raise CaptureError(
            f"task {name!r}: the model is on the meta device, and {' and '.join(task.precomputed)} would have to run",
            help="build the model with storage, or give the task its features as an input",
        )
    recorded = _recorded(model, name, task, inputs, call)
    calls = _calls(name, task, recorded)
    forward = Precomputed(model, name, task.forward, task.precomputed, calls)
    given = {
        slot: x.detach()
        for made, (_, result) in zip(calls, recorded.results, strict=True)
        for slot, x in zip(made.names, parted(result)[0], strict=True)
    }
    taken = given.keys() & task.inputs.keys()
    if taken:
        raise SpecError(
            f"task {name!r}: the input {min(taken)!r} has the name of a precomputed result", help="rename the input"
        )
    lacking = [
        key
        for key in (*(task.dynamic or {}), *task.visual_inputs)
        if key not in {*given, *task.inputs, *task.precomputed}
    ]
    if lacking:
        raise SpecError(
            f"task {name!r}: there is no {lacking[0]!r} among what is precomputed", help=f"there is {', '.join(given)}"
        )
    of_path = {path: [n for c in calls if c.path == path for n in c.names] for path in task.precomputed}
    visual = [found for key in task.visual_inputs for found in of_path.get(key, [key])]
    return replace(
        task,
        forward=forward,
        inputs={**task.inputs, **given},
        dynamic=_dynamic(name, task, given, of_path),
        visual_inputs=tuple(dict.fromkeys(visual)),
        precomputed=(),
    )


def _recorded(model: nn.Module, name: str, task: Task, inputs: Mapping[str, Any], call: Callable[..., Any]) -> Recorded:
    """The calls in a run of the forward; one more run ends after the last of them, and sees what is before it."""
    try:
        with recording(model, task.precomputed) as whole:
            call(**inputs)
        for path in task.precomputed:
            if all(found != path for found, _ in whole.results):
                raise CaptureError(
                    f"task {name!r}: its forward does not call {path}, which precomputed= names",
                    where=Where(module=path),
                    help="name what the forward calls, by its path in the model; where it calls forward itself, past hooks, "
                    "that is a method as well: 'model.visual.forward'",
                )
        before = {n: x.detach().clone() for n, x in model.named_buffers()}
        with _Prefix(model) as prefix, recording(model, task.precomputed, len(whole.results)) as recorded:
            prefix.recorded = recorded
            call(**inputs)
    except TokgraphError:
        raise
    except Exception as error:
        raise does_not_run(name, error, task.forward, model) from error
    _check_prefix(name, task, prefix)
    _check_buffers(model, name, task, before)
    return recorded


class _Prefix(TorchDispatchMode):
    """Notes where a forward attends before the last of its precomputed calls, outside of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.recorded = Recorded()
        self.attends: Where | None = None
        self._model = model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused = "scaled_dot_product" in str(func)
        if (
            self.attends is None
            and not self.recorded.inside
            and (fused or (func in _SOFTMAX and args[0].dim() >= _ROWS))
        ):
            self.attends = place_of(self._model)
        return func(*args, **(kwargs or {}))


def _check_prefix(name: str, task: Task, prefix: _Prefix) -> None:
    if prefix.attends is not None:
        raise CaptureError(
            f"task {name!r}: the forward attends before the last call of {' and '.join(task.precomputed)}, outside of it: what "
            "is precomputed runs before the graph, and would bring that part along",
            where=prefix.attends,
            help="where that is another tower, name it in precomputed= as well; where it is the decoder, whose results the "
            "call takes or follows, call the submodule before the decoder, on inputs only",
        )


def _check_buffers(model: nn.Module, name: str, task: Task, before: Mapping[str, torch.Tensor]) -> None:
    """Refuse buffers that are written before the last call, outside of it: once there and once in the graph."""
    inside = tuple(called_at(model, path)[0] for path in task.precomputed)
    own = {id(x) for module in inside for x in module.buffers()}
    for path, x in model.named_buffers():
        if path in before and id(x) not in own and not torch.equal(before[path], x):
            raise CaptureError(
                f"task {name!r}: the forward writes the buffer {path} before the last call of "
                f"{' and '.join(task.precomputed)}: that part runs before the graph, and is in it as well",
                where=Where(module=path.rpartition(".")[0] or None),
                help="write the buffer after that call, or inside of what is precomputed",
            )


def _calls(name: str, task: Task, recorded: Recorded) -> tuple[PrecomputedCall, ...]:
    """The calls, and names for the tensors that they gave."""
    found = []
    for path, result in recorded.results:
        try:
            found.append((path, *parted(result)))
        except TypeError as error:
            raise CaptureError(
                f"task {name!r}: {path} returns {error}, which is no input of a graph",
                where=Where(module=path),
                help="precompute a submodule or method that returns tensors, or tuples, lists, dicts or dataclasses of them",
            ) from None
    counts = {path: sum(len(tensors) for other, tensors, _ in found if other == path) for path in task.precomputed}
    for path, count in counts.items():
        if not count:
            raise CaptureError(
                f"task {name!r}: {path} returns no tensor", where=Where(module=path), help="leave it out"
            )
    numbers = dict.fromkeys(task.precomputed, 0)
    calls = []
    for path, tensors, shell in found:
        first = numbers[path]
        numbers[path] += len(tensors)
        names = [f"{path}.{first + i}" if counts[path] > 1 else path for i in range(len(tensors))]
        calls.append(PrecomputedCall(path, shell, tuple(names), tuple(x.requires_grad for x in tensors)))
    return tuple(calls)


def _dynamic(
    name: str, task: Task, given: Mapping[str, torch.Tensor], of_path: Mapping[str, list[str]]
) -> dict[str, Mapping[int, str]] | None:
    """The dimensions that stay symbolic: those of a path are those of each of its tensors that is as large there."""
    found: dict[str, dict[int, str]] = {}
    for key, dims in (task.dynamic or {}).items():
        names = of_path.get(key, [key])
        for dim, called in dims.items():
            tensors = {n: given[n] if n in given else task.inputs[n] for n in names}
            sizes = {n: x.shape[dim] for n, x in tensors.items() if x.dim() > dim}
            if not sizes:
                raise SpecError(f"task {name!r}: dynamic dimension {dim} of {key!r} does not exist")
            first = next(iter(sizes.values()))
            for n, size in sizes.items():
                if size == first:
                    found.setdefault(n, {})[dim] = called
    return {**found} or None

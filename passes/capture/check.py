"""Capture held against eager: loss, outputs, gradients, buffers and random numbers of a graph and of the user's forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.errors import CaptureError
from tokgraph.ir.distance import relative_distance
from tokgraph.ir.fidelity import CaptureCheck
from tokgraph.ir.node import value
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.spec import split_outputs
from tokgraph.ir.verification import TOLERANCE

from .state import RandomState, State, without_parameter_hooks
from .undrawn import Undrawn

log = logging.getLogger(__name__)
_ROUNDINGS = 8
"""Gradients may differ by so many roundings of the largest of all: many are zero but for rounding."""
_NOISE = 0.05
"""By how much the float inputs of the second batch differ from those of the example batch, relatively."""
_GRADIENT = (
    "gradients are stopped, passed or changed by something that leaves no trace in a graph: a hook, a function with its own "
    "backward pass, a change in place past autograd"
)
_CONSTANT = (
    "on a batch that is not the example one: the forward takes a value of its batch, or one that follows from it, for a "
    "Python number, a list or a NumPy array, which the graph holds as a constant"
)
_VALUE = "the forward does something that torch.export does not see, or sees otherwise"
_BUFFER = "the forward changes it in a way that torch.export does not see, or sees otherwise"
_UNSTABLE = (
    "the forward does not compute the same twice from the same state of the model and the same seed: it keeps state outside "
    "of the model, or draws random numbers in a way of its own"
)


@dataclass(frozen=True)
class Run:
    """What one call gives.

    Args:
        loss: its loss.
        outputs: path -> tensor, of all tensors that it returns.
        gradients: parameter -> gradient, ``None`` where the loss does not depend on it.
        buffers: buffer -> value afterwards, of those that it changed.
        before: buffer -> value before, of those.
        random: the state of the random generators afterwards.
    """

    loss: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor | None]
    buffers: Mapping[str, torch.Tensor]
    random: RandomState
    before: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """Where two runs differ.

    Args:
        what: the loss, an output, a gradient or a buffer.
        error: by how much, relatively.
        cause: what is likely the cause.
    """

    what: str
    error: float
    cause: str = _VALUE


class Runner:
    """Runs calls that are to be compared: each from the same state of the model and of the random generators.

    Args:
        model: the user's model.
        state: its state before each call.
        random: the state of the generators before each call.
    """

    def __init__(self, model: nn.Module, state: State, random: RandomState) -> None:
        self.random = random
        self._model = model
        self._state = state

    def run(self, call: Callable[[], Any], grad: bool = True, restore: bool = True) -> Run:
        """Run a call and its backward pass; ``p.grad`` stays as it is, and hooks on parameters do not run.

        Args:
            call: returns what a task's forward returns.
            grad: whether gradients are recorded.
            restore: put the model's state back afterwards.
        """
        self.random.set()
        parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        try:
            with torch.set_grad_enabled(grad):
                loss, result = split_outputs(call())
            after = RandomState.now()
            found: Iterable[torch.Tensor | None] = [None] * len(parameters)
            if loss.requires_grad and parameters:
                with without_parameter_hooks(self._model):
                    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            leaves = pytree.tree_flatten_with_path(result)[0]
            written = self._written()
            return Run(
                loss.detach(),
                {pytree.keystr(path): x.detach() for path, x in leaves if isinstance(x, torch.Tensor)},
                dict(zip(parameters, found, strict=True)),
                {name: now.detach().clone() for name, (_, now) in written.items()},
                after,
                {name: then for name, (then, _) in written.items()},
            )
        finally:
            if restore:
                self._state.restore()

    def aside(self, call: Callable[[], Any]) -> Any:
        """What a call gives that leaves the model's state as it is."""
        try:
            return call()
        finally:
            self._state.restore()

    def _written(self) -> dict[str, tuple[Any, torch.Tensor]]:
        """Buffer -> its value before and the buffer itself, of those that were written."""
        return {
            change.whole: (self._state.content(change), change.after)
            for change in self._state.changes()
            if change.table == "_buffers" and isinstance(change.after, torch.Tensor)
        }


def compare(
    runner: Runner, graph: TaskGraph, eager: Callable[..., Any], reference: Run, inputs: Mapping[str, Any]
) -> CaptureCheck:
    """Compare a captured graph with eager, on the example batch and on one made of it.

    Args:
        runner: runs both.
        graph: the captured graph.
        eager: the task's forward over its model.
        reference: what it gives for the example batch.
        inputs: the example batch.

    Raises:
        CaptureError: they differ.
    """
    limits = limit, _ = precision(graph)

    def captured(batch: Mapping[str, Any]) -> Any:
        return graph.unflatten(graph.graph_module(*graph.flatten(copied(batch))))

    drawn = not reference.random.same_tensors(runner.random)

    def judge(batch: Mapping[str, Any], expected: Run, likely: str | None) -> tuple[Run, Difference]:
        mine = runner.run(lambda: captured(batch))
        worst = max(differences(mine, expected, *limits), key=_badness)
        with ExitStack() as chance:
            if drawn and not worst.error <= limit:  # a graph may draw in another order, or leave out what nothing reads
                chance.enter_context(Undrawn())
                still, expected = runner.run(lambda: captured(batch)), runner.run(lambda: eager(**batch))
                worst = max(differences(still, expected, *limits), key=_badness)
            if not worst.error <= limit:
                cause = likely or _why(runner, lambda: eager(**batch), expected, worst, limits)
                raise _refusal(graph.name, worst, limit, cause)
        return mine, worst

    mine, worst = judge(inputs, reference, None)
    batches, second = 1, other_batch(inputs)
    try:
        expected = runner.run(lambda: eager(**second))
        fits = graph.precomputed is None or runner.aside(lambda: _fits(graph, copied(second)))
    except Exception as error:  # the model checks something of its inputs: there is no other batch to be had
        log.info("task %s: the forward does not take another batch: %s", graph.name, error)
    else:
        if torch.isfinite(expected.loss) and fits:
            batches, worst = 2, max(worst, judge(second, expected, _CONSTANT)[1], key=_badness)
    return CaptureCheck(
        batches,
        worst.error,
        limit,
        outputs=len(reference.outputs) - 1,
        gradients=sum(not _nothing(g) for g in reference.gradients.values()),
        without_gradient=sum(_nothing(g) for g in reference.gradients.values()),
        buffers=tuple(reference.buffers),
        random="none" if not drawn else "equal" if mine.random.same_tensors(reference.random) else "other",
    )


def _fits(graph: TaskGraph, batch: Mapping[str, Any]) -> bool:
    """Whether what is precomputed for a batch has the sizes that the graph fixes: how many rows it has may depend on values."""
    with torch.no_grad():
        leaves = graph.flatten(batch)
    pairs = [
        (value(node), x) for node, x in zip(graph.leaf_names(), leaves, strict=True) if isinstance(x, torch.Tensor)
    ]
    return all(
        x.dim() == len(wanted.shape)
        and all(a == b for a, b in zip(x.shape, wanted.shape, strict=True) if isinstance(b, int))
        for wanted, x in pairs
    )


def precision(graph: TaskGraph) -> tuple[float, float]:
    """``(largest relative difference that passes, one rounding)``, of the least precise type that a graph computes in."""
    values = (value(node) for node in graph.graph.nodes)
    types = {x.dtype for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()} or {torch.float32}
    return (
        max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in types),
        max(torch.finfo(dtype).eps for dtype in types),
    )


def copied(inputs: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Inputs of which a forward may change what it likes."""
    found: dict[str, Any] = pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().to(device or t.device, copy=True), dict(inputs)
    )
    return found


def other_batch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Another batch of the same sizes: the samples in another order, float values a little different.

    A rolled batch keeps what models check of theirs, such as how many tokens a sample's images take.
    """
    source = torch.Generator().manual_seed(0)

    def changed(x: torch.Tensor) -> torch.Tensor:
        rolled = x.roll(1, 0) if x.dim() else x.clone()
        if not x.is_floating_point():
            return rolled
        noise = torch.randn(x.shape, generator=source, dtype=torch.float32).to(x.device, x.dtype)
        ordinary = rolled.isfinite() & (rolled.abs() < 1e4)  # and no mask's -inf, or what stands for it
        return torch.where(ordinary, rolled * (1 + _NOISE * noise), rolled)

    found: dict[str, Any] = pytree.tree_map_only(torch.Tensor, changed, dict(inputs))
    return found


def differences(mine: Run, reference: Run, limit: float, rounding: float) -> Iterator[Difference]:
    """How far a run is from its reference: loss, outputs, changed buffers, gradients.

    Args:
        mine: the run of the graph.
        reference: the run of the user's forward.
        limit: the largest relative difference that passes.
        rounding: relative error of one operation.
    """
    yield Difference("the loss", _relative(mine.loss, reference.loss))
    for path, x in reference.outputs.items():
        yield Difference(f"the output {path or 'that is the loss'}", _relative(mine.outputs.get(path), x))
    for name in dict.fromkeys((*reference.buffers, *mine.buffers)):
        found = mine.buffers.get(name, reference.before.get(name))  # written with what it was: one run may not show it
        expected = reference.buffers.get(name, mine.before.get(name))
        yield Difference(f"the buffer {name} after a call", _relative(found, expected), _BUFFER)
    scale = max(
        (float(g.abs().max()) for g in reference.gradients.values() if g is not None and g.numel()), default=0.0
    )
    floor = _ROUNDINGS * rounding * scale / limit
    for name, expected in reference.gradients.items():
        found = mine.gradients[name]
        if expected is None and not _nothing(found):
            yield Difference(f"the gradient of {name}, which has none,", float("inf"), _GRADIENT)
        elif not (_nothing(found) and _nothing(expected)):
            yield Difference(f"the gradient of {name}", _relative(found, expected, floor), _GRADIENT)


def _relative(a: torch.Tensor | None, b: torch.Tensor | None, floor: float = 0.0) -> float:
    """The distance of two tensors of one type; what is not there counts as zero."""
    if a is None or b is None:
        a, b = torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b  # type: ignore[arg-type]
    return relative_distance(a, b, floor) if a.dtype == b.dtype else float("inf")


def _nothing(gradient: torch.Tensor | None) -> bool:
    return gradient is None or not gradient.any()


def _badness(difference: Difference) -> float:
    return difference.error


def _why(
    runner: Runner, eager: Callable[[], Any], expected: Run, worst: Difference, limits: tuple[float, float]
) -> str:
    """The likely cause: the forward itself, where it does not give the same twice."""
    again = {d.what: d.error for d in differences(runner.run(eager), expected, *limits)}
    return _UNSTABLE if again.get(worst.what, 0.0) > limits[0] else worst.cause


def _refusal(task: str, found: Difference, limit: float, cause: str) -> CaptureError:
    error = "entirely" if found.error == float("inf") else f"by {found.error:.1e} (tolerance {limit:.0e})"
    return CaptureError(
        f"task {task!r}: {found.what} differs between the user's forward and the captured graph {error}; likely cause: {cause}",
        help="write that part of the forward in plain operators over tensors, so that torch.export sees it",
    )

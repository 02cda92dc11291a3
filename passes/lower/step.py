"""A whole training step as one graph: loss and the gradient of every parameter, or the updated parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from tokgraph.ir.program import TaskGraph, loss_node

from .decompositions import runtime_decompositions
from .graph import STATE, Lowered, Source, mark, step_counter, trace
from .places import Place

GRAD, PARAMETER = "grad", "param"
"""Prefixes of names: outputs that are gradients; parameters as inputs, and as outputs after the update."""
Tensors = Mapping[str, torch.Tensor]
Decompositions = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True)
class Optimizer(ABC):
    """An update rule; the fields of subclasses are its options, named as those of ``torch.optim``."""

    name: ClassVar[str]
    lr: float = 1e-3

    @abstractmethod
    def initial(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """``state/<what>/<name>`` -> state of one parameter before the first step."""

    @abstractmethod
    def update(self, name: str, parameter: torch.Tensor, grad: torch.Tensor, state: Tensors) -> dict[str, torch.Tensor]:
        """The parameter, under its name, and its state after a step."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent, as ``torch.optim.SGD`` (no dampening, no Nesterov momentum).

    Args:
        lr: learning rate.
        momentum: of the running sum of gradients; 0: none is kept.
        weight_decay: factor of the parameter added to its gradient.
    """

    name: ClassVar[str] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0

    def initial(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The momentum buffer, if there is momentum."""
        return {f"{STATE}/momentum/{name}": torch.zeros_like(parameter)} if self.momentum else {}

    def update(self, name: str, parameter: torch.Tensor, grad: torch.Tensor, state: Tensors) -> dict[str, torch.Tensor]:
        """One step."""
        grad = grad + self.weight_decay * parameter if self.weight_decay else grad
        if not self.momentum:
            return {name: parameter - self.lr * grad}
        buffer = self.momentum * state[f"{STATE}/momentum/{name}"] + grad
        return {name: parameter - self.lr * buffer, f"{STATE}/momentum/{name}": buffer}


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay, as ``torch.optim.AdamW``.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101), algorithm 2.

    Args:
        lr: learning rate.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of their squares.
        eps: added to the root of the latter.
        weight_decay: share of ``lr`` times the parameter taken off at each step.
    """

    name: ClassVar[str] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def initial(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both moments, and the number of steps done."""
        moments = {f"{STATE}/{what}/{name}": torch.zeros_like(parameter) for what in ("exp_avg", "exp_avg_sq")}
        return {**moments, f"{STATE}/step/{name}": torch.zeros((), dtype=torch.float32, device=parameter.device)}

    def update(self, name: str, parameter: torch.Tensor, grad: torch.Tensor, state: Tensors) -> dict[str, torch.Tensor]:
        """One step."""
        first, second, count = (f"{STATE}/{what}/{name}" for what in ("exp_avg", "exp_avg_sq", "step"))
        step = state[count] + 1
        mean = self.beta1 * state[first] + (1 - self.beta1) * grad
        square = self.beta2 * state[second] + (1 - self.beta2) * grad * grad
        exponent = step.double()  # in float32 the corrections would be off by more than rounding
        size = (self.lr / (1 - self.beta1**exponent)).to(parameter.dtype)
        root = (square / (1 - self.beta2**exponent).to(parameter.dtype)).sqrt() + self.eps
        return {
            name: parameter * (1 - self.lr * self.weight_decay) - size * mean / root,
            first: mean,
            second: square,
            count: step,
        }


OPTIMIZERS: dict[str, type[Optimizer]] = {rule.name: rule for rule in (SGD, AdamW)}


def lower_train_step(graph: TaskGraph, decompositions: Decompositions | None = None) -> Lowered:
    """Inputs -> ``loss``, and ``grad/<name>`` of every parameter that requires a gradient and that the loss depends on.

    Inputs that gradients flow back into, results of submodules that run before the graph, have a gradient as well.

    Args:
        graph: the captured or rewritten graph.
        decompositions: operator -> function to trace instead, besides :func:`runtime_decompositions`.
    """
    source = Source(graph)
    counter = step_counter(source)
    names: list[str] = []

    def step(state: Tensors, *tensors: torch.Tensor, **extra: torch.Tensor) -> list[torch.Tensor]:
        loss, gradients = _gradients(source, {**state, **extra}, tensors, source.trained, source.trained_inputs)
        names[:] = ["loss", *(f"{GRAD}/{name}" for name in gradients)]
        return [loss, *gradients.values()]

    table = {**(decompositions or {}), **runtime_decompositions()}
    trained = [*source.trained, *source.trained_inputs]
    module, state = trace(step, source, counter, table, training=True, trained=trained)
    inputs = (*source.inputs, *counter)
    return Lowered(graph.name, "train-step", module, state, inputs, tuple(names), counter)


def lower_update_step(
    graph: TaskGraph,
    optimizer: Optimizer,
    decompositions: Decompositions | None = None,
) -> Lowered:
    """Inputs, parameters and optimizer state -> ``loss``, and both after one step.

    Parameters that the loss depends on are the inputs ``param/<name>``, their optimizer state ``state/<what>/<name>``;
    outputs have the same names with ``new_`` before.

    Args:
        graph: the captured or rewritten graph.
        optimizer: the update rule.
        decompositions: operator -> function to trace instead, besides :func:`runtime_decompositions`.
    """
    source = Source(graph)
    counter = step_counter(source)
    parameters = {name: source.state.pop(name).detach() for name in source.trained}
    initial = {f"{PARAMETER}/{name}": parameter for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        initial |= optimizer.initial(name, parameter)
    names: list[str] = []

    def step(state: Tensors, *tensors: torch.Tensor, **extra: torch.Tensor) -> list[torch.Tensor]:
        held = {name: extra[f"{PARAMETER}/{name}"] for name in parameters}
        rest = {name: x for name, x in extra.items() if name in counter}
        loss, gradients = _gradients(source, {**state, **rest, **held}, tensors, list(parameters))
        new: dict[str, torch.Tensor] = {}
        for name, grad in gradients.items():
            mark(_updates(name), "update")
            updated = optimizer.update(name, held[name].detach(), grad, extra)
            new |= {f"{PARAMETER}/{key}" if key == name else key: x for key, x in updated.items()}
        names[:] = ["loss", *(f"new_{name}" for name in new)]
        return [loss, *new.values()]

    trained = [f"{PARAMETER}/{name}" for name in parameters]
    extra = {**counter, **initial}
    table = {**(decompositions or {}), **runtime_decompositions()}
    module, state = trace(step, source, extra, table, training=True, trained=trained)
    inputs = (*source.inputs, *counter, *initial)
    return Lowered(graph.name, "update-step", module, state, inputs, tuple(names), {**counter, **initial})


def _updates(parameter: str) -> Place:
    return Place("", parameter.rpartition(".")[0], None, "optimizer")


def _gradients(
    source: Source,
    state: Tensors,
    tensors: tuple[torch.Tensor, ...],
    trained: Sequence[str],
    inputs: Sequence[str] = (),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and name -> gradient of the parameters, and of the given ones among the inputs, that it depends on."""
    given = dict(zip(source.inputs, tensors, strict=True))
    held = [*(state[name] for name in trained), *(given[name] for name in inputs)]
    run = source.interpreter(state)
    loss = run.run(*source.leaves(tensors), enable_io_processing=False)[source.loss]
    place = source.places.get(loss_node(source.graph).name)
    mark(place, "forward")
    value = loss.detach()
    mark(place, "backward")
    run.mark_backward(loss)
    found = torch.autograd.grad(loss, held, allow_unused=True)
    names = (*trained, *inputs)
    return value, {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def make_optimizer(name: str, options: Mapping[str, Any]) -> Optimizer:
    """The optimizer of a name with options.

    Raises:
        KeyError: there is no such optimizer.
        TypeError: it has no such option.
    """
    rule: Callable[..., Optimizer] = OPTIMIZERS[name]
    known = {f.name for f in fields(OPTIMIZERS[name])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"{name} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return rule(**options)

"""What an exported graph should give: the task's graph run by PyTorch and differentiated by its autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tokgraph.ir.interpreter import GraphInterpreter, in_dtype
from tokgraph.ir.program import TaskGraph, model_device
from tokgraph.passes.device import on_device
from tokgraph.passes.lower.graph import STATE, Source
from tokgraph.passes.lower.step import GRAD, PARAMETER, AdamW, Optimizer

NOISE = 1e-5
"""Gradients this much smaller than the largest may be nothing but rounding; AdamW makes whole steps of them."""
_STATE = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "momentum"}


@dataclass(frozen=True)
class Expected:
    """What outputs should be.

    Args:
        values: output -> tensor.
        unsettled: output -> mask of the elements that rounding decides, which cannot be compared.
    """

    values: Mapping[str, torch.Tensor]
    unsettled: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Reference:
    """Runs a task's graph as the user's training loop does. It shares no code with how graphs are lowered.

    Args:
        graph: the captured or rewritten graph.
        optimizer: the update rule of update steps.
    """

    def __init__(self, graph: TaskGraph, optimizer: Optimizer | None = None) -> None:
        graph = on_device(graph, model_device(graph.graph_module))
        self._graph = graph
        self._optimizer = optimizer
        source = Source(graph)
        self._loss, self._names = source.loss, source.output_names()
        self._trained = source.trained
        self._aliases = source.names
        self.dtype = next((x.dtype for x in source.state.values() if x.is_floating_point()), torch.float32)

    def names(self, kind: str) -> list[str]:
        """The outputs that a file must have: those of the graph, or loss and all gradients of autograd."""
        if kind == "forward":
            return list(self.outputs(self._graph.example()))
        values = self.gradients(self._graph.example())
        if kind == "train-step":
            return list(values)
        updated = (name.removeprefix(f"{GRAD}/") for name in values if name != "loss")
        return ["loss", *(f"new_{PARAMETER}/{name}" for name in updated if name not in self._graph.trained_inputs)]

    def expected(self, kind: str, batch: Mapping[str, Any], dtype: torch.dtype | None) -> Expected:
        """What the outputs of a file should be.

        Args:
            kind: ``"forward"``, ``"train-step"`` or ``"update-step"``.
            batch: the task's inputs.
            dtype: the type to compute in, ``None``: as the model does.
        """
        if kind == "forward":
            return Expected(self.outputs(batch, dtype))
        if kind == "train-step":
            return Expected(self.gradients(batch, dtype))
        with torch.enable_grad():
            return self._updated(*self._gradients(batch, dtype))

    def outputs(self, batch: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """``loss`` and the other tensors that the graph returns, by name."""
        with torch.no_grad():
            found = self._run(batch, dtype)[0]
        return {name: x for name, x in zip(self._names, found, strict=True) if isinstance(x, torch.Tensor)}

    def gradients(self, batch: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """``loss``, and ``grad/<name>`` of every parameter, and of what is computed before the graph, that it depends on."""
        with torch.enable_grad():
            loss, found = self._gradients(batch, dtype, self._graph.trained_inputs)
        return {"loss": loss, **{f"{GRAD}/{name}": grad for name, (_, grad) in found.items()}}

    def _run(
        self, batch: Mapping[str, Any], dtype: torch.dtype | None
    ) -> tuple[list[Any], dict[str, Any], dict[str, torch.Tensor]]:
        """Outputs, tensors of the model by name, and inputs that gradients flow back into."""
        module, leaves = self._graph.graph_module, self._graph.flatten(batch)
        device = model_device(module)
        leaves = [
            x.detach().to(device, copy=True) if isinstance(x, torch.Tensor) else x for x in leaves
        ]  # the graph may write them
        nodes = self._graph.trained_nodes()
        if dtype is None:
            names = list(self._graph.leaf_names().values())
            leaves = [x.requires_grad_() if n in nodes else x for n, x in zip(names, leaves, strict=True)]
            return list(module(*leaves)), dict(self._graph.named_parameters()), dict(zip(names, leaves, strict=True))
        interpreter = GraphInterpreter(module, *in_dtype(dtype, module))
        interpreter.trained = {node.target for node in nodes.values()}
        outputs = list(interpreter.run(*leaves))
        return outputs, interpreter.attributes, {name: interpreter.inputs[n.target] for name, n in nodes.items()}

    def _gradients(
        self, batch: Mapping[str, Any], dtype: torch.dtype | None, inputs: Sequence[str] = ()
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """The loss, and name -> (parameter, gradient) of the parameters and inputs that the loss depends on."""
        outputs, attributes, given = self._run(batch, dtype)
        held = {self._aliases.get(name, name): x for name, x in attributes.items() if isinstance(x, torch.Tensor)}
        parameters = {name: held[name] for name in self._trained} | {name: given[name] for name in inputs}
        found = torch.autograd.grad(outputs[self._loss], list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), found, strict=True)
        gradients = {name: (p.detach(), grad) for (name, p), grad in pairs if grad is not None}
        return outputs[self._loss].detach(), gradients

    def _updated(self, loss: torch.Tensor, gradients: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Expected:
        """The parameters and the optimizer's state after a step of ``torch.optim``."""
        assert self._optimizer is not None
        options = asdict(self._optimizer)
        adaptive = isinstance(self._optimizer, AdamW)
        if adaptive:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        copies = {name: p.clone().requires_grad_() for name, (p, _) in gradients.items()}
        for name, p in copies.items():
            p.grad = gradients[name][1]
        optimizer = (torch.optim.AdamW if adaptive else torch.optim.SGD)(list(copies.values()), **options)
        optimizer.step()
        values = {"loss": loss, **{f"new_{PARAMETER}/{name}": p.detach() for name, p in copies.items()}}
        for name, p in copies.items():
            for what, x in optimizer.state.get(p, {}).items():
                if what in _STATE and isinstance(x, torch.Tensor):
                    values[f"new_{STATE}/{_STATE[what]}/{name}"] = x
        scale = max((float(grad.abs().max()) for _, grad in gradients.values() if grad.numel()), default=0.0)
        small = {f"new_{PARAMETER}/{name}": grad.abs() <= NOISE * scale for name, (_, grad) in gradients.items()}
        return Expected(values, small if adaptive else {})

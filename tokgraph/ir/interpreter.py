"""Interpreters that run task graphs elsewhere or otherwise: in float64 without dropout."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .devices import device_map
from .node import argument, is_write
from .program import model_device
from .tensors import target_of, tensor_name

aten = torch.ops.aten
_DROPOUT = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.native_dropout.default)


class GraphInterpreter(fx.Interpreter):
    """Runs a graph with every tensor, attribute and dtype or device argument mapped by a function.

    Args:
        module: the graph module.
        tensors: maps inputs and attributes.
        constants: maps ``dtype`` and ``device`` arguments.

    Attributes:
        attributes: name -> mapped tensor, of those that were read.
        trained: targets of placeholders that gradients are wanted of.
        inputs: target -> mapped tensor of these.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        tensors: Callable[[torch.Tensor], torch.Tensor],
        constants: Callable[[Any], Any],
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._tensors = tensors
        self._constants = constants
        self.attributes: dict[str, Any] = {}
        self.trained: Collection[Any] = ()
        self.inputs: dict[Any, torch.Tensor] = {}
        self._written = {node.args[0].target for node in module.graph.nodes if is_write(node)}

    def fetch_attr(self, target: str) -> Any:
        """The mapped attribute, one object for all its uses and for the names of one tied parameter."""
        name = tensor_name(target)
        if name not in self.attributes:
            found = super().fetch_attr(target)
            self.attributes[name] = self._mapped(target, found)
        return self.attributes[name]

    def fetch_tensor(self, name: str) -> Any:
        """The mapped tensor that the graph module holds under a name."""
        return self.fetch_attr(target_of(name))

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The mapped input."""
        found = self._mapped(target, super().placeholder(target, args, kwargs))
        if target in self.trained:
            found = self.inputs[target] = found.detach().requires_grad_()
        return found

    def _mapped(self, target: Any, x: Any) -> Any:
        """The mapped tensor, on its own where the graph writes it: the user's stays as it is."""
        if not isinstance(x, torch.Tensor):
            return x
        mapped = self._tensors(x)
        return mapped.clone() if target in self._written or x.is_inference() else mapped

    def written(self) -> dict[str, torch.Tensor]:
        """Name -> value after a run, of the tensors held by the module that the graph writes."""
        return {name: x for name, x in self.attributes.items() if target_of(name) in self._written}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call without dropout, its constants mapped."""
        if target in _DROPOUT:
            return args[0] if target is not aten.native_dropout.default else (args[0], torch.ones_like(args[0]))
        args, kwargs = pytree.tree_map(self._constants, (args, kwargs))
        if target is aten.scaled_dot_product_attention.default:
            args, kwargs = _without_dropout(args, kwargs)
        result = super().call_function(target, args, kwargs)
        if _is_real(result) and not any(map(_is_real, pytree.tree_leaves((args, kwargs)))):
            return result.to(
                self._constants(result.dtype)
            )  # of numbers and integers, in the default type if none is given
        return result


def _is_real(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _without_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:]), {
        **kwargs,
        **({"dropout_p": 0.0} if len(args) <= 4 else {}),
    }


def trains_with_dropout(module: fx.GraphModule) -> bool:
    """Whether the graph draws random dropout masks."""
    for node in module.graph.nodes:
        if node.target in _DROPOUT and argument(node, "p", 0.0) > 0 and argument(node, "train", False):
            return True
        if node.target is aten.scaled_dot_product_attention.default and argument(node, "dropout_p", 0.0) > 0:
            return True
    return False


def in_dtype(
    dtype: torch.dtype | None, module: fx.GraphModule
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[Any], Any]]:
    """Maps for :class:`GraphInterpreter` that compute where the model is, and in ``dtype`` where the graph computes in any
    floating type; ``None``: in the graph's own.
    """
    device = model_device(module)
    devices = device_map(module, device)

    def tensors(x: torch.Tensor) -> torch.Tensor:
        y = x.detach().to(device, dtype if dtype is not None and x.is_floating_point() else x.dtype)
        return y.requires_grad_(x.requires_grad) if isinstance(x, torch.nn.Parameter) else y

    def constants(x: Any) -> Any:
        return dtype if dtype is not None and isinstance(x, torch.dtype) and x.is_floating_point else devices(x)

    return tensors, constants

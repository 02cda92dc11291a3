"""What a captured graph takes for granted of a call: the sizes, types and values of its inputs, the state of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import nn

Size = int | str
"""A number, or an expression of sizes: ``size_0_1`` is dimension 1 of the first leaf of the inputs (:func:`size_name`)."""


def size_name(leaf: int, dim: int) -> str:
    """The name of a size of the inputs in expressions."""
    return f"size_{leaf}_{dim}"


def shown(x: Any) -> str:
    """A constant as users know it: a function by its name, an object of many fields by its class."""
    inner = getattr(x, "func", x)  # of a functools.partial
    name = getattr(inner, "__qualname__", None)
    if name is not None:
        return f"{type(x).__name__} {inner.__module__}.{name}"
    text = repr(x)
    return text if len(text) <= 80 else f"a {type(x).__name__}"


def object_at(model: nn.Module, path: str) -> Any:
    """A module by its path, or an object that a module holds: ``language_model.config``."""
    parts = [p for p in path.split(".") if p]
    return reduce(getattr, parts, model)


@dataclass(frozen=True)
class TensorInput:
    """A tensor among the leaves of the inputs.

    Args:
        dtype: its type.
        shape: its sizes; a size that the graph leaves open is its own name.
    """

    dtype: torch.dtype
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class ConstantInput:
    """A leaf that is no tensor: its value is in the graph.

    Args:
        value: its value in the example batch.
    """

    value: Any


@dataclass(frozen=True)
class NumberInput:
    """A Python number that the forward only computes with: the graph takes it as a tensor without dimensions.

    Args:
        kind: its Python type, ``int`` or ``float``.
    """

    kind: type


Input = TensorInput | ConstantInput | NumberInput


@dataclass(frozen=True)
class Guard:
    """A relation between sizes that holds for the example batch, and that the forward branched on or an operator needs.

    Args:
        relation: a Python expression over sizes (:func:`size_name`), numbers, ``min``, ``max`` and ``math``.
        source: ``file:line`` of the branch, where it is known.
    """

    relation: str
    source: str | None = None


@dataclass(frozen=True)
class Autocast:
    """A region of ``torch.autocast`` around a call.

    Args:
        device: type of the device, as ``"cuda"``.
        dtype: the type that it casts to.
    """

    device: str
    dtype: torch.dtype

    @classmethod
    def active(cls, device: str) -> Autocast | None:
        """The region that is active here for a type of device."""
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return None
        return cls(device, torch.get_autocast_dtype(device))


@dataclass(frozen=True)
class Conditions:
    """What a graph takes for granted of a call.

    Args:
        inputs: one for each leaf of the inputs, in order.
        guards: relations between sizes of the inputs.
        modes: path of a module -> ``training`` of it, of those whose mode the forward read.
        constants: path of a module, or of an object that one holds -> name -> value of the plain attributes that the forward
            read: they are in the graph.
        absent: path of a module -> names that the forward looked up there in vain, or that were ``None``.
        methods: path of a module -> names of the functions and properties of its class that the forward ran.
        autocast: the region that it was captured in.
    """

    inputs: tuple[Input, ...] = ()
    guards: tuple[Guard, ...] = ()
    modes: Mapping[str, bool] = field(default_factory=dict)
    constants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    absent: Mapping[str, frozenset[str]] = field(default_factory=dict)
    methods: Mapping[str, frozenset[str]] = field(default_factory=dict)
    autocast: Autocast | None = None

    def readable(self, relation: str, names: Mapping[int, str]) -> str:
        """A relation as users write it: ``input_ids[1] <= 20``.

        Args:
            relation: an expression over sizes.
            names: leaf -> name of it.
        """
        for leaf, found in enumerate(self.inputs):
            if isinstance(found, TensorInput):
                for dim in reversed(range(len(found.shape))):
                    relation = relation.replace(size_name(leaf, dim), f"{names[leaf]}[{dim}]")
        return relation

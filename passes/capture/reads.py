"""What a forward reads of its modules beside tensors: modes, plain attributes, which capture makes constants, and methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import getattr_static
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)
_OWN = frozenset({*vars(nn.Module()), *vars(nn.Module)}) - {"training", "forward"}
"""Attributes that are PyTorch's."""
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)
_TABLES = ("_parameters", "_buffers", "_modules")
_LONGEST = 16
"""Longer lists and mappings are data rather than settings."""


@dataclass
class Reads:
    """What was read.

    Attributes:
        modes: path of a module -> its mode.
        constants: path of a module -> name -> value, as it was when last read.
        absent: path of a module -> names that were looked up and that it did not have, or had ``None`` as.
        methods: path of a module -> names of functions and properties of its class that ran.
    """

    modes: dict[str, bool] = field(default_factory=dict)
    constants: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, set[str]] = field(default_factory=dict)
    methods: dict[str, set[str]] = field(default_factory=dict)


@contextmanager
def recorded_reads(model: nn.Module) -> Iterator[Reads]:
    """Record what the modules of a model are asked for in the block.

    ``nn.Module`` has a ``__getattribute__`` of ours meanwhile, which returns what its own would.
    """
    found, paths = Reads(), {id(module): path for path, module in model.named_modules()}

    def read(self: nn.Module, name: str) -> Any:
        if name in _OWN or id(self) not in paths:
            return object.__getattribute__(self, name)
        path = paths[id(self)]
        try:
            x = object.__getattribute__(self, name)
        except AttributeError:  # a tensor or a submodule, or nothing
            if _table_of(self, name) is None:
                found.absent.setdefault(path, set()).add(name)
            raise
        if name not in object.__getattribute__(self, "__dict__") and is_code(getattr_static(type(self), name, None)):
            found.methods.setdefault(path, set()).add(name)
        elif is_setting(x):
            if name == "training":
                found.modes.setdefault(path, x)
            elif name in object.__getattribute__(self, "__dict__") or getattr_static(type(self), name, _OWN) is x:
                found.constants.setdefault(path, {})[name] = x
        return x

    before = nn.Module.__dict__.get("__getattribute__")
    nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        if before is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = before  # type: ignore[method-assign]


def is_code(x: object) -> bool:
    """Whether what a class has under a name is code that a forward runs."""
    return isinstance(x, (FunctionType, property, cached_property))


def _table_of(module: nn.Module, name: str) -> str | None:
    """The table in which a module holds something under a name."""
    held = object.__getattribute__(module, "__dict__")
    return next((table for table in _TABLES if held[table].get(name) is not None), None)


def is_setting(x: object) -> bool:
    """Whether a value can be compared at each call: it is plain, or a function, or holds a few such values."""
    return isinstance(x, (*_PLAIN, *_FUNCTIONS)) or 0 <= _plain_values(x) <= _LONGEST


def _plain_values(x: object) -> int:
    """How many plain values a container holds, at any depth; -1 where it holds others."""
    if isinstance(x, _PLAIN):
        return 1
    if not isinstance(x, (dict, tuple, list, set, frozenset)) or len(x) > _LONGEST:
        return -1
    counts = [_plain_values(v) for v in (chain.from_iterable(x.items()) if isinstance(x, dict) else x)]
    return -1 if -1 in counts else sum(counts) // (2 if isinstance(x, dict) else 1)

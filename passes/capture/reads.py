"""What a forward reads of its modules beside tensors: their modes, and plain attributes, which capture makes constants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)
_OWN = frozenset({*vars(nn.Module()), *vars(nn.Module)}) - {"training"}
"""Attributes that are PyTorch's."""
_LONGEST = 16
"""Longer lists and mappings are data rather than settings."""


@dataclass
class Reads:
    """What was read.

    Attributes:
        modes: path of a module -> its mode.
        constants: path of a module -> name -> value, as it was when last read.
    """

    modes: dict[str, bool] = field(default_factory=dict)
    constants: dict[str, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def recorded_reads(model: nn.Module) -> Iterator[Reads]:
    """Record what the modules of a model are asked for in the block.

    ``nn.Module`` has a ``__getattribute__`` of ours meanwhile, which returns what its own would.
    """
    found, paths = Reads(), {id(module): path for path, module in model.named_modules()}

    def read(self: nn.Module, name: str) -> Any:
        x = object.__getattribute__(self, name)
        if name not in _OWN and _is_setting(x) and id(self) in paths:
            path = paths[id(self)]
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


def _is_setting(x: object) -> bool:
    """Whether a value is plain: it can be compared at each call."""
    if isinstance(x, _PLAIN):
        return True
    if isinstance(x, dict):
        return len(x) <= _LONGEST and all(isinstance(v, _PLAIN) for pair in x.items() for v in pair)
    return isinstance(x, (tuple, list, set, frozenset)) and len(x) <= _LONGEST and all(isinstance(v, _PLAIN) for v in x)

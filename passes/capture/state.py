"""What a model holds beside its parameters' values, before and after its forward: kept, compared, put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from .fields import objects_of

_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_TABLES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, dict, set)


@dataclass(frozen=True)
class Change:
    """Something that a forward changed.

    Args:
        path: path of the module.
        name: its attribute.
        table: ``"_parameters"``, ``"_buffers"`` or ``"_modules"``; ``""`` for plain attributes.
        before: what it was.
        after: what it is.
        unversioned: a kernel wrote the tensor without a new version, as batch norm's does running statistics.
    """

    path: str
    name: str
    table: str
    before: Any
    after: Any
    unversioned: bool = False

    @property
    def whole(self) -> str:
        """Path and name."""
        return f"{self.path}.{self.name}" if self.path else self.name


@dataclass(frozen=True)
class _Entry:
    """One attribute as it was: the object, and what was in it."""

    value: Any
    content: Any
    version: int


_MISSING = _Entry(None, None, -1)


class State:
    """What the modules of a model hold: attributes, buffers, containers one level deep; and tensors' values.

    Args:
        model: the model.
        values: also copy the values of tensors that are no parameters, so that they can be put back.
    """

    def __init__(self, model: nn.Module, values: bool = True) -> None:
        self._tables = {
            (path, table): vars(module)[table] if table else vars(module)
            for path, module in model.named_modules()
            for table in (*_TABLES, "")
        }
        self._entries = {
            (path, table): {name: _entry(held[name], values) for name in _mine(table, held)}
            for (path, table), held in self._tables.items()
        }
        self._fields = [(vars(x), dict(vars(x))) for _, x in objects_of(model).values()]

    def changes(self) -> Iterator[Change]:
        """What is otherwise now."""
        for (path, table), held in self._tables.items():
            before = self._entries[path, table]
            for name in dict.fromkeys((*before, *_mine(table, held))):
                old, now = before.get(name, _MISSING), held.get(name, _MISSING)
                if now is _MISSING or old is _MISSING or _differs(old, now):
                    by_kernel = now is old.value and isinstance(now, torch.Tensor) and _version(now) == old.version
                    yield Change(path, name, table, old.value, None if now is _MISSING else now, by_kernel)

    def content(self, change: Change) -> Any:
        """What was in a tensor or container that changed, where it was copied."""
        return self._entries[change.path, change.table].get(change.name, _MISSING).content

    def restore(self, stays: Callable[[str, str, str], bool] = lambda *_: False) -> None:
        """Put everything back, also the fields of objects that modules hold.

        Args:
            stays: ``(path, table, name)`` of what is left as it is.
        """
        for (path, table), held in self._tables.items():
            before = self._entries[path, table]
            for name in [name for name in _mine(table, held) if name not in before and not stays(path, table, name)]:
                del held[name]
            for name, old in before.items():
                if not stays(path, table, name):
                    if held.get(name, _MISSING) is not old.value:
                        held[name] = old.value
                    _put_back(old)
        for now, fields in self._fields:
            if now.keys() != fields.keys() or any(now[name] is not x for name, x in fields.items()):
                now.clear()
                now.update(fields)


def _mine(table: str, held: dict[str, Any]) -> list[str]:
    """The names in a table of a module; of its attributes those that are its own, and its mode."""
    return [name for name in held if table or name not in _OWN or name == "training"]


def _entry(x: Any, values: bool) -> _Entry:
    if isinstance(x, torch.Tensor):
        copied = values and x.device.type != "meta" and not isinstance(x, nn.Parameter)
        return _Entry(x, x.detach().clone() if copied else None, _version(x))
    return _Entry(x, x.copy() if type(x) in _CONTAINERS else None, 0)


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _differs(old: _Entry, now: Any) -> bool:
    if isinstance(now, torch.Tensor) or isinstance(old.value, torch.Tensor):
        return now is not old.value or _was_written(old)
    if type(now) in _CONTAINERS and now is old.value:
        return not _same_items(old.content, now)
    return now is not old.value and not _equal(old.value, now)


def _was_written(old: _Entry) -> bool:
    """Whether a tensor has other values: kernels such as batch norm's write running statistics without a new version."""
    if old.content is None or _version(old.value) != old.version:
        return _version(old.value) != old.version
    same = torch.equal(old.content, old.value)
    return not same and not bool(((old.content == old.value) | (old.content.isnan() & old.value.isnan())).all())


def _equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # whatever a comparison of the user's raises
        return False


def _same_items(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(
            key in b and (x is b[key] or (not _tensors(x, b[key]) and _equal(x, b[key]))) for key, x in a.items()
        )
    pairs = zip(a, b, strict=True)
    return a == b if isinstance(a, set) else all(x is y or (not _tensors(x, y) and _equal(x, y)) for x, y in pairs)


def _tensors(*values: Any) -> bool:
    return any(isinstance(x, torch.Tensor) for x in values)


def _put_back(old: _Entry) -> None:
    if isinstance(old.value, torch.Tensor):
        if old.content is not None and _was_written(old):
            with torch.no_grad():
                old.value.detach().copy_(old.content)
    elif old.content is not None and not _same_items(old.content, old.value):
        old.value.clear()
        (old.value.extend if isinstance(old.value, list) else old.value.update)(old.content)


@dataclass(frozen=True)
class RandomState:
    """The state of every random generator that a forward may draw from.

    Args:
        cpu: PyTorch's on the CPU.
        devices: PyTorch's on CUDA devices, where they are in use.
        python: Python's.
        numpy: NumPy's.
    """

    cpu: torch.Tensor
    devices: tuple[torch.Tensor, ...]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> RandomState:
        """As it is."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), tuple(cuda), random.getstate(), np.random.get_state(legacy=False))

    def set(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        if self.devices:
            torch.cuda.set_rng_state_all(list(self.devices))
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def elsewhere(self) -> RandomState:
        """Another state of PyTorch's generator on the CPU."""
        return replace(self, cpu=torch.Generator().manual_seed(int(self.cpu.sum()) + 1).get_state())

    def same_tensors(self, other: RandomState) -> bool:
        """Whether PyTorch's generators are in the same state."""
        return torch.equal(self.cpu, other.cpu) and all(map(torch.equal, self.devices, other.devices))

    def other_generators(self, other: RandomState) -> list[str]:
        """Generators of Python's and NumPy's that are in another state."""
        mine, theirs = self.numpy["state"], other.numpy["state"]
        same = mine["pos"] == theirs["pos"] and np.array_equal(mine["key"], theirs["key"])
        return [*(["Python's random"] if self.python != other.python else []), *([] if same else ["numpy.random"])]


@contextmanager
def without_parameter_hooks(model: nn.Module) -> Iterator[None]:
    """Run without the hooks on parameters' gradients, which are the user's and may do anything."""
    hooks = [p._backward_hooks for p in model.parameters() if p._backward_hooks]
    saved = [dict(found) for found in hooks]
    for found in hooks:
        found.clear()
    try:
        yield
    finally:
        for found, before in zip(hooks, saved, strict=True):
            found.update(before)

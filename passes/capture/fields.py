"""What a forward reads of objects that its modules hold, as configurations: fields, which capture makes constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from tokgraph.ir.conditions import object_at

_LIBRARIES = frozenset({"builtins", "collections", "functools", "torch", "types", "weakref"})
_OTHERS = (nn.Module, torch.Tensor, type, FunctionType, MethodType, ModuleType, Enum)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement; others take no new methods


@dataclass
class Fields:
    """What was read of the objects that modules hold.

    Attributes:
        read: path of an object -> name -> value, as it was when first read.
        written: ``(path, name)`` of fields that the forward set before it read them.
    """

    read: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: set[tuple[str, str]] = field(default_factory=set)

    def changed(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """``(path, name)`` of fields that were read and are something else now."""
        for path, names in self.read.items():
            now = vars(object_at(model, path))
            yield from ((path, name) for name, x in names.items() if name not in now or now[name] != x)


@contextmanager
def recorded_fields(model: nn.Module, is_setting: Callable[[Any], bool]) -> Iterator[Fields]:
    """Record what is read in the block of the objects that the modules of a model hold.

    Their classes have a ``__getattribute__`` and a ``__setattr__`` of ours meanwhile, which do what their own do.

    Args:
        model: the model.
        is_setting: whether a value can be compared at each call.
    """
    found, paths = Fields(), objects_of(model)
    for path, x in paths.values():
        if isinstance(x, SimpleNamespace):  # nothing can be put on its class: all of it counts as read
            found.read[path] = {name: value for name, value in vars(x).items() if is_setting(value)}
    with ExitStack() as stack:
        for cls in dict.fromkeys(type(x) for _, x in paths.values()):
            stack.enter_context(_replaced(cls, "__getattribute__", _reading(cls, found, paths, is_setting)))
            stack.enter_context(_replaced(cls, "__setattr__", _writing(cls, found, paths)))
        yield found


def objects_of(model: nn.Module) -> dict[int, tuple[str, Any]]:
    """The identity of each object -> its path, of the first module that holds it, and the object."""
    found: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        for name, x in vars(module).items():
            if _is_record(x):
                found.setdefault(id(x), (f"{path}.{name}" if path else name, x))
    return found


def _is_record(x: object) -> bool:
    """Whether an object has fields that a forward may read: one of a class of the user's, or of a library for models."""
    if isinstance(x, SimpleNamespace):
        return True
    cls = type(x)
    library = cls.__module__.partition(".")[0]
    return (
        bool(cls.__flags__ & _HEAP_TYPE)
        and hasattr(x, "__dict__")
        and library not in _LIBRARIES
        and not isinstance(x, _OTHERS)
    )


def _reading(
    cls: type, found: Fields, paths: dict[int, tuple[str, Any]], is_setting: Callable[[Any], bool]
) -> Callable[[Any, str], Any]:
    own: Any = cls.__getattribute__

    def read(self: Any, name: str) -> Any:
        x = own(self, name)
        if id(self) in paths and name in object.__getattribute__(self, "__dict__") and is_setting(x):
            path = paths[id(self)][0]
            if (path, name) not in found.written:
                found.read.setdefault(path, {}).setdefault(name, x)
        return x

    return read


def _writing(cls: type, found: Fields, paths: dict[int, tuple[str, Any]]) -> Callable[[Any, str, Any], None]:
    own: Any = cls.__setattr__

    def write(self: Any, name: str, x: Any) -> None:
        own(self, name, x)
        if id(self) in paths and name not in found.read.get(path := paths[id(self)][0], ()):
            found.written.add((path, name))

    return write


@contextmanager
def _replaced(cls: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A method of a class is another one meanwhile; a class that lets nobody change it keeps its own."""
    before = vars(cls).get(name)
    try:
        setattr(cls, name, method)
    except (TypeError, AttributeError):
        yield
        return
    try:
        yield
    finally:
        if before is None:
            delattr(cls, name)
        else:
            setattr(cls, name, before)

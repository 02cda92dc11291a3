"""What a model may not get after capture: submodules, tensors, attributes and methods where its forward looks for some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any, Literal

from torch import nn
from torch.nn.modules import module as torch_module

from tokgraph.ir.conditions import Conditions

Kind = Literal["tensor", "module", "mode", "constant", "type", "hook"]
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
"""Modules whose entries are their content: one more is read by what goes through them."""


@dataclass(frozen=True)
class Change:
    """One way in which a model differs from the captured one.

    Args:
        kind: what changed.
        path: its name in the model.
        text: what it was and what it is.
        now: the tensor or attribute as it is, where there is one.
        moved: it is a tensor that is as it was, but on another device.
    """

    kind: Kind
    path: str
    text: str
    now: Any = None
    moved: bool = False


class _Registrations:
    """Counts parameters and buffers that any module of the process gets: PyTorch tells of each."""

    count = 0
    _watched = False

    @classmethod
    def watch(cls) -> None:
        """Begin to count."""
        if not cls._watched:
            cls._watched = True
            torch_module.register_module_parameter_registration_hook(cls._more)
            torch_module.register_module_buffer_registration_hook(cls._more)

    @classmethod
    def _more(cls, *_: Any) -> None:
        cls.count += 1


class Structure:
    """Compares what a model has with what it had.

    Args:
        model: the user's model.
        conditions: what its forward read, and looked up in vain.
        on_the_way: tables of submodules on the way to what the graph uses.
    """

    def __init__(self, model: nn.Module, conditions: Conditions, on_the_way: Iterable[Mapping[str, Any]]) -> None:
        _Registrations.watch()
        modules = dict(model.named_modules(remove_duplicate=False))
        read = dict.fromkeys(("", *conditions.methods, *conditions.absent, *conditions.constants))
        self._modules = {path: modules[path] for path in read if path in modules}
        self._absent, self._methods = conditions.absent, conditions.methods
        self._code = dict(_code_of(self._modules, conditions.methods))
        self._containers = {
            path: (module, dict(module._modules))
            for path, module in modules.items()
            if isinstance(module, _CONTAINERS) and _parent(path) in self._modules
        }
        self._there = {path: self._names(path) for path in self._modules}
        self.attributes = [module.__dict__ for module in self._modules.values()]
        tables = [*on_the_way, *(module._modules for module, _ in self._containers.values())]
        self.tables: list[Mapping[str, Any]] = list({id(table): table for table in tables}.values())
        self._settle()

    def _settle(self) -> None:
        """Expect what is there now."""
        self.count = sum(map(len, self.attributes))
        self.expected = [dict(table) for table in self.tables]
        self._registered = _Registrations.count

    @property
    def code(self) -> list[tuple[type, str, Any]]:
        """``(class, name, function or property)`` that ran."""
        return [(owner, name, x) for (owner, name), x in self._code.items()]

    def registered(self) -> bool:
        """Whether any module got a tensor since the model was last looked at."""
        return _Registrations.count != self._registered

    def holds(self) -> bool:
        """Whether nothing of what is new is looked at by the forward; the quick checks then expect it."""
        if next(self.changes(), None) is not None:
            return False
        self._settle()
        return True

    def changes(self) -> Iterator[Change]:
        """What is new, and where the forward looks for it."""
        for path, module in self._modules.items():
            for name in sorted(self._names(path) - self._there[path]):
                now = module.__dict__.get(name, _held(module, name))
                whole = f"{path}.{name}" if path else name
                kind: Kind = "module" if isinstance(now, nn.Module) else "constant"
                if name in self._absent.get(path, ()):
                    yield Change(kind, whole, f"{whole}, which the forward looked for, was added", now)
                else:
                    yield Change(kind, whole, f"the {name} of {path or 'the model'} was replaced", now)
        for path, (module, children) in self._containers.items():
            added = [name for name in module._modules if name not in children]
            if added:
                yield Change("module", path, f"{path}.{added[0]} was added", module._modules[added[0]])
        for owner, name, x in self.code:
            now = getattr_static(owner, name, None)
            if now is not x:
                yield Change("constant", name, f"{name} of the class {owner.__qualname__} was replaced", now)

    def _names(self, path: str) -> set[str]:
        """What a module has itself under names that its forward looked up elsewhere, or in vain."""
        module, absent = self._modules[path], self._absent.get(path, frozenset())
        own = {name for name in (*absent, *self._methods.get(path, ())) if name in module.__dict__}
        return own | {name for name in absent if _held(module, name) is not None}


def _held(module: nn.Module, name: str) -> Any:
    """The parameter, buffer or submodule of a name, if there is one."""
    tables = (module._parameters, module._buffers, module._modules)
    return next((table[name] for table in tables if table.get(name) is not None), None)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _code_of(
    modules: Mapping[str, nn.Module], methods: Mapping[str, frozenset[str]]
) -> Iterator[tuple[tuple[type, str], Any]]:
    """``(class, name)`` -> what the class has under the name, where it is read off the class as it is."""
    for path, module in modules.items():
        for name in methods.get(path, ()):
            x = getattr_static(type(module), name, None)
            if x is not None and getattr(type(module), name, None) is x:
                yield (type(module), name), x

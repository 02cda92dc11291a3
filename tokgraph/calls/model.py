"""Whether a model is still what a graph of it takes for granted: compiled once, some ten microseconds at each call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from tokgraph.ir.conditions import shown
from tokgraph.ir.names import OWN, STEP
from tokgraph.ir.node import tensor
from tokgraph.ir.program import TIED, TaskGraph
from tokgraph.ir.tensors import held, tensor_name

from .structure import Change, Kind, Structure

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


@dataclass(frozen=True)
class _Slot:
    """A place in a dictionary of a module that must hold the same object (``is``), an equal one (``==``), or none."""

    kind: Kind
    path: str
    of: dict[str, Any]
    key: str
    expected: Any
    relation: Literal["is", "==", "not in"] = "is"

    def holds(self) -> bool:
        if self.relation == "not in":  # one of the instance that says the same is none either
            return self.key not in self.of or _equal(self.of[self.key], self.expected)
        if self.key not in self.of:
            return False
        now = self.of[self.key]
        return now is self.expected or (self.kind == "constant" and _equal(now, self.expected))


def _equal(a: Any, b: Any) -> bool:
    """Whether two plain attributes are the same: of one type, and equal or both NaN."""
    return type(a) is type(b) and bool(a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


class ModelCheck:
    """Compares a model with what it was when a graph of it was captured.

    Args:
        model: the user's model.
        graph: a captured or rewritten graph of it.
        tensors: compare which tensors there are, and of what type, too.
    """

    def __init__(self, model: nn.Module, graph: TaskGraph, *, tensors: bool = True) -> None:
        self._model = model
        self._objects = _objects(model, graph)
        self._slots = [slot for slot in _slots(model, graph) if tensors or slot.kind != "tensor"]
        self._types = _sampled(model, _captured_types(graph)) if tensors else []
        on_the_way = [slot.of for slot in self._slots if slot.kind == "module"]
        self._structure = Structure(model, graph.conditions, on_the_way)
        self._hooks = _hooks(model)
        self._hooked = RemovableHandle.next_id
        self._compile()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCheck:
        """Looks at the copy of the model: at its own dictionaries, which are not those that copying puts into the memo."""
        for x in (*self._model.modules(), *self._objects):
            memo[id(x.__dict__)] = copy.deepcopy(x, memo).__dict__
        memo |= {id(x): x for _, _, x in self._structure.code}
        made = copy.copy(self)
        memo[id(self)] = made
        made.__dict__ |= {key: copy.deepcopy(x, memo) for key, x in self.__dict__.items() if key != "_unchanged"}
        made._hooks = {
            path: tuple(id(memo.get(i)) if i in memo else i for i in ids) for path, ids in self._hooks.items()
        }
        made._compile()
        return made

    def _compile(self) -> None:
        """Make the quick check for what is expected now."""
        self._unchanged = _compiled(self._slots, self._types, self._structure)

    def holds(self) -> bool:
        """Whether nothing that the graph takes for granted changed."""
        try:
            same = self._unchanged()
        except KeyError:
            return False
        if not same:
            same = self._equal()
        elif self._structure.registered():
            same = self._structure.holds()
        return same and (RemovableHandle.next_id == self._hooked or self._same_hooks())

    def _equal(self) -> bool:
        """Whether what is another object is an equal one, or none that is looked at; the quick check then expects it."""
        if not all(slot.holds() for slot in self._slots) or not self._structure.holds():
            return False
        self._slots = [
            replace(slot, expected=slot.of[slot.key]) if slot.relation == "is" else slot for slot in self._slots
        ]
        self._compile()
        return self._unchanged()

    def _same_hooks(self) -> bool:
        """Whether the hooks are those of then: looked at only after some hook was registered anywhere."""
        if _hooks(self._model) != self._hooks:
            return False
        self._hooked = RemovableHandle.next_id
        return True

    def follow(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Expect other tensors from now on, of the types and devices of before.

        Args:
            tensors: name -> the tensor that is in its place.
        """
        self._slots = [
            replace(slot, expected=tensors[slot.path]) if slot.kind == "tensor" and slot.path in tensors else slot
            for slot in self._slots
        ]
        self._types = [(path, tensors.get(path, x), dtype, device) for path, x, dtype, device in self._types]
        self._compile()

    def changes(self) -> list[Change]:
        """What changed, if anything."""
        found = [_change(slot) for slot in self._slots if not slot.holds()]
        found += self._structure.changes()
        for path, x, dtype, device in self._types:
            if x.dtype is not dtype or x.device != device:
                text = f"{path} was {dtype} on {device}, it is {x.dtype} on {x.device}"
                found.append(Change("type", path, text, x, moved=x.dtype is dtype))
        hooks = _hooks(self._model)
        for path in sorted(hooks.keys() | self._hooks.keys()):
            if hooks.get(path) != self._hooks.get(path):
                found.append(Change("hook", path, f"hooks of {path or 'the model'} were added or removed"))
        return found


def _change(slot: _Slot) -> Change:
    now = slot.of.get(slot.key)
    if slot.kind == "tensor" and isinstance(now, torch.Tensor) and _converted(slot.expected, now):
        text = f"{slot.path} was {slot.expected.dtype} on {slot.expected.device}, it is {now.dtype} on {now.device}"
        return Change("type", slot.path, text, now, moved=now.dtype is slot.expected.dtype)
    if slot.kind == "tensor":
        text = f"{slot.path} is another tensor" if slot.key in slot.of else f"{slot.path} is gone"
    elif slot.kind == "module":
        text = f"the module {slot.path} was " + ("replaced" if slot.key in slot.of else "removed")
    elif slot.kind == "mode":
        text = f"{slot.path or 'the model'} was in {_mode(slot.expected)} mode, it is in {_mode(now)} mode"
    else:
        text = f"{slot.path} was {shown(slot.expected)}, it is {shown(now)}"
    return Change(slot.kind, slot.path, text, now)


def _converted(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether a tensor is one converted to another type or device: so modules replace their buffers."""
    return (
        type(now) is type(before)
        and now.shape == before.shape
        and (now.dtype, now.device) != (before.dtype, before.device)
    )


def _mode(training: object) -> str:
    return "training" if training else "evaluation"


def _slots(model: nn.Module, graph: TaskGraph) -> Iterator[_Slot]:
    """Everything that must be as it was: tensors, modes, settings, and the modules on the way to them."""
    conditions = graph.conditions
    modules = dict(model.named_modules(remove_duplicate=False))
    used: set[str] = set()
    for name in _tensor_names(graph):
        path, _, leaf = name.rpartition(".")
        of = _table(modules[path], leaf) if path in modules else None
        if of is not None:
            used.add(path)
            yield _Slot("tensor", name, of, leaf, held_as(graph, name))
    for path, training in conditions.modes.items():
        if path in modules and "training" in modules[path].__dict__:
            used.add(path)
            yield _Slot("mode", path, modules[path].__dict__, "training", training)
    for path, constants in conditions.constants.items():
        if path in modules:
            used.add(path)
            yield from _settings(path, modules[path].__dict__, constants)
            continue
        holder, _, name = path.rpartition(".")
        of = modules[holder].__dict__ if holder in modules else {}
        if name in of:  # an object that a module holds
            used.add(holder)
            yield _Slot("constant", path, of, name, of[name])
            yield from _settings(path, vars(of[name]), constants)
    yield from _chain(modules, used)


def _objects(model: nn.Module, graph: TaskGraph) -> list[Any]:
    """The objects that modules hold whose attributes the graph takes for granted."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places = (path.rpartition(".") for path in graph.conditions.constants if path not in modules)
    return [modules[at].__dict__[name] for at, _, name in places if at in modules and name in modules[at].__dict__]


def _tensor_names(graph: TaskGraph) -> list[str]:
    """Names of the model's tensors that the graph reads, and further names of tied ones."""
    read = {tensor_name(node) for node in graph.graph.find_nodes(op="get_attr")}
    read = {name for name in read if name.partition(".")[0] not in (OWN, STEP)}
    return sorted({other for name in read for other in tied_with(graph, name)})


def tied_with(graph: TaskGraph, name: str) -> set[str]:
    """All names of a tensor of the captured model, of which the graph may hold one only."""
    first_of = graph.graph_module.meta.get(TIED, {})
    first = first_of.get(name, name)
    return {first, *(further for further, other in first_of.items() if other == first)}


def held_as(graph: TaskGraph, name: str) -> torch.Tensor | None:
    """The tensor that the graph holds under any of the names of this one."""
    found = (held(graph.graph_module, other) for other in sorted(tied_with(graph, name)))
    return next((x for x in found if x is not None), None)


def _table(module: nn.Module, leaf: str) -> dict[str, Any] | None:
    """The dictionary of a module that holds a tensor of it; ``None`` for a constant that export lifted out of the code."""
    tables = (module._parameters, module._buffers, module.__dict__)
    return next((table for table in tables if isinstance(table.get(leaf), torch.Tensor)), None)


def _settings(path: str, attributes: dict[str, Any], constants: Any) -> Iterator[_Slot]:
    for name, x in constants.items():
        where = f"{path}.{name}" if path else name
        if name not in attributes:  # it is one of the class, which an attribute of the instance would hide
            yield _Slot("constant", where, attributes, name, x, "not in")
        else:
            now = attributes[name]
            by_value = not isinstance(x, Hashable) or not _equal(now, x)
            yield _Slot("constant", where, attributes, name, x if by_value else now, "==" if by_value else "is")


def _chain(modules: dict[str, nn.Module], used: set[str]) -> Iterator[_Slot]:
    """The places of modules in their parents, on the way from the model to those that are used."""
    paths = {".".join(parts[:i]) for path in used for parts in (path.split("."),) for i in range(1, len(parts) + 1)}
    for path in sorted(paths - {""}):
        parent, _, name = path.rpartition(".")
        yield _Slot("module", path, modules[parent]._modules, name, modules[path])


def _captured_types(graph: TaskGraph) -> dict[str, tuple[torch.dtype, torch.device]]:
    """Name -> type and device when the graph was captured, of the model's tensors that it reads."""
    values = {tensor_name(node): tensor(node) for node in graph.graph.find_nodes(op="get_attr")}
    return {
        other: (x.dtype, x.device)
        for name, x in values.items()
        if x is not None and name.partition(".")[0] not in (OWN, STEP)
        for other in tied_with(graph, name)
    }


def _sampled(
    model: nn.Module, captured: Mapping[str, tuple[torch.dtype, torch.device]]
) -> list[tuple[str, torch.Tensor, torch.dtype, torch.device]]:
    """Tensors whose type and device stand for those of others: one for each class of modules under one parent.

    What they are compared with is the capture: the model may have been moved before the plan was applied.

    Conversions (``model.to``, ``tower.half()``, ``norm.float()``) concern modules; one that concerns a single one of
    several of its kind makes PyTorch's operators fail, in the graph as in the forward. So does a single module on another
    device, which is looked at once for each of the upper two levels of modules: asking for it takes longer.
    """
    found: dict[tuple[str, type], tuple[str, torch.Tensor, torch.dtype, torch.device]] = {}
    for path, module in model.named_modules():
        for name, x in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if x is not None and full in captured:
                found.setdefault((path.rpartition(".")[0], type(module)), (full, x, *captured[full]))
    return list(found.values())


def _hooks(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path -> its hooks, of the modules that have some; ``"*"``: those of all modules."""
    everywhere = (hook for name in _GLOBAL_HOOKS for hook in getattr(torch_module, name, {}).values())
    found = {"*": tuple(id(hook) for hook in everywhere if not _of_torch(hook))}
    for path, module in model.named_modules():
        attributes = module.__dict__
        hooks = tuple(id(hook) for name in _HOOKS for hook in attributes[name].values())
        if hooks:
            found[path] = hooks
    return found


def _of_torch(hook: object) -> bool:
    """Whether a hook is PyTorch's own: counters and profilers follow modules, and change nothing."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _compiled(
    slots: list[_Slot], types: list[tuple[str, torch.Tensor, torch.dtype, torch.device]], structure: Structure
) -> Callable[[], bool]:
    """One expression that is true where all slots and types are as they were, and no module has more than it had.

    Tables of submodules are compared as a whole, and attributes counted, which is quicker than one test each.
    """
    names: dict[str, Any] = {}
    known: dict[int, str] = {}

    def name(x: Any) -> str:
        if x is None or x is True or x is False:
            return repr(x)
        if id(x) not in known:  # fewer names make a quicker call: each is an argument with a default
            known[id(x)] = f"x{len(names)}"
            names[known[id(x)]] = x
        return known[id(x)]

    tests = [
        f"{name(slot.of)}[{slot.key!r}] {slot.relation} {name(slot.expected)}"
        for slot in slots
        if slot.relation != "not in" and slot.kind != "module"
    ]
    tests += [
        f"{name(slot.of)}.get({slot.key!r}) is {name(slot.of[slot.key])}"
        for slot in slots
        if slot.relation == "not in" and slot.key in slot.of
    ]
    tests += [f"{name(structure.tables)} == {name(structure.expected)}"]
    tests += [f"sum(map(len, {name(structure.attributes)})) == {structure.count}"]
    tests += [f"{name(owner)}.{method} is {name(x)}" for owner, method, x in structure.code]
    tests += [f"{name(x)}.dtype is {name(dtype)}" for _, x, dtype, _ in types]
    places = {".".join(path.split(".")[:2]): (x, device) for path, x, _, device in types}
    tests += [f"{name(x)}.device == {name(device)}" for x, device in places.values()]
    scope: dict[str, Any] = {"given": names}
    arguments = ", ".join(f"{name}=given[{name!r}]" for name in names)
    exec(f"def unchanged({arguments}):\n    return {' and '.join(tests) or 'True'}", scope)
    compiled: Callable[[], bool] = scope["unchanged"]
    return compiled

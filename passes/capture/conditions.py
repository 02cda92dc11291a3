"""The conditions of a capture, from what torch.export found and what the forward read."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from tokgraph.ir.conditions import (
    Autocast,
    Conditions,
    ConstantInput,
    Guard,
    Input,
    NumberInput,
    Size,
    TensorInput,
    object_at,
    size_name,
)  # fmt: skip
from tokgraph.ir.node import value
from tokgraph.ir.program import TaskGraph

from .reads import Reads

_PRINTER = PythonPrinter()


def conditions_of(
    graph: TaskGraph, exported: ExportedProgram, model: nn.Module, reads: Reads, autocast: Autocast | None
) -> Conditions:
    """What a captured graph takes for granted of a call.

    Args:
        graph: the captured graph.
        exported: what torch.export made, whose shape environment has the guards.
        model: the user's model.
        reads: what its forward read.
        autocast: the region of the capture.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    leaves = pytree.tree_leaves(dict(graph.task.inputs))
    shapes = [
        value(node).shape if isinstance(x, torch.Tensor) else () for node, x in zip(placeholders, leaves, strict=True)
    ]
    names = _names_of_symbols(shapes)
    inputs: list[Input] = [
        TensorInput(x.dtype, tuple(_size(size, names) for size in shape))
        if isinstance(x, torch.Tensor)
        else ConstantInput(x)
        for x, shape in zip(leaves, shapes, strict=True)
    ]
    for i, kind in graph.numbers.items():
        inputs[i] = NumberInput(kind)
    constants = {path: _settings(object_at(model, path), names) for path, names in reads.constants.items()}
    absent, methods = ({path: frozenset(names) for path, names in of.items()} for of in (reads.absent, reads.methods))
    return Conditions(tuple(inputs), _guards(exported, names), dict(reads.modes), constants, absent, methods, autocast)


def _settings(of: Any, names: Iterable[str]) -> dict[str, Any]:
    """The plain attributes of a module, or of an object that one holds, as they are now; copied where they can change."""
    found = {name: getattr(of, name) for name in names if hasattr(of, name)}
    return {name: copy.deepcopy(x) if isinstance(x, Collection) else x for name, x in found.items()}


def _names_of_symbols(shapes: Iterable[Sequence[Any]]) -> dict[sympy.Symbol, str]:
    """Symbol -> the first size of the inputs that it is."""
    names: dict[sympy.Symbol, str] = {}
    for leaf, shape in enumerate(shapes):
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                names.setdefault(size.node.expr, size_name(leaf, dim))
    return names


def _size(size: Any, names: Mapping[sympy.Symbol, str]) -> Size:
    if isinstance(size, torch.SymInt) and not size.node.expr.is_number:  # export may say "2" of a fixed size
        return _code(size.node.expr, names)
    return int(size)


def _code(expr: sympy.Basic, names: Mapping[sympy.Symbol, str]) -> str:
    """An expression over symbols as Python code over sizes of the inputs."""
    return str(
        _PRINTER.doprint(expr.xreplace({symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}))
    )


def _guards(exported: ExportedProgram, names: Mapping[sympy.Symbol, str]) -> tuple[Guard, ...]:
    """The guards that say more than that a size is what it is; ``check_guards`` of torch.export has no lines for them."""
    environment = next(
        (x.fake_mode.shape_env for node in exported.graph.nodes if isinstance(x := value(node), FakeTensor)), None
    )
    if environment is None:
        return ()
    found: dict[str, Guard] = {}
    for guard in environment.guards:
        relation = environment.replace(guard.expr)
        if relation.free_symbols and relation.free_symbols <= names.keys():
            code = _code(relation, names)
            found.setdefault(code, Guard(code, _line(guard.sloc)))
    return tuple(found.values())


def _line(place: Any) -> str | None:
    """``file:line`` of a guard, unless it is in PyTorch: an operator needs the relation then."""
    frame = getattr(place, "framework_loc", None)
    file = getattr(frame, "filename", None)
    return None if frame is None or file is None or "/torch/" in file else f"{file}:{frame.lineno}"

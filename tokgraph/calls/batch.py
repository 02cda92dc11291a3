"""Whether a batch is one that a graph was captured for: its types, sizes and values, and the guards of the capture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokgraph.errors import BatchError, Where
from tokgraph.ir.conditions import Conditions, ConstantInput, NumberInput, TensorInput, size_name
from tokgraph.ir.program import TaskGraph


def compiled_check(conditions: Conditions) -> Callable[[Sequence[Any]], bool]:
    """A function of the leaves of the inputs that is true where they are what the graph takes for granted.

    It may raise ``AttributeError`` or ``ValueError`` where they are not even tensors, or have another rank.
    """
    lines: list[str] = []
    tests: list[str] = []
    names: dict[str, Any] = {}
    for i, found in enumerate(conditions.inputs):
        if isinstance(found, ConstantInput):
            names[f"v{i}"] = found.value
            tests.append(f"type(x[{i}]) is type(v{i}) and x[{i}] == v{i}")
            continue
        if isinstance(found, NumberInput):
            tests.append(f"x[{i}].ndim == 0")
            continue
        names[f"t{i}"] = found.dtype
        sizes = [size_name(i, dim) for dim in range(len(found.shape))]
        lines.append(f"{', '.join(sizes)}, = x[{i}].shape" if sizes else f"() = x[{i}].shape")
        tests.append(f"x[{i}].dtype is t{i}")
        tests += [f"{name} == ({size})" for name, size in zip(sizes, found.shape, strict=True) if name != size]
    tests += [f"({guard.relation})" for guard in conditions.guards]
    scope: dict[str, Any] = {"given": names, "math": math}
    arguments = ", ".join(["x", *(f"{name}=given[{name!r}]" for name in names)])
    body = "".join(f"    {line}\n" for line in lines)
    exec(f"def fits({arguments}):\n{body}    return {' and '.join(tests) or 'True'}", scope)
    compiled: Callable[[Sequence[Any]], bool] = scope["fits"]
    return compiled


def misfit(graph: TaskGraph, leaves: Sequence[Any]) -> BatchError:
    """What is wrong with a batch that :func:`compiled_check` refused."""
    conditions = graph.conditions
    names = dict(enumerate(graph.leaf_names().values()))
    sizes = {
        size_name(i, dim): size
        for i, x in enumerate(leaves)
        if isinstance(x, torch.Tensor)
        for dim, size in enumerate(x.shape)
    }
    for i, found in enumerate(conditions.inputs):
        text = _misfit_of_leaf(conditions, names, i, leaves[i], sizes)
        if text:
            return _error(graph, text, found, leaves[i])
    for guard in conditions.guards:
        if not eval(guard.relation, {"math": math, "min": min, "max": max}, sizes):
            return BatchError(
                f"task {graph.name!r}: the captured forward is right where {conditions.readable(guard.relation, names)}, "
                f"which this batch does not meet ({_mentioned(conditions, guard.relation, names, sizes)})",
                where=Where(source=guard.source) if guard.source else None,
                help="the model computes otherwise there: capture the task with an example batch of such sizes",
            )
    return BatchError(f"task {graph.name!r}: the batch is not one that the task was captured for")


def _misfit_of_leaf(conditions: Conditions, names: dict[int, str], i: int, x: Any, sizes: dict[str, int]) -> str | None:
    expected, name = conditions.inputs[i], names[i]
    if isinstance(expected, ConstantInput):
        same = type(x) is type(expected.value) and x == expected.value
        return (
            None
            if same
            else f"input {name!r} is {x!r}; the task was captured for {expected.value!r}, which is in its graph"
        )
    if not isinstance(x, torch.Tensor):
        return f"input {name!r} must be a tensor, got {type(x).__name__}"
    if isinstance(expected, NumberInput):
        return None if x.dim() == 0 else f"input {name!r} must be a number, got a tensor of shape {tuple(x.shape)}"
    if x.dtype is not expected.dtype:
        return f"input {name!r} is {x.dtype}; the task was captured for {expected.dtype}"
    if x.dim() != len(expected.shape):
        return (
            f"input {name!r} has the shape {tuple(x.shape)}; the task was captured for {len(expected.shape)} dimensions"
        )
    for dim, size in enumerate(expected.shape):
        if isinstance(size, int) and x.shape[dim] != size:
            return f"input {name!r} has {x.shape[dim]} in dimension {dim}; the task was captured for {size} there"
        if isinstance(size, str) and size != size_name(i, dim):
            wanted = eval(size, {"math": math, "min": min, "max": max}, sizes)
            if wanted != x.shape[dim]:
                return (
                    f"input {name!r} has {x.shape[dim]} in dimension {dim}, which must be "
                    f"{conditions.readable(size, names)} = {wanted}"
                )
    return None


def _error(graph: TaskGraph, text: str, found: Any, given: Any) -> BatchError:
    if isinstance(found, TensorInput) and isinstance(given, torch.Tensor) and given.dtype is not found.dtype:
        return BatchError(
            f"task {graph.name!r}: {text}",
            help=f"convert the input with .to({found.dtype}), or capture the task with an example batch of the other type",
        )
    if isinstance(found, TensorInput):
        return BatchError(
            f"task {graph.name!r}: {text}",
            help="sizes that differ from batch to batch belong into Task.dynamic; where the model fixes them, as "
            "`tokgraph inspect` says, make every batch like the example batch",
        )
    return BatchError(
        f"task {graph.name!r}: {text}", help="capture the task with that value, or pass it as a tensor to compute with"
    )


def _mentioned(conditions: Conditions, relation: str, names: dict[int, str], sizes: dict[str, int]) -> str:
    """``input_ids[1] = 25``: the sizes that a relation is about."""
    found = [name for name in sorted(sizes, key=len, reverse=True) if name in relation]
    return ", ".join(f"{conditions.readable(name, names)} = {sizes[name]}" for name in sorted(found))

"""Batches in a safetensors file: tensors named ``TASK/NUMBER/INPUT``, a ``/`` in a name as ``%2F``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils import _pytree as pytree

from tokgraph.errors import BatchError, FileError
from tokgraph.ir.names import batch_key, batch_place, input_name
from tokgraph.ir.program import Program
from tokgraph.ir.spec import ModelSpec, check_tasks

from .weights import write_tensors

EXAMPLE = "example.safetensors"
Batches = Mapping[str, Iterable[Mapping[str, Any]]]


def write_example(path: Path, program: Program) -> None:
    """Write the example batches of a program's tasks.

    Raises:
        FileError: the tensors of an input would have the name of another input.
    """
    tensors = {}
    for name, graph in program.items():
        for key, x in graph.task.inputs.items():
            leaves = pytree.tree_leaves(x)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, torch.Tensor):
                    copy = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
                    written = batch_key(name, 0, input_name(key, i, len(leaves)))
                    if written in tensors:
                        raise FileError(f"task {name!r}: two tensors of its inputs have the name {written!r} in a file")
                    tensors[written] = copy
    write_tensors(path, tensors)


def read_batches(path: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Task -> batches, each input -> tensor.

    Raises:
        BatchError: the file is no safetensors file, holds no batches, or a tensor is not named ``TASK/NUMBER/INPUT``.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BatchError(f"{path} is no safetensors file: {error}") from error
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for key in sorted(tensors):
        place = batch_place(key)
        if place is None:
            raise BatchError(
                f"{path}: tensor {key!r} is not named TASK/NUMBER/INPUT", help="as understanding/0/input_ids"
            )
        task, number, name = place
        found.setdefault(task, {}).setdefault(number, {})[name] = tensors[key]
    if not found:
        raise BatchError(f"{path} holds no batches", help="write some with tokgraph.save_batches")
    return {task: [numbered[number] for number in sorted(numbered)] for task, numbered in found.items()}


def save_batches(path: Path, batches: Batches) -> None:
    """Write calibration batches: one safetensors file, tensors named ``task/number/input``."""
    tensors = {
        batch_key(task, number, name): value.detach().clone(memory_format=torch.contiguous_format)
        for task, of_task in batches.items()
        for number, batch in enumerate(of_task)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    write_tensors(path, tensors)


def load_batches(path: Path, spec: ModelSpec) -> dict[str, list[dict[str, Any]]]:
    """Read calibration batches; inputs that are no tensors are those of the task's example batch.

    Raises:
        BatchError: the file is not as :func:`save_batches` writes it, or names another model's tasks or inputs.
    """
    found = read_batches(path)
    check_tasks(found, spec.tasks)
    batches: dict[str, list[dict[str, Any]]] = {}
    for task, of_task in found.items():
        inputs = spec.tasks[task].inputs
        plain = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
        batches[task] = [plain | batch for batch in of_task]
        for batch in batches[task]:
            if set(batch) != set(inputs):
                odd = sorted(set(batch) ^ set(inputs))
                raise BatchError(
                    f"{path}: a batch of task {task!r} lacks or adds the inputs {', '.join(odd)}",
                    help=f"the task takes {', '.join(inputs)}",
                )
    return batches

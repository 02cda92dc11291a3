"""Python numbers among the inputs: a forward that only computes with them gets them as tensors, so that they stay inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.ir.program import TaskGraph, cuda_devices, number_tensor
from tokgraph.ir.spec import Task, split_outputs

from .buffers import rebound_buffers


def numbers_of(inputs: Mapping[str, Any]) -> dict[str, type]:
    """Input -> type, of those that are Python numbers: counts and weights that a loss is divided by or multiplied with."""
    return {key: type(x) for key, x in inputs.items() if type(x) in (int, float)}


def as_tensors(inputs: Mapping[str, Any], names: Mapping[str, type], device: torch.device) -> dict[str, Any]:
    """The inputs, numbers of these names as tensors."""
    return {key: number_tensor(x, device) if key in names else x for key, x in inputs.items()}


def leaves_of(inputs: Mapping[str, Any], names: Mapping[str, type]) -> dict[int, type]:
    """Leaf of the inputs -> type, of the numbers of these names."""
    found, leaf = {}, 0
    for key, x in inputs.items():
        if key in names:
            found[leaf] = names[key]
        leaf += len(pytree.tree_leaves(x))
    return found


def only_computed_with(graph: TaskGraph, model: nn.Module, task: Task, inputs: Mapping[str, Any]) -> bool:
    """Whether the graph, which takes the task's numbers as tensors, is right for other numbers, too.

    A forward may ask for the type of a number, or round it: its loss then differs from the graph's.

    Args:
        graph: the graph.
        model: the user's model.
        task: what the user wrote.
        inputs: the example batch with the user's numbers, on the model's device.
    """
    others = {key: 2 * x + 1 for key, x in inputs.items() if type(x) in (int, float)}
    given = {**inputs, **others}
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(model)):
            seed = torch.seed()
            mine = graph.unflatten(graph.graph_module(*graph.flatten(given)))
            torch.manual_seed(seed)
            with rebound_buffers(model):
                eager = task.forward(model, **given)
    except Exception:  # the number is one that a branch, a shape or an operator's setting depends on
        return False
    a, b = split_outputs(mine)[0], split_outputs(eager)[0]
    return a.dtype is b.dtype and bool(torch.isclose(a, b, rtol=1e3 * torch.finfo(b.dtype).eps, equal_nan=True))

"""Where a model and its example batches are before capture: on one device, and where the model computes, with values."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from tokgraph.errors import SpecError
from tokgraph.ir.program import model_device
from tokgraph.ir.spec import ModelSpec


def check_devices(spec: ModelSpec) -> None:
    """Refuse models whose parameters are on several devices, and batches without values for a model with storage.

    A batch on another device than the model is copied to the model's: it is only an example.

    Raises:
        SpecError: there is such a model or batch.
    """
    first: dict[torch.device, str] = {}
    for name, p in spec.model.named_parameters():
        first.setdefault(p.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name} is on {device}" for device, name in first.items())
        raise SpecError(
            f"the parameters of the model are on {len(first)} devices: {places}",
            help="move the whole model to one device before it is captured: model.to(device)",
        )
    if model_device(spec.model).type == "meta":
        return
    for task_name, task in spec.tasks.items():
        for key, x in task.inputs.items():
            if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(x)):
                raise SpecError(
                    f"task {task_name!r}: input {key!r} of the example batch is on the meta device, and the model is not",
                    help="give tensors with values; without any, only a model on the meta device is captured",
                )

"""Where a graph was captured, and what its constants are on another device: a graph computes where its model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .node import tensor


def captured_device(module: fx.GraphModule) -> torch.device | None:
    """The device of the model when the graph was captured; ``None`` for a graph that reads no tensor of it."""
    for node in module.graph.find_nodes(op="get_attr"):
        val = tensor(node)
        if val is not None:
            return val.device
    return next((val.device for node in module.graph.nodes if (val := tensor(node)) is not None), None)


def device_map(module: fx.GraphModule, device: torch.device) -> Callable[[Any], Any]:
    """Maps ``device`` arguments of a graph's calls: the one that the model was on becomes ``device``, others stay.

    The forward may ask for the CPU where the model is on a GPU; then it means the CPU.
    """
    before = captured_device(module)

    def mapped(x: Any) -> Any:
        return device if isinstance(x, torch.device) and before is not None and same_device(x, before) else x

    return mapped


def same_device(a: torch.device, b: torch.device) -> bool:
    """Whether two devices are one; one without a number (``cuda``) is the one that is in use."""
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)

"""A captured graph on another device than that of the capture: what names the device in it, and its constants, follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tokgraph.ir.devices import captured_device, device_map, same_device
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import entered, fake_mode, value
from tokgraph.ir.program import Program, TaskGraph
from tokgraph.ir.tensors import CONSTANTS, hold, read, tensor_name

from .contract import GraphPass
from .pipeline import Pipeline


@dataclass(frozen=True)
class ToDevice(GraphPass):
    """Writes a graph for another device: ``device`` arguments, the constants that export lifted, and the values' devices.

    The model's tensors are the model's, and stay where they are.

    Args:
        device: the device, as ``"cuda:0"``.
    """

    name: ClassVar[str] = "to-device"
    device: str

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Change every call that names the device of the capture, move constants, and say where values are."""
        before, to = captured_device(graph_module), torch.device(self.device)
        if before is None:
            return
        mapped = device_map(graph_module, to)
        for node in graph_module.graph.nodes:
            node.args, node.kwargs = pytree.tree_map(mapped, (node.args, node.kwargs))
        prefix = graph_module.meta.get(CONSTANTS)
        for node in graph_module.graph.find_nodes(op="get_attr"):
            name, found = tensor_name(node), read(graph_module, node)
            if name.partition(".")[0] == prefix and same_device(found.device, before):
                hold(graph_module, name, found.to(to))
        with entered(fake_mode(graph_module.graph)):
            for node in graph_module.graph.nodes:
                if "val" in node.meta:
                    node.meta["val"] = pytree.tree_map_only(
                        torch.Tensor, lambda x: _like(x, to) if same_device(x.device, before) else x, value(node)
                    )


def _like(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A value like another one, on a device."""
    made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    return nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made.requires_grad_(x.requires_grad)


def on_device(graph: TaskGraph, device: torch.device) -> TaskGraph:
    """The task's graph for a device: itself, where it is for that one already."""
    before = captured_device(graph.graph_module)
    if before is None or same_device(before, device):
        return graph
    return Pipeline([ToDevice(str(device))]).run_task(graph)


def program_on_device(program: Program, device: torch.device) -> Program:
    """The program with every graph for a device."""
    made: dict[str, Any] = {name: on_device(graph, device) for name, graph in program.items()}
    return program.replacing(made)

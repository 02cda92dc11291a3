"""The graph of a file in the form that capture gives it: parameters as attributes, inputs and outputs flat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from tokgraph.ir.tensors import target_of


def captured_form(
    exported: ExportedProgram,
    state: Sequence[str],
    tensors: Mapping[str, torch.Tensor],
    leaves: Sequence[Any],
    fixed: Mapping[int, Any],
) -> fx.GraphModule:
    """A graph whose parameters are inputs, as one that holds them: the inverse of lowering it for a file.

    Args:
        exported: the graph; its inputs are the state, then the task's tensors.
        state: names of the state, in order.
        tensors: name -> tensor, of those of the state that the file of the graph does not hold.
        leaves: the task's example inputs, flat; those that are no tensors become inputs again.
        fixed: position among the outputs -> value, of those that are no tensors.
    """
    graph = exported.graph
    attributes: dict[str, Any] = {}
    placeholders = list(graph.find_nodes(op="placeholder"))
    own = exported.graph_signature.inputs_to_buffers | exported.graph_signature.inputs_to_parameters
    for node, name in zip(placeholders, state, strict=False):
        target = target_of(name)
        attributes[target] = exported.state_dict[own[node.name]] if node.name in own else tensors[name]
        with graph.inserting_before(node):
            read = graph.create_node("get_attr", target)  # its module does not hold the tensor yet
        read.meta.update(node.meta)
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    given = iter(placeholders[len(state) :])
    last: fx.Node | None = None
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            last = next(given)
            continue
        with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes))):
            last = graph.placeholder(f"constant_{number}")
        last.meta["val"] = leaf
    output = graph.output_node()
    rest = iter(output.args[0])
    count = len(output.args[0]) + len(fixed)
    output.args = (tuple(fixed[i] if i in fixed else next(rest) for i in range(count)),)
    first = next(iter(graph.nodes))
    for node in list(graph.find_nodes(op="placeholder")):
        first.prepend(node)
    return fx.GraphModule(attributes, graph)

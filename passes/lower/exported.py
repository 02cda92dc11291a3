"""A lowered graph as an ``ExportedProgram`` of PyTorch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from tokgraph.ir.node import fake_mode, value

from .graph import Lowered


def exported_program(
    lowered: Lowered, given: Collection[str] = (), into: type[ExportedProgram] = ExportedProgram
) -> ExportedProgram:
    """The lowered graph as an ``ExportedProgram``.

    Args:
        lowered: the graph.
        given: names in its state that become inputs, before the others; the rest become parameters and buffers.
        into: the class of the result.
    """
    graph = lowered.module.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    specs = []
    for node, (name, x) in zip(placeholders, lowered.state.items(), strict=False):
        if name in given:
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
            continue
        kind = InputKind.PARAMETER if isinstance(x, nn.Parameter) else InputKind.BUFFER
        persistent = None if kind is InputKind.PARAMETER else True
        specs.append(InputSpec(kind, TensorArgument(node.name), name, persistent=persistent))
    inputs = placeholders[len(specs) :]
    specs += [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs]
    returned: tuple[fx.Node, ...] = tuple(graph.output_node().args[0])  # type: ignore[arg-type]
    graph.output_node().args = (returned,)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in returned]
    count = sum(spec.kind is InputKind.USER_INPUT for spec in specs)
    in_spec = pytree.tree_structure((tuple(range(count)), {}))
    out_spec = pytree.tree_structure(tuple(range(len(outputs))))
    mode = fake_mode(graph)
    symbols = mode.shape_env.var_to_range if mode is not None and mode.shape_env is not None else {}
    used = _symbols(graph)
    ranges = {symbol: of_symbol for symbol, of_symbol in symbols.items() if symbol in used}
    return into(
        root=lowered.module,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict={name: x for name, x in lowered.state.items() if name not in given},
        range_constraints=ranges,
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))],
        constants={},
        example_inputs=None,
    )


def _symbols(graph: fx.Graph) -> set[Any]:
    """The symbols in the sizes of a graph's values."""
    found: set[Any] = set()
    for node in graph.nodes:
        for x in pytree.tree_leaves(value(node)):
            sizes = x.shape if isinstance(x, torch.Tensor) else [x]
            found |= {symbol for s in sizes if isinstance(s, torch.SymInt) for symbol in s.node.expr.free_symbols}
    return found

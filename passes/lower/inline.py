"""Puts what a function computes of a call's arguments into the graph, beside the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from tokgraph.ir.node import argument, entered, fake_mode, value

aten = torch.ops.aten


def inlined(
    node: fx.Node, function: Callable[..., Any], made_by: str, called_with: Sequence[Any] | None = None
) -> fx.Node:
    """The nodes that compute ``function`` of a call's arguments, inserted where the graph inserts; the one of the result.

    Args:
        node: the call.
        function: of its arguments in the order of the schema.
        made_by: name of the pass.
        called_with: arguments in place of those of the call.
    """
    graph, called = node.graph, arguments(node) if called_with is None else tuple(called_with)
    found: dict[fx.Node, None] = {}
    fx.node.map_arg(called, lambda a: found.setdefault(a))
    given = list(found)

    def of_values(*values: Any) -> Any:
        known = dict(zip(given, values, strict=True))
        return function(*fx.node.map_arg(called, known.__getitem__))

    with entered(fake_mode(graph)):
        traced = make_fx(of_values)(*map(value, given))
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    for inner in traced.graph.nodes:
        if inner.op == "output":
            result = inner.args[0]
            return copies[result]
        if inner.op != "placeholder":
            copies[inner] = graph.node_copy(inner, copies.__getitem__)
            if inner.target is aten.view.default:  # of the example's strides; those of another batch may differ
                copies[inner].target = aten.reshape.default
            copies[inner].meta = {
                **{key: x for key, x in node.meta.items() if key in ("nn_module_stack", "stack_trace", "custom")},
                "val": value(inner),
                "made_by": made_by,
            }
    raise AssertionError("a graph without output")


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a call in the order of its schema."""
    return tuple(argument(node, a.name) for a in node.target._schema.arguments)  # type: ignore[union-attr]

"""Common subexpressions: calls of the same operator on the same values become one call."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument

from ..contract import GraphPass
from ..emitter import RESIDUAL

_KNOWN = ("aten", "prims", "tokgraph")
"""Namespaces whose operators have the tag, where they draw; a user's operator may draw without."""
_SIZES = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.getitem)


@dataclass(frozen=True)
class ShareDuplicates(GraphPass):
    """Common subexpression elimination (Cocke, 1970): of equal calls the first one stays.

    Layers unsqueeze, expand and select the same rotary embeddings and masks, each for itself. Random operators and writes
    are never shared. ``torch.fx.passes.dialect.common.cse_pass`` does not serve here: it takes the numbers ``1``, ``1.0``
    and ``True`` for equal, and knows neither our operators nor attentions that draw dropout.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "share-duplicates"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace each call by the first one like it; what is returned stays a tensor of its own."""
        graph = graph_module.graph
        returned = set(graph.output_node().all_input_nodes)
        first: dict[tuple[object, str, str], fx.Node] = {}
        for node in list(graph.nodes):
            if node in returned or not _repeatable(node):
                continue
            kept = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if kept is not node:
                if node.meta.get(RESIDUAL):
                    kept.meta[RESIDUAL] = True
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def _repeatable(node: fx.Node) -> bool:
    """Whether the same call gives the same value each time, and nothing else happens."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target in _SIZES
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if target.namespace not in _KNOWN:
        return False
    # An operator without a result is a check; an empty tensor is memory that someone may fill; attention may drop out.
    return bool(target._schema.returns) and "empty" not in target._schema.name and not argument(node, "dropout_p")

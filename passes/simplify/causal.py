"""Masks that say what a kernel can be told: the lower triangle, or nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, dims, same_size, set_argument

from ..contract import GraphPass
from ..emitter import remove_dead_code
from .known import is_lower_triangle, shows_all
from .positions import Positions

aten = torch.ops.aten


@dataclass(frozen=True)
class CausalAttention(GraphPass):
    """Gives attentions whose mask is the lower triangle ``is_causal``, so that kernels without a mask (flash) apply.

    `torch.export` makes transformers build masks that its eager forward leaves out, and a drop that narrows queries and
    keys by the same rows makes the triangle of these rows. Neither is read from memory, nor made, any more. Rows that
    queries and keys do not share keep their mask: PyTorch's ``is_causal`` has no other alignment. (``CausalBias`` has, on
    CUDA, by operators of that device alone; elsewhere it is a mask.)

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "causal-attention"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace masks that are known, then remove what made them."""
        positions = Positions()
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            mask = argument(node, "attn_mask")
            if mask is None:
                continue
            found = positions.of(mask)
            square = same_size(dims(argument(node, "query"))[-2], dims(argument(node, "key"))[-2])
            dtype = mask.meta["val"].dtype
            lowest = max(torch.finfo(dtype).min, -1e30) if dtype.is_floating_point else -torch.inf
            causal = is_lower_triangle(found, lowest) and square
            if causal or shows_all(found):
                set_argument(node, "attn_mask", None)
                set_argument(node, "is_causal", causal)
        remove_dead_code(graph_module.graph)

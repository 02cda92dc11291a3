"""Keys and values that several query heads share are given to attention once, not repeated for each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, dims, rank, refresh_value, same_size, set_argument

from ..contract import GraphPass
from ..emitter import remove_dead_code

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default)
_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)

_HALVES, _LARGEST = (torch.float16, torch.bfloat16), 256
"""Types and head sizes of flash attention on CUDA; the memory-efficient kernel takes others, but no ``enable_gqa``."""


@dataclass(frozen=True)
class GroupedHeads(GraphPass):
    """Attention without a mask reads keys and values before they are repeated, with ``enable_gqa``.

    transformers repeats them where it is given a mask, because kernels that take one want all heads; its eager forward,
    which builds no mask, does not. Where the mask turned out to be the lower triangle, this is what it would have done:
    the repeated copies are neither made nor kept for the backward pass. Where no fast kernel takes ``enable_gqa``, they stay.

    Args:
        task: the task to run on; ``None``: every task.
    """

    name: ClassVar[str] = "grouped-heads"
    task: str | None = None

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Take keys and values from before they are repeated, where both are, alike."""
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            if argument(node, "attn_mask") is not None or argument(node, "enable_gqa", False):
                continue
            key, value = (_before_repeat(argument(node, name)) for name in ("key", "value"))
            if (
                key is None
                or value is None
                or not same_size(dims(key)[1], dims(value)[1])
                or not _has_kernel(key, value)
            ):
                continue
            set_argument(node, "key", key)
            set_argument(node, "value", value)
            set_argument(node, "enable_gqa", True)
            refresh_value(node)
        remove_dead_code(graph_module.graph)


def _has_kernel(key: fx.Node, value: fx.Node) -> bool:
    """Whether attention that repeats heads itself has a kernel which does not hold all scores: flash, for heads of one size."""
    size, val = dims(key)[-1], key.meta["val"]
    one_size = isinstance(size, int) and size == dims(value)[-1]
    return one_size and (val.device.type != "cuda" or (val.dtype in _HALVES and size <= _LARGEST))


def _before_repeat(node: Any) -> fx.Node | None:
    """``[batch, heads, tokens, size]`` of which each head is repeated, side by side, to make a value."""
    if not isinstance(node, fx.Node) or node.target not in _VIEWS or rank(node) != 4:
        return None
    repeated = node.args[0]
    if isinstance(repeated, fx.Node) and repeated.target in _COPIES:
        repeated = repeated.args[0]
    if not isinstance(repeated, fx.Node) or repeated.target is not aten.expand.default or rank(repeated) != 5:
        return None
    source = repeated.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten.unsqueeze.default or source.args[1] not in (2, -3):
        return None
    before = source.args[0]
    assert isinstance(before, fx.Node)
    samples, heads, tokens, size = dims(before)
    each = dims(repeated)[2]
    if not (isinstance(heads, int) and isinstance(each, int)):
        return None
    shapes = ((repeated, (samples, heads, each, tokens, size)), (node, (samples, heads * each, tokens, size)))
    fits = all(same_size(a, b) for x, expected in shapes for a, b in zip(dims(x), expected, strict=True))
    return before if fits else None

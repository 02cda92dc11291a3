"""Fake values of many calls, computed again: calls that are alike, as those of the blocks of a model, are run once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .node import computed, fake_mode, value

_DATA_DEPENDENT = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class Values:
    """Recomputes values for one walk over a graph.

    A fake value is shape, strides, type and device, and so is all that an operator of ours or of ATen reads of one. So
    the result of a call serves for all calls of the operator whose arguments are alike. That is not so of operators that
    make a new symbol (``item``, ``nonzero``), nor of what these read: a fake tensor remembers the symbol that was made of
    it.

    Args:
        graph: the graph, which may be edited on the way.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._mode = fake_mode(graph)
        self._known: dict[Any, Any] = {}

    def refresh(self, node: fx.Node) -> None:
        """Recompute the value of a call from those of its inputs."""
        if not _repeats(node) or any(map(_is_data_dependent, node.users)):
            node.meta["val"] = computed(node, self._mode)
            return
        key = (node.target, alike(node.args), alike(node.kwargs))
        if key not in self._known:
            self._known[key] = computed(node, self._mode)
        node.meta["val"] = self._known[key]


def _repeats(node: fx.Node) -> bool:
    """Whether alike calls have alike results, from symbols of their inputs alone."""
    values = [x for node in node.all_input_nodes for x in pytree.tree_leaves(value(node))]
    fake = all(isinstance(x, FakeTensor) and x.constant is None for x in values if isinstance(x, torch.Tensor))
    return getattr(node.target, "namespace", "") in ("aten", "tokgraph") and not _is_data_dependent(node) and fake


def _is_data_dependent(node: fx.Node) -> bool:
    return not _DATA_DEPENDENT.isdisjoint(getattr(node.target, "tags", ()))


def alike(x: Any) -> Any:
    """A hashable description of an argument: alike ones have the same, and numbers of different types do not."""
    if isinstance(x, fx.Node):
        return alike(value(x))
    if isinstance(x, (list, tuple)):
        return tuple(map(alike, x))
    if isinstance(x, dict):
        return tuple((name, alike(item)) for name, item in x.items())
    if isinstance(x, torch.Tensor):
        sizes = (*x.shape, *x.stride(), x.storage_offset())
        return (*map(plain, sizes), x.dim(), x.dtype, x.device, x.layout, x.requires_grad)
    return type(x).__name__, plain(x)


def plain(size: Any) -> Any:
    """A size as a number or an expression."""
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size

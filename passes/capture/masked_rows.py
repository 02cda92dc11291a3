"""Rows that a mask chooses, changed element by element and written back: a choice between two values of every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, dims, rank, same_sizes, tensor, tensor_inputs, where

from ..contract import GraphPass
from ..emitter import Emitter
from ..rules import traits
from ..rules.registry import first_input

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskedRows(GraphPass):
    """``x[mask] = f(x[mask], y)`` becomes ``where(mask, f(x, y at the rows of the mask), x)``, where ``f`` is elementwise.

    Rows that a mask has counted out have no positions that could be followed. A function that multiplies matrices is left as
    it is: over all rows it would take longer.
    """

    name: ClassVar[str] = "masked-rows"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace every such write."""
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        for node in list(graph.nodes):
            if node.target is aten.index_put.default and not argument(node, "accumulate", False):
                _replace(emit, node)
        graph.eliminate_dead_code()


def _replace(emit: Emitter, write: fx.Node) -> None:
    x, mask, values = first_input(write), _mask(write, first_input(write)), argument(write, "values")
    if mask is None or rank(values) != rank(x) - rank(mask) + 1:
        return
    whole = _whole(emit, values, x, mask)
    if whole is None or values.meta["val"].dtype is not x.meta["val"].dtype:
        return
    chosen = _laid_out(emit, mask, rank(x))
    write.replace_all_uses_with(emit.call(aten.where.self, chosen, whole, x, origin=write))


def _mask(node: fx.Node, x: fx.Node) -> fx.Node | None:
    """The mask over the leading axes of ``x`` by which a node reads or writes it."""
    indices = [i for i in argument(node, "indices") if i is not None]
    (mask,) = indices if len(indices) == 1 and argument(node, "indices")[0] is not None else (None,)
    val = tensor(mask)
    if mask is None or val is None or val.dtype is not torch.bool or not same_sizes(dims(mask), dims(x)[: val.dim()]):
        return None
    return mask if rank(mask) < rank(x) else None


def _whole(emit: Emitter, node: fx.Node, x: fx.Node, mask: fx.Node) -> fx.Node | None:
    """A value of chosen rows, computed for all of them; ``None`` where it reads none of ``x``, or is not elementwise."""
    if node.target is aten.index.Tensor and _mask(node, first_input(node)) is mask:
        source = first_input(node)
        return source if same_sizes(dims(source), dims(x)) else None
    elementwise = node.op == "call_function" and traits(node.target).broadcasts and not _draws(node)
    if not elementwise or tensor(node) is None or rank(node) != rank(x) - rank(mask) + 1:
        return None
    found = {y: _whole(emit, y, x, mask) for y in tensor_inputs(node)}
    if all(y is None for y in found.values()):
        return None
    for y in found:
        if found[y] is None and rank(y) == rank(node):
            found[y] = _scattered(emit, y, x, mask)
            if found[y] is None:
                return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda y: found.get(y) or y)
    return emit.call(node.target, *args, origin=node, **kwargs)


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _scattered(emit: Emitter, y: fx.Node, x: fx.Node, mask: fx.Node) -> fx.Node | None:
    """Rows of another value at the places of the mask, as many as there are: that is checked on every batch."""
    if not same_sizes(dims(y)[1:], dims(x)[rank(mask) :]):
        return None
    zeros = emit.call(aten.zeros_like.default, x, dtype=y.meta["val"].dtype, origin=y)
    count = emit.call(aten.sum.default, mask, origin=mask)
    right = emit.call(aten.eq.Scalar, count, emit.size(y, 0), origin=mask)
    place = where(mask)
    said: tuple[Any, ...] = (
        "the mask does not choose as many rows as are put there",
        place.source or "",
        place.module or "",
        [],
        [],
    )
    emit.call(torch.ops.tokgraph.check.default, right, *said, origin=mask)
    sizes = [emit.size(x, axis) for axis in range(rank(x))]
    everywhere = emit.call(aten.expand.default, _laid_out(emit, mask, rank(x)), sizes, origin=mask)
    return emit.call(aten.masked_scatter.default, zeros, everywhere, y, origin=y)


def _laid_out(emit: Emitter, mask: fx.Node, ndim: int) -> fx.Node:
    """A mask with further axes of size 1."""
    for axis in range(rank(mask), ndim):
        mask = emit.call(aten.unsqueeze.default, mask, axis, origin=mask)
    return mask

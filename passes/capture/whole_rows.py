"""Masks over single elements that choose whole rows, as one expanded over features does: they become masks over rows."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, axis_argument, dims, rank, same_size, same_sizes, tensor, tensor_inputs

from ..contract import GraphPass
from ..emitter import Emitter, refresh_after, remove_dead_code
from ..rules import traits
from ..rules.registry import first_input, is_one

aten = torch.ops.aten
_ADDED = (aten.unsqueeze.default, aten.reshape.default, aten.view.default)


@dataclass(frozen=True)
class WholeRows(GraphPass):
    """``x[mask.expand_as(x)].view(-1, features)`` becomes ``x[mask]``, and what is put back so is put back by rows.

    A mask is followed through the elementwise operators that stand between where it was expanded and where it chooses
    (``~mask``). Elements that are read in another form than by rows stay as they are.
    """

    name: ClassVar[str] = "whole-rows"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace what takes elements, and what puts them back."""
        graph = graph_module.graph
        emit, taken = Emitter(graph, self.name), list[fx.Node]()
        for node in list(graph.nodes):
            mask = _of_rows(emit, _chosen_by(node))
            if mask is None:
                continue
            if node.target is aten.index_put.default:
                _put(emit, node, mask)
            else:
                taken += _take(emit, node, mask)
        remove_dead_code(graph)
        refresh_after(graph, taken)


def _chosen_by(node: fx.Node) -> fx.Node | None:
    """The mask over all axes of a value, by which a node takes elements of it, or puts some there."""
    if node.target is aten.masked_select.default:
        mask = argument(node, "mask")
    elif node.target in (aten.index.Tensor, aten.index_put.default) and not argument(node, "accumulate", False):
        indices = argument(node, "indices")
        mask = indices[0] if len(indices) == 1 else None
    else:
        return None
    val, x = tensor(mask), first_input(node)
    boolean = mask is not None and val is not None and val.dtype is torch.bool
    return mask if boolean and rank(x) > 1 and same_sizes(dims(mask), dims(x)) else None


def _of_rows(emit: Emitter, mask: fx.Node | None) -> fx.Node | None:
    """A mask without its last axis, where it is the same along that one; ``None`` where that is not known."""
    if mask is None or rank(mask) < 2:
        return None
    found = _followed(emit, mask) if mask.op == "call_function" else None
    return emit.call(aten.squeeze.dim, mask, -1, origin=mask) if found is None and is_one(mask, -1) else found


def _followed(emit: Emitter, mask: fx.Node) -> fx.Node | None:
    """The same, of the mask's inputs."""
    inputs = tensor_inputs(mask)
    x = inputs[0] if len(inputs) == 1 else mask
    if mask.target in _ADDED and same_sizes(dims(x), dims(mask)[:-1]) and is_one(mask, -1):
        return x
    if mask.target is aten.expand.default:
        same = rank(x) == rank(mask) and is_one(x, -1) and same_sizes(dims(x)[:-1], dims(mask)[:-1])
        return _of_rows(emit, x) if same else None
    if mask.target is aten.slice.Tensor and axis_argument(mask, x) == rank(x) - 1:
        return _of_rows(emit, x)
    drawn = torch.Tag.nondeterministic_seeded in getattr(mask.target, "tags", ())
    alike = bool(inputs) and all(same_sizes(dims(x), dims(mask)) for x in inputs)
    if drawn or not alike or not traits(mask.target).broadcasts:
        return None
    narrow = {x: _of_rows(emit, x) for x in inputs}
    if None in narrow.values():
        return None
    args, kwargs = fx.node.map_arg((mask.args, mask.kwargs), lambda x: narrow.get(x) or x)
    return emit.call(mask.target, *args, origin=mask, **kwargs)


def _take(emit: Emitter, node: fx.Node, mask: fx.Node) -> list[fx.Node]:
    """Let what reads taken elements as rows read rows, which are returned; how many there are is then their number."""
    x = first_input(node)
    features = dims(x)[-1]
    views = [user for user in node.users if traits(user.target).reshape and _has_rows(user, features)]
    if not views:
        return []
    rows = emit.call(aten.index.Tensor, x, [mask], origin=node)
    for view in views:
        view.replace_all_uses_with(rows)
    for size in [user for user in node.users if user.target is aten.sym_size.int]:
        for count in [user for user in size.users if user.target is operator.floordiv and user.args[1] == features]:
            count.replace_all_uses_with(emit.call(aten.sym_size.int, rows, 0, origin=node))
    return [rows]


def _put(emit: Emitter, node: fx.Node, mask: fx.Node) -> None:
    """Put rows where their elements were put."""
    into, values = first_input(node), argument(node, "values")
    if rank(values) != 1 or not traits(values.target).reshape or not _has_rows(first_input(values), dims(into)[-1]):
        return
    node.replace_all_uses_with(emit.call(aten.index_put.default, into, [mask], first_input(values), origin=node))


def _has_rows(node: fx.Node, features: object) -> bool:
    """Whether a value is ``[rows, features]``."""
    return tensor(node) is not None and rank(node) == 2 and same_size(dims(node)[1], features)  # type: ignore[arg-type]

"""Rows of which each stands for several, one after the other: repeated, or joined with axes that follow them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokgraph.ir.node import Dim, argument, dims, rank, same_size, same_sizes

from ..emitter import Emitter
from ..rules import traits
from ..rules.registry import first_input

aten = torch.ops.aten


@dataclass(frozen=True)
class All:
    """A value for all rows, where the graph has one for those that are taken.

    Args:
        value: the value.
        axis: the axis that counts rows, of both.
        times: how many neighbours on that axis belong to one row.
    """

    value: fx.Node
    axis: int
    times: int = 1


def regrouped(emit: Emitter, node: fx.Node, of: All) -> All | None:
    """A call that repeats each row, joins rows with axes behind them (``[rows, chosen]`` to ``[rows * chosen]``) or takes
    them apart again, for all rows; ``None`` where the call does none of these.

    Args:
        emit: where nodes go.
        node: the call.
        of: its first input, for all rows.
    """
    if node.target is aten.repeat_interleave.self_int:
        times = argument(node, "repeats")
        along = argument(node, "dim")
        if not isinstance(times, int) or along is None or along % rank(node) != of.axis:
            return None
        made = emit.call(node.target, of.value, times, of.axis, origin=node)
        return All(made, of.axis, of.times * times)
    if node.op != "call_function" or not traits(node.target).reshape:
        return None
    times = _times(dims(first_input(node)), dims(node), of)
    if times is None:
        return None
    sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    sizes[of.axis] = -1
    if any(not isinstance(size, int) for size in sizes) or sizes.count(-1) > 1:
        return None
    return All(emit.call(node.target, of.value, sizes, origin=node), of.axis, times)


def _times(old: tuple[Dim, ...], new: tuple[Dim, ...], of: All) -> int | None:
    """How many neighbours are one row behind a reshape that joins axes to that of rows, or splits it."""
    axis, fewer = of.axis, len(old) - len(new)
    if fewer == 0 or len(new) <= axis or not same_sizes(old[:axis], new[:axis]):
        return None
    more = (old if fewer > 0 else new)[axis + 1 : axis + 1 + abs(fewer)]
    if len(more) < abs(fewer) or not all(isinstance(size, int) for size in more):
        return None
    each = 1
    for size in more:
        each *= int(size)
    if fewer > 0:
        joined = same_size(old[axis] * each, new[axis]) and same_sizes(old[axis + 1 + fewer :], new[axis + 1 :])
        return of.times * each if joined else None
    apart = same_size(new[axis] * each, old[axis]) and same_sizes(old[axis + 1 :], new[axis + 1 - fewer :])
    return of.times // each if apart and each and of.times % each == 0 else None

"""Attention sinks: scores that are joined with further columns, normalised, and cut again become one softmax of the scores."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, axis_argument, dims, rank, same_size

from ..contract import GraphPass
from ..emitter import Emitter
from ..rules.registry import first_input

aten = torch.ops.aten
_PADS = (aten.constant_pad_nd.default, aten.pad.default)


@dataclass(frozen=True)
class SinksToSoftmax(GraphPass):
    """``softmax(cat([scores, sinks], -1))`` without the columns of the sinks becomes ``tokgraph.softmax_beside``: the keys
    of an attention are then an axis of their own. Scores may be padded instead, sinks stand before them, and the largest
    of all be subtracted first, which changes nothing.
    """

    name: ClassVar[str] = "sinks-to-softmax"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace every cut of such a softmax."""
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        for node in list(graph.nodes):
            if node.target is aten.softmax.int and axis_argument(node, node) == rank(node) - 1:
                _replace(emit, node)
        graph.eliminate_dead_code()


def _replace(emit: Emitter, softmax: fx.Node) -> None:
    """Replace the cuts of a softmax, if all that reads it cuts off what was joined to the scores."""
    joined = _without_largest(first_input(softmax))
    found = _parts(emit, joined)
    if found is None:
        return
    scores, sinks, start = found
    if sinks.target is aten.expand.default:  # it broadcasts
        sinks = first_input(sinks)
    if not all(_cuts(user, softmax, scores, start) for user in softmax.users):
        return
    for user in list(softmax.users):
        beside = torch.ops.tokgraph.softmax_beside.default
        made = emit.call(beside, scores, sinks, argument(softmax, "dtype"), origin=softmax)
        user.replace_all_uses_with(made)


def _without_largest(x: fx.Node) -> fx.Node:
    """What the largest of each row was subtracted from, where it was."""
    if x.target is not aten.sub.Tensor or argument(x, "alpha", 1) != 1:
        return x
    of, largest = x.args[:2]
    if isinstance(largest, fx.Node) and largest.target is operator.getitem and largest.args[1] == 0:
        largest = first_input(largest)
    reduces = isinstance(largest, fx.Node) and largest.target in (aten.max.dim, aten.amax.default)
    if not reduces or first_input(largest) is not of or not argument(largest, "keepdim", False):  # type: ignore[arg-type]
        return x
    given = argument(largest, "dim")  # type: ignore[arg-type]
    over = [axis % rank(of) for axis in (given if isinstance(given, (list, tuple)) else [given])]
    return of if over == [rank(of) - 1] else x


def _parts(emit: Emitter, joined: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """Scores, sinks, and where the scores begin; the scores are taken to be the wider of two parts."""
    if joined.target is aten.cat.default and axis_argument(joined, joined) == rank(joined) - 1:
        parts = argument(joined, "tensors")
        widths = [dims(x)[-1] for x in parts]
        if len(parts) != 2 or all(isinstance(w, int) and w == 1 for w in widths):
            return None
        if isinstance(widths[1], int) and (not isinstance(widths[0], int) or widths[1] < widths[0]):
            return parts[0], parts[1], 0
        return (parts[1], parts[0], widths[0]) if isinstance(widths[0], int) else None
    if joined.target in _PADS and argument(joined, "mode", "constant") == "constant":
        before, behind, *others = argument(joined, "pad")
        if any(others) or sorted((before > 0, behind > 0)) != [False, True] or min(before, behind) < 0:
            return None
        scores, width = first_input(joined), before + behind
        filled, val = argument(joined, "value") or 0, scores.meta["val"]
        sizes = [*[1] * (rank(scores) - 1), width]
        sinks = emit.call(aten.full.default, sizes, filled, dtype=val.dtype, device=val.device, origin=joined)
        return scores, sinks, before
    return None


def _cuts(user: fx.Node, softmax: fx.Node, scores: fx.Node, start: int) -> bool:
    """Whether a reader takes the columns of the scores, and no others."""
    if user.target is not aten.slice.Tensor or axis_argument(user, softmax) != rank(softmax) - 1:
        return False
    begins = argument(user, "start") or 0
    same = argument(user, "step", 1) == 1 and same_size(dims(user)[-1], dims(scores)[-1])
    return same and (begins == start or same_size(dims(softmax)[-1] + begins, start))

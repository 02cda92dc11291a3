"""Keeping axes apart: reshapes that merge batch and tokens for the sake of row-wise operators are taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import Dim, dims, rank, same_size, tensor, value

from ..contract import GraphPass
from ..emitter import Emitter
from ..rules import traits
from ..rules.registry import first_input
from .apart import Apart, call_apart

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepBatchAxis(GraphPass):
    """Takes back reshapes that merge leading axes where a later reshape separates them again.

    ``reshape(f(reshape(x, [B*S, ...])), [B, S, ...])`` becomes ``f(x)`` for operators that compute the merged axis row by
    row, so that the token axis can be followed and rows dropped sample by sample. The merged axis may move on the way
    (``[experts, B*S, ...]``), be repeated, or be merged with more (``[B*S*chosen, ...]``). Every step is checked against the
    op rules: the new call must treat the axes row by row and every other axis as the old one does. Where that cannot be
    shown the reshapes stay.
    """

    name: ClassVar[str] = "keep-batch-axis"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Rebuild what lies between merges and the reshapes that undo them."""
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        apart: dict[fx.Node, Apart] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or tensor(node) is None:
                continue
            moved = _reshaped(emit, node, apart) if traits(node.target).reshape else call_apart(emit, node, apart)
            if moved is None:
                continue
            if max(moved.runs, default=1) > 1:
                apart[node] = moved
            elif isinstance(value(node), torch.Tensor):  # all axes are apart again
                node.replace_all_uses_with(moved.value)
        graph.eliminate_dead_code()
        _merge_again(emit, apart)
        graph.eliminate_dead_code()


def _reshaped(emit: Emitter, node: fx.Node, apart: Mapping[fx.Node, Apart]) -> Apart | None:
    """A reshape of a value whose axes are apart, or one that merges leading axes: the same elements with these axes apart."""
    x = first_input(node)
    source = apart.get(x) or Apart(x, (1,) * rank(x))
    old, new = dims(source.value), dims(node)
    if any(free_unbacked_symbols(size) for size in (*old, *new) if not isinstance(size, int)):
        return None  # they rule out most reshapes
    runs = _regrouped(old, new)
    heads: set[int] = set()
    if runs is None:
        parts = _split(emit, node, source, new)
        if parts is None:
            return None
        source, heads = parts
        old = dims(source.value)
        runs = _regrouped(old, new)
        assert runs is not None
    merged = {0} | heads
    for together in (set(source.fine(axis)) & set(run) for axis in range(len(source.runs)) for run in runs):
        merged |= together if len(together) > 1 else set()
    sizes: list[Any] = []
    counts = []
    for axis, fine in enumerate(runs):
        kept = len(fine) > 1 and not merged.isdisjoint(fine)
        counts.append(len(fine) if kept else 1)
        given = node.args[1][axis]  # type: ignore[index]
        sizes += [_size(source.value, i) for i in fine] if kept else [given]
    if (x not in apart and max(counts, default=1) == 1) or None in sizes or sizes.count(-1) > 1:
        return None
    fine_sizes = [old[i] for axis, fine in enumerate(runs) for i in fine if counts[axis] > 1 or len(fine) == 1]
    same = len(sizes) == len(old) == len(fine_sizes) and all(map(same_size, old, fine_sizes))
    if same and not any(len(fine) == 0 for fine in runs):
        return Apart(source.value, tuple(counts))
    return Apart(emit.call(node.target, source.value, sizes, origin=node), tuple(counts))


def _split(emit: Emitter, node: fx.Node, source: Apart, new: Sequence[Dim]) -> tuple[Apart, set[int]] | None:
    """A value with its features as heads and the features of each, and the axes that are merged then, where a reshape
    (``node``) to sizes ``new`` merges heads with axes before them, as ``[tokens, batch, hidden]`` to
    ``[tokens, batch * heads, head]``.
    """
    old = dims(source.value)
    hidden, head, axis = old[-1], new[-1], len(old) - 1
    if not isinstance(hidden, int) or not isinstance(head, int) or head < 2 or hidden % head:
        return None
    sizes: list[Any] = [_size(source.value, i) for i in range(axis)]
    if None in sizes:
        return None
    *others, last = source.runs
    value = emit.call(aten.reshape.default, source.value, [*sizes, hidden // head, head], origin=node)
    fine = Apart(value, (*others, last + 1))
    runs = _regrouped(dims(value), new)
    merged = next((set(run) for run in runs or () if axis in run), set[int]())
    return (fine, merged) if len(merged) > 1 else None


def _regrouped(old: Sequence[Dim], new: Sequence[Dim]) -> list[tuple[int, ...]] | None:
    """For each axis of a reshape's result the axes of its input that are merged to it, one for an axis that survives, none
    for a part of one or a new axis; ``None`` where axes only correspond several to several.
    """
    runs: list[tuple[int, ...]] = []
    i = j = 0
    while j < len(new):
        if new[j] == 1:
            one = i < len(old) and old[i] == 1
            runs.append((i,) if one else ())
            i, j = i + one, j + 1
            continue
        while i < len(old) and old[i] == 1:
            i += 1
        if i == len(old):
            return None
        merged = _until(old, i, new[j])
        split = None if merged else _until(new, j, old[i])
        if merged:
            runs.append(tuple(axis for axis in range(i, merged) if old[axis] != 1))
            i, j = merged, j + 1
        elif split:
            runs += [()] * (split - j)
            i, j = i + 1, split
        else:
            return None
    return runs


def _until(sizes: Sequence[Dim], start: int, wanted: Dim) -> int | None:
    """The end of the axes from ``start`` that hold as many elements as ``wanted`` says."""
    elements: Dim = 1
    for axis in range(start, len(sizes)):
        elements = elements * sizes[axis]
        if same_size(elements, wanted):
            return axis + 1
    return None


def _size(x: fx.Node, axis: int) -> fx.Node | int | None:
    """The size of an axis: a number, or a node that computes it before ``x`` and not from it."""
    size = dims(x)[axis]
    if isinstance(size, int):
        return size
    node: fx.Node
    for node in x.graph.nodes:
        if node is x:
            return None
        if node.op == "call_function" and isinstance(val := value(node), torch.SymInt) and val.node.expr == size:
            return node
    return None


def _merge_again(emit: Emitter, apart: Mapping[fx.Node, Apart]) -> None:
    """Where a merged value is still read beside the one with its axes apart, merge that one instead of computing both."""
    alive = set(emit.graph.nodes)
    for node, same in apart.items():
        if traits(node.target).reshape or not {node, same.value} <= alive or not isinstance(value(node), torch.Tensor):
            continue
        sizes: list[Any] = [-1 if run > 1 else _size(node, axis) for axis, run in enumerate(same.runs)]
        if None not in sizes and sizes.count(-1) == 1:
            node.replace_all_uses_with(emit.call(aten.reshape.default, same.value, sizes, origin=node))

"""Keeping axes apart: reshapes that merge batch and tokens for the sake of row-wise operators are taken back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import Dim, argument, dims, rank, same_size, value

from ..contract import GraphPass
from ..emitter import Emitter
from ..rules import axis_map, traits
from ..rules.registry import Axis, first_input

aten = torch.ops.aten

_ANY_RANK = {aten.mm.default: aten.matmul.default, aten.bmm.default: aten.matmul.default}


@dataclass(frozen=True)
class Apart:
    """A value whose leading axes are apart, in row-major order equal to one in which they are merged.

    Args:
        value: the value.
        leading: how many axes the merged one stands for.
    """

    value: fx.Node
    leading: int


@dataclass(frozen=True)
class KeepBatchAxis(GraphPass):
    """Takes back reshapes that merge leading axes where a later reshape separates them again.

    ``reshape(f(reshape(x, [B*S, ...])), [B, S, ...])`` becomes ``f(x)`` for operators that compute the merged axis row by
    row, so that the token axis can be followed and rows dropped sample by sample. Every step is checked against the op
    rules: the new call must treat the leading axes row by row and every other axis as the old one does. Where that
    cannot be shown the reshapes stay.
    """

    name: ClassVar[str] = "keep-batch-axis"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Rebuild what lies between merges and the reshapes that undo them."""
        graph = graph_module.graph
        emit = Emitter(graph, self.name)
        apart: dict[fx.Node, Apart] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or not isinstance(value(node), torch.Tensor):
                continue
            if traits(node.target).reshape and (same := _separated(emit, node, apart)) is not None:
                node.replace_all_uses_with(same)
            elif (moved := _apart(emit, node, apart)) is not None:
                apart[node] = moved
        graph.eliminate_dead_code()
        _merge_again(emit, apart)
        graph.eliminate_dead_code()


def _separated(emit: Emitter, node: fx.Node, apart: dict[fx.Node, Apart]) -> fx.Node | None:
    """What takes the place of a reshape that gives the leading axes of a merged value back."""
    source = apart.get(first_input(node))
    if source is None or not _same_sizes(dims(source.value)[: source.leading], dims(node)[: source.leading]):
        return None
    if _same_sizes(dims(source.value), dims(node)):
        return source.value
    return emit.call(node.target, source.value, node.args[1], origin=node)


def _apart(emit: Emitter, node: fx.Node, apart: dict[fx.Node, Apart]) -> Apart | None:
    """The node's value with its leading axes apart, where it merges them or reads a value that has them merged."""
    if not traits(node.target).reshape:
        return _call_apart(emit, node, apart)
    x = first_input(node)
    source = apart.get(x) or Apart(x, _merged_axes(node))
    if source.leading == 0 or (x in apart and not _same_sizes(dims(x)[:1], dims(node)[:1])):
        return None
    if _same_sizes(dims(source.value)[source.leading :], dims(node)[1:]):
        return source
    sizes = [_size(source.value, axis) for axis in range(source.leading)]
    if None in sizes:
        return None
    rest = list(node.args[1])[1:]  # type: ignore[arg-type]
    return Apart(emit.call(node.target, source.value, [*sizes, *rest], origin=node), source.leading)


def _merged_axes(node: fx.Node) -> int:
    """How many leading axes of its input the first axis of a reshape stands for, 0 where it is no merge of them, or where
    the sizes depend on data (they rule out most reshapes).
    """
    if any(free_unbacked_symbols(size) for size in dims(first_input(node)) if not isinstance(size, int)):
        return 0
    described = axis_map(node)
    assert described is not None
    merged = [len(g.inputs) for g in described.groups if g.inputs.start == 0 and g.outputs == range(1)]
    return 0 if 1 in merged else min(merged, default=0)


def _same_sizes(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


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


def _call_apart(emit: Emitter, node: fx.Node, apart: dict[fx.Node, Apart]) -> Apart | None:
    """The call on values whose leading axes are apart, if the rules show that it computes the same."""
    sources = {x: apart[x] for x in node.all_input_nodes if x in apart}
    described = axis_map(node) if sources else None
    if described is None or not described.rows or set(described.rows[0] or ()) != {(x, 0) for x in sources}:
        return None
    first, *others = sources.values()
    leading = dims(first.value)[: first.leading]
    if any(dims(s.value)[: s.leading] != leading for s in others):
        return None
    target: Any = node.target
    target = _ANY_RANK.get(target, target)
    names = traits(target).axes
    if names is None or _of_rank(node, len(leading) - 1):
        return None
    args, kwargs = shifted(node, names, len(leading) - 1)
    args, kwargs = fx.node.map_arg((args, kwargs), lambda x: sources[x].value if x in sources else x)
    made = emit.call(target, *args, origin=node, **kwargs)
    return Apart(made, len(leading)) if _computes_same(made, node, sources) else None


def _of_rank(node: fx.Node, more: int) -> bool:
    """Whether the call works, or works well, on values of its rank and not on those with more axes: memory formats have
    four or five, the kernels of fused attention four.
    """
    if node.target is aten.scaled_dot_product_attention.default:
        return rank(node) + more > 4
    return argument(node, "memory_format") in (torch.channels_last, torch.channels_last_3d)


def shifted(node: fx.Node, axes: Collection[str], by: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments, with those that name axes, counted from the front, ``by`` further back."""

    def shift(dim: Any) -> Any:
        if isinstance(dim, (list, tuple)):
            return [shift(d) for d in dim]
        return dim + by if isinstance(dim, int) and dim >= 0 else dim

    names = [schema.name for schema in node.target._schema.arguments]  # type: ignore[union-attr]
    args = (shift(a) if name in axes else a for name, a in zip(names, node.args, strict=False))
    return tuple(args), {name: shift(a) if name in axes else a for name, a in node.kwargs.items()}


def _computes_same(made: fx.Node, node: fx.Node, sources: dict[fx.Node, Apart]) -> bool:
    """Whether the new call treats the leading axes row by row, and every other axis as the old call does."""
    old, new = axis_map(node), axis_map(made)
    first, *_ = sources.values()
    leading = first.leading
    if old is None or new is None or not _same_sizes(dims(made), (*dims(first.value)[:leading], *dims(node)[1:])):
        return False

    def moved(axis: Axis) -> Axis:
        x, dim = axis
        return (sources[x].value, dim + leading - 1) if x in sources else axis

    row_by_row = all(
        set(new.rows[axis] or ()) == {(s.value, axis) for s in sources.values()} for axis in range(leading)
    )
    return row_by_row and all(
        (a is None) == (b is None) and {moved(axis) for axis in a or ()} == set(b or ())
        for a, b in zip(old.rows[1:], new.rows[leading:], strict=True)
    )


def _merge_again(emit: Emitter, apart: dict[fx.Node, Apart]) -> None:
    """Where a merged value is still read beside the one with its axes apart, merge that one instead of computing both."""
    alive = set(emit.graph.nodes)
    for node, same in apart.items():
        sizes = [_size(node, axis) for axis in range(1, rank(node))] if {node, same.value} <= alive else [None]
        if not traits(node.target).reshape and None not in sizes:
            node.replace_all_uses_with(emit.call(aten.reshape.default, same.value, [-1, *sizes], origin=node))

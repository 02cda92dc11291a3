"""What a drop costs by itself: the operators that move rows, and the bytes they move in a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokgraph.ir.evaluate import example_leaves
from tokgraph.ir.node import tensor, tensor_inputs
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.tensors import read

from .works import example_symbols

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


@dataclass(frozen=True)
class RowMove:
    """One operator that moves rows.

    Args:
        node: its name.
        operator: ``select``, ``drop``, ``restore`` or ``merge``, or one of these of a range (``select_range``).
        forward: bytes read and written.
        backward: bytes read and written; 0 where no gradient flows.
    """

    node: str
    operator: str
    forward: int
    backward: int


def row_moves(graph: TaskGraph) -> list[RowMove]:
    """The operators that move rows, with the bytes of a step on the example batch, in order.

    A gather reads and writes its rows; its backward fills a gradient with zeros and writes the rows. A restore copies the
    stream and writes the rows; its backward copies the gradient, clears the rows in it and gathers them. Indices are left
    out. A hand-written loop over gather and scatter, or over index_select and index_copy, moves the same. Where rows stand side
    by side, a slice moves nothing, its backward fills a gradient with zeros and writes the rows; a concatenation reads and
    writes its result, and its backward is slices.
    """
    symbols = example_symbols(graph)
    trained = _differentiable(graph)

    def size(node: fx.Node) -> int:
        x = tensor(node)
        assert x is not None
        elements = 1
        for d in x.shape:
            elements *= int(d.node.expr.xreplace(symbols)) if isinstance(d, torch.SymInt) else d
        return elements * x.element_size()

    found = []
    for node in graph.graph.nodes:
        if (count := _BYTES.get(node.target)) is not None:
            forward, backward = count(size, node)
            name = node.target.name().partition("::")[2]
            found.append(RowMove(node.name, name, forward, backward if node in trained else 0))
    return found


def drop_overhead(graph: TaskGraph) -> dict[str, Any]:
    """The operators that move rows, and the bytes that they move in a training step on the example batch."""
    moves = row_moves(graph)
    bytes_moved = {"forward": sum(m.forward for m in moves), "backward": sum(m.backward for m in moves)}
    return {"operators": len(moves), "bytes": bytes_moved}


Size = Callable[[fx.Node], int]


def _of_selection(size: Size, node: fx.Node) -> tuple[int, int]:
    rows = size(node)
    return 2 * rows, size(node.args[0]) + 2 * rows  # type: ignore[arg-type]


def _of_restore(size: Size, node: fx.Node) -> tuple[int, int]:
    stream, rows = size(node), size(node.args[1])  # type: ignore[arg-type]
    return 2 * stream + 2 * rows, 2 * stream + 3 * rows


def _of_merge(size: Size, node: fx.Node) -> tuple[int, int]:
    return 2 * size(node), 2 * size(node)


def _of_slice(size: Size, node: fx.Node) -> tuple[int, int]:
    return 0, size(node.args[0]) + 2 * size(node)  # type: ignore[arg-type]


def _of_restored_slice(size: Size, node: fx.Node) -> tuple[int, int]:
    stream, rows = size(node), size(node.args[1])  # type: ignore[arg-type]
    return 2 * stream, stream + 2 * (stream - rows)


def _of_concatenation(size: Size, node: fx.Node) -> tuple[int, int]:
    return 2 * size(node), 0


_BYTES: dict[Any, Callable[[Size, fx.Node], tuple[int, int]]] = {
    tokgraph.select.default: _of_selection,
    tokgraph.drop.default: _of_selection,
    tokgraph.restore.default: _of_restore,
    tokgraph.merge.default: _of_merge,
    tokgraph.select_range.default: _of_slice,
    tokgraph.restore_range.default: _of_restored_slice,
    tokgraph.merge_range.default: _of_concatenation,
    tokgraph.join.default: _of_concatenation,
}


def _differentiable(graph: TaskGraph) -> set[fx.Node]:
    """The values that a gradient flows through."""
    found: set[fx.Node] = set()
    leaves = dict(zip(graph.graph.find_nodes(op="placeholder"), example_leaves(graph), strict=True))
    for node in graph.graph.nodes:
        x = tensor(node)
        if x is None or not (x.is_floating_point() or x.is_complex()):
            continue
        if node.op == "get_attr":
            trained = read(graph.graph_module, node).requires_grad
        elif node.op == "placeholder":
            trained = leaves[node].requires_grad
        else:
            trained = node.target is not aten.detach.default and any(i in found for i in tensor_inputs(node))
        if trained:
            found.add(node)
    return found

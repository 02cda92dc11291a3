"""Own projections: visual rows get their own copies of a block's query, key and value projections."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from tokgraph.ir.blocks import Block, Projection
from tokgraph.ir.names import own_name
from tokgraph.ir.node import argument

from ..emitter import VISUAL_ROWS, Emitter
from .index import IndexBuilder
from .row_space import RowSpace, indices

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


def seed_projections(
    block: Block,
    spaces: Sequence[RowSpace],
    hidden: Sequence[RowSpace],
    task: str,
    emit: Emitter,
    build: IndexBuilder,
    nodes: dict[str, fx.Node],
) -> fx.Node | None:
    """Give the visual rows of a block their own projections.

    Where rows are kept by ``spaces``, ``project(x)`` becomes ``merge(project(x[text]), own(x[visual]), visual)``, put back
    where the rows were; rows that nothing reads are never projected. Queries are read of the rows in ``spaces``, keys and
    values of those that no site hides.

    Args:
        block: the block.
        spaces: the spaces open in it.
        hidden: those of them, outermost first, whose dropped rows are no keys.
        task: the task, whose parameters the copies become.
        emit: where nodes go.
        build: makes the masks.
        nodes: the graph's nodes by name.

    Returns:
        Where a block's queries are fewer than its keys: ``[batch, tokens]`` int64, the text rows and then the visual ones, an
        order of the keys in which they need no merging.
    """
    order = None
    apart = not all(projection.keys for projection in block.projections)  # queries are not read in the keys' order
    for projection in block.projections:
        around = hidden if projection.keys else spaces
        visual = around[-1].visual if around else build.visual_count
        if visual:
            text = None if around else _text_of(spaces)
            made = _split(nodes[projection.node], projection, indices(around), visual, text, task, emit, build)
            if projection.keys and spaces and not around and apart:
                order = emit.call(aten.cat.default, list(made), 1, origin=made[0])
                order.meta[VISUAL_ROWS] = visual
    return order


def _text_of(spaces: Sequence[RowSpace]) -> fx.Node | None:
    """The index of a site that keeps no visual row, in a block whose keys are all rows: that of the text rows."""
    alone = len(spaces) == 1 and not spaces[0].visual and spaces[0].lost is None
    return spaces[0].index if alone else None


def _split(
    node: fx.Node,
    projection: Projection,
    space: list[fx.Node],
    visual: int,
    text: fx.Node | None,
    task: str,
    emit: Emitter,
    build: IndexBuilder,
) -> tuple[fx.Node, fx.Node]:
    """Project text and visual rows apart; returns their indices."""
    readers = list(node.users)
    x, mask = emit.chain(argument(node, "input"), space), emit.chain(build.visual, space)
    if text is None:
        length = emit.size(mask, 1)
        count = length - visual if isinstance(length, int) else emit.call(operator.sub, length, visual, origin=node)
        others = emit.call(aten.logical_not.default, mask, origin=node)
        text = emit.call(tokgraph.rows.default, others, count, True, origin=node)
    image = emit.call(tokgraph.rows.default, mask, visual, True, origin=node)
    text.meta[VISUAL_ROWS], image.meta[VISUAL_ROWS] = 0, visual
    names = [name for name in (projection.weight, projection.bias) if name is not None]
    model = [argument(node, name) for name in ("weight", "bias")][: len(names)]
    copies = [_copied(own_name(task, name), of, emit) for name, of in zip(names, model, strict=True)]
    parts = [
        emit.call(aten.linear.default, emit.select(x, rows), *parameters, origin=node)
        for rows, parameters in ((text, model), (image, copies))
    ]
    whole = emit.call(tokgraph.merge.default, *parts, image, origin=node)
    for depth in reversed(range(len(space))):
        around = emit.chain(node, space[:depth])
        whole = emit.call(tokgraph.restore.default, around, whole, space[depth], origin=node)
    for reader in readers:
        reader.replace_input_with(node, whole)
    return text, image


def _copied(name: str, of: fx.Node, emit: Emitter) -> fx.Node:
    """A copy of the parameter that an operand is, in the type that the operand has."""
    if of.op == "get_attr":
        return emit.parameter(name, of)
    source: fx.Node = of.args[0]  # type: ignore[assignment]
    return emit.call(of.target, _copied(name, source, emit), *of.args[1:], origin=of, **of.kwargs)

"""Seeds beside the decoder: a mean over rows of a block becomes one over the rows that are kept in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from tokgraph.errors import PlanError
from tokgraph.ir.blocks import Block, Side
from tokgraph.ir.node import module_path, where
from tokgraph.ops.averages import AVERAGES

from ..emitter import Emitter, narrowed, read_instead, refresh_after, way_to
from ..rules.registry import first_input
from .row_space import RowSpace, indices


def seed_sides(block: Block, spaces: Sequence[RowSpace], task: str, emit: Emitter, nodes: dict[str, fx.Node]) -> None:
    """Let what averages rows of a block beside the decoder read the rows that are kept.

    Args:
        block: the block.
        spaces: the spaces open in it, outermost first.
        task: the task.
        emit: where nodes go.
        nodes: the graph's nodes by name.

    Raises:
        PlanError: samples keep different numbers of rows, so that some of the kept are padding.
    """
    changed = []
    for side in block.sides:
        reader, value = nodes[side.reader], nodes[side.value]
        if any(space.lost is not None for space in spaces):
            raise PlanError(
                f"task {task!r}: {reader.target} averages rows of block {block.index}, and with ragged='pad' some of the "
                "rows that are kept are padding",
                where=where(reader),
                help="use ragged='min', or choose a span without this block",
            )
        kept = emit.chain(value, indices(spaces), side.axis, side.batch)
        changed.append(kept)
        if reader.target not in AVERAGES:
            read_instead(emit, reader, first_input(reader), value, kept, side.places)
            continue
        _set_part(emit, reader, 0, side.places, value, kept)
        if side.weights:
            weights = nodes[side.weights]
            changed.append(emit.chain(weights, indices(spaces)))
            _set_part(emit, reader, 1, side.places[:1], weights, changed[-1])
    if changed:
        refresh_after(emit.graph, changed)


def _set_part(emit: Emitter, reader: fx.Node, argument: int, places: Sequence[int], old: fx.Node, new: fx.Node) -> None:
    """Let a mean over the rows of several values read fewer of one, or the weights of fewer."""
    parts: list[fx.Node] = list(reader.args[argument])  # type: ignore[arg-type]
    place, *further = places
    parts[place] = narrowed(emit, parts[place], old, new, further, copied=True)
    reader.update_arg(argument, parts)


def side_nodes(block: Block, nodes: dict[str, fx.Node]) -> set[str]:
    """What reads the state after a block in its own module, and is followed to what averages rows of it."""
    if not block.sides or not block.module:
        return set()
    return {
        user.name
        for name in block.after
        for user in nodes[name].users
        if (module_path(user) + ".").startswith(block.module + ".")
    }


def side_readers(blocks: Sequence[Block], nodes: dict[str, fx.Node]) -> set[fx.Node]:
    """What averages rows of blocks beside the decoder, and the joins of several blocks' rows before it.

    Args:
        blocks: the blocks.
        nodes: the nodes by name of a graph that is not seeded yet.
    """
    found: set[fx.Node] = set()
    for side in (side for block in blocks for side in block.sides):
        reader = nodes[side.reader]
        found.add(reader)
        if side.places:
            way = way_to(nodes[side.value], *_operand(reader, side))
            found |= {node for node, _ in way if node.target is torch.ops.aten.cat.default}
    return found


def _operand(reader: fx.Node, side: Side) -> tuple[fx.Node, Sequence[int]]:
    """What a reader reads of a side, and which operands of joins before that lead to it."""
    if reader.target not in AVERAGES:
        return first_input(reader), side.places
    operands: Sequence[fx.Node] = reader.args[0]  # type: ignore[assignment]
    return operands[side.places[0]], side.places[1:]

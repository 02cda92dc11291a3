"""Seeds at the outputs: what is made of the stream after the last block takes the demanded rows only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.errors import PlanError
from tokgraph.ir.facts import TaskFacts, Window
from tokgraph.ir.node import argument, axis_argument, by_name, descendants, output_args, tensor
from tokgraph.ir.program import COMPACT_OUTPUTS

from ..analysis.axes import AxisClasses
from ..analysis.loss_rows import LossRows, loss_rows
from ..emitter import VISUAL_ROWS, Emitter, read_instead, refresh_after
from ..rules import traits
from ..rules.registry import Axis, first_input
from .index import IndexBuilder
from .row_space import RowSpace

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


@dataclass(frozen=True)
class ReadRows:
    """Rows that a loss or an output sees, and which of them it reads.

    Args:
        axis: an axis that indexes the rows.
        base: indices from the token axis to these rows (empty: they are the token axis).
        chosen: indices into these rows of those that are read (empty: all).
        within: indices from the token axis to the rows that are read, which begin as those of an output do (empty: none).
    """

    axis: Axis
    base: tuple[fx.Node, ...]
    chosen: tuple[fx.Node, ...]
    within: tuple[fx.Node, ...] = ()


def seed_outputs(
    module: fx.GraphModule,
    emit: Emitter,
    build: IndexBuilder,
    facts: TaskFacts,
    streams: Sequence[fx.Node],
    spaces: tuple[RowSpace, ...],
    exact: bool,
) -> None:
    """Select the rows that losses and outputs read.

    Args:
        module: the graph module, edited in place; its ``meta`` learns which outputs became compact.
        emit: where nodes go.
        build: index building.
        facts: the task's facts.
        streams: the streams after the last block, the residual one first.
        spaces: spaces that were never restored; labels and outputs follow their rows.
        exact: select the demanded rows as well.

    Raises:
        PlanError: rows are gone for good, but the task's outputs must stay whole.
    """
    if spaces and facts.demand.reads == "all":
        raise PlanError(
            f"task {facts.name!r}: a site without restore, but every row of its outputs is demanded",
            help="use restore=True, or declare what the task reads (reads='text' or 'visual', outputs='loss')",
        )
    graph = module.graph
    classes = AxisClasses(graph)
    nodes = by_name(graph)
    stream = streams[0]
    reads = [_whole(build, stream, spaces, exact)]
    later = descendants(streams)
    if exact:
        returned = _returns_rows(graph, classes, later, (stream, 1), (stream, 0))
        for w in facts.windows:
            shared = reads[0].chosen if returned and _all_but_the_last(w, nodes[w.node], facts) else ()
            reads.append(_window(build, emit, nodes[w.node], w, shared))
    losses = [rows for node in later if (rows := loss_rows(node)) is not None]
    changed: list[fx.Node] = []
    for read in reads:
        for rows in losses:
            if read.chosen and _reads(rows, classes, read.axis, (stream, 0)):
                changed += _narrow_loss(emit, rows, read)
    _narrow_outputs(module, emit, classes, reads, later, (stream, 0))
    for read in reads[1:]:
        _window_to_selection(emit, read)
    refresh_after(graph, changed)


def narrowed_readers(graph: fx.Graph, facts: TaskFacts, exact: bool) -> tuple[set[fx.Node], set[int]]:
    """The losses and the positions of the outputs that :func:`seed_outputs` narrows where rows are gone for good.

    Args:
        graph: the task's graph before anything is seeded.
        facts: the task's facts.
        exact: whether the demanded rows are selected as well.
    """
    classes = AxisClasses(graph)
    nodes = by_name(graph)
    streams = [nodes[name] for name in facts.blocks[-1].after]
    stream = streams[0]
    axes: list[Axis] = [(stream, 1)]
    for window in facts.windows if exact else ():
        if window.demanded < window.length:
            axes.append((nodes[window.node], axis_argument(nodes[window.node], nodes[window.node])))
    later = descendants(streams)
    losses = {
        node
        for node in later
        if (rows := loss_rows(node)) is not None and any(_reads(rows, classes, axis, (stream, 0)) for axis in axes)
    }
    leaves = {
        leaf
        for leaf, node in enumerate(output_args(graph))
        if node in later and any(_token_axis(node, classes, axis, (stream, 0)) is not None for axis in axes)
    }
    return losses, leaves


def _reads(rows: LossRows, classes: AxisClasses, axis: Axis, samples: Axis) -> bool:
    """Whether a loss reads the rows that an axis holds, sample by sample."""
    return classes.sample_axis(rows.logits, samples) == 0 and classes.same((rows.logits, rows.axis), axis)


def _token_axis(node: fx.Node, classes: AxisClasses, rows: Axis, samples: Axis) -> int | None:
    """The one axis of an output that holds the rows of another axis, ``None`` where it has none, or several."""
    axes = classes.of(node, rows) if tensor(node) is not None else ()
    return axes[0] if len(axes) == 1 and axes[0] > 0 and classes.sample_axis(node, samples) == 0 else None


def _whole(build: IndexBuilder, stream: fx.Node, spaces: tuple[RowSpace, ...], exact: bool) -> ReadRows:
    demanded = build.demand(spaces) if exact else None
    chosen = [space.index for space in spaces] + ([demanded] if demanded is not None else [])
    return ReadRows((stream, 1), (), tuple(chosen))


def _returns_rows(graph: fx.Graph, classes: AxisClasses, later: set[fx.Node], axis: Axis, samples: Axis) -> bool:
    """Whether an output holds rows of the token axis: it is narrowed to those that are demanded."""
    return any(node in later and _token_axis(node, classes, axis, samples) is not None for node in output_args(graph))


def _all_but_the_last(window: Window, node: fx.Node, facts: TaskFacts) -> bool:
    """Whether a slice leaves out the last row alone, which is among the demanded ones (``logits[:, :-1]``)."""
    demand = facts.demand
    whole = window.length == demand.tokens - 1 and (argument(node, "start") or 0) == 0
    return whole and demand.reads != "all" and window.demanded < min(demand.rows, window.length)


def _window(build: IndexBuilder, emit: Emitter, node: fx.Node, window: Window, shared: tuple[fx.Node, ...]) -> ReadRows:
    """The rows of a slice; ``shared``: the demanded rows of the token axis, of which those of the slice are a part."""
    index = build.window(argument(node, "start") or 0, argument(node, "end"))
    index.meta[VISUAL_ROWS] = window.visual
    axis = axis_argument(node, node)
    if not shared:
        demanded = build.demand((), (index, window.length, window.demanded))
        return ReadRows((node, axis), (index,), () if demanded is None else (demanded,))
    # the demanded rows of a sample, less its last row: an output and a loss that read them begin with one selection
    first, *rest = shared
    inner = build.demanded_before_last(shared)
    inner.meta[VISUAL_ROWS] = window.visual
    return ReadRows((node, axis), (index,), (emit.chain(first, [*rest, inner]),), (*shared, inner))


def _window_to_selection(emit: Emitter, read: ReadRows) -> None:
    """Replace a slice of the token axis by the selection of its rows, which can be pushed down."""
    node, axis = read.axis
    chosen = emit.select(first_input(node), read.base[0], axis, 0)
    node.replace_all_uses_with(chosen)


def _narrow_loss(emit: Emitter, rows: LossRows, read: ReadRows) -> list[fx.Node]:
    logits = _rows_within(emit, rows, read) if read.within else None
    if logits is None:
        logits = emit.chain(rows.logits, read.chosen, rows.axis, 0)
    targets = rows.targets
    ignored = argument(rows.loss, "ignore_index", -100)
    for index in read.chosen:
        targets = emit.call(tokgraph.select_targets.default, targets, index, ignored, origin=rows.loss)
    read_instead(emit, rows.loss, rows.loss.args[0], rows.logits, logits)  # type: ignore[arg-type]
    read_instead(emit, rows.loss, rows.loss.args[1], rows.targets, targets)  # type: ignore[arg-type]
    return [logits, targets]


def _rows_within(emit: Emitter, rows: LossRows, read: ReadRows) -> fx.Node | None:
    """A loss's rows of a slice, taken from what is sliced; ``None`` where more than copies lies between."""
    node, between = rows.logits, []
    while node is not read.axis[0]:
        if not traits(node.target).copies:
            return None
        between.append(node)
        node = first_input(node)
    found = emit.chain(first_input(node), read.within, read.axis[1], 0)
    for copy in reversed(between):
        found = emit.call(copy.target, found, *copy.args[1:], origin=copy, **copy.kwargs)
    return found


def _narrow_outputs(
    module: fx.GraphModule,
    emit: Emitter,
    classes: AxisClasses,
    reads: list[ReadRows],
    later: set[fx.Node],
    samples: Axis,
) -> None:
    """Narrow the outputs that carry rows that are read, and add the rows' positions to the outputs; an output whose first
    axis is not the batch (several stacked) stays whole.
    """
    output = module.graph.output_node()
    results: list[fx.Node] = list(output.args[0])  # type: ignore[arg-type]
    compact: dict[int, int] = {}
    positions: dict[fx.Node, int] = {}
    for leaf, node in enumerate(tuple(results)):
        if node not in later:
            continue
        for read in reads:
            axis = _token_axis(node, classes, read.axis, samples)
            if axis is not None and read.chosen:
                results[leaf] = emit.chain(node, read.chosen, axis, 0)
                first, *rest = read.chosen
                where = emit.chain(first, rest)
                if where not in positions:
                    positions[where] = len(results)
                    results.append(where)
                compact[leaf] = positions[where]
    output.args = (tuple(results),)
    module.meta[COMPACT_OUTPUTS] = compact

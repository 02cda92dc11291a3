"""Where a task's visual tokens are: from what the user says, or found by following the visual inputs into the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.evaluate import actual_size, evaluate, size_hint
from tokgraph.ir.facts import VisualFlow
from tokgraph.ir.node import (
    ancestors,
    argument,
    axis_argument,
    by_name,
    descendants,
    dims,
    rank,
    tensor,
    tensor_inputs,
    where,
)
from tokgraph.ir.program import TaskGraph, loss_node

from ..rules import traits
from ..rules.registry import Axis, is_one
from .axes import AxisClasses
from .visual_rows import VisualRows

aten = torch.ops.aten
MEETS = (aten.cat.default, aten.masked_scatter.default, aten.where.self, aten.index_put.default)


def find_visual(graph: TaskGraph, stream: fx.Node, classes: AxisClasses) -> VisualFlow:
    """The visual flow of a task, with counts from its example batch.

    Raises:
        AnalysisError: the declared input does not lie along the stream's token axis, visual and text rows do not meet in
            a way that tokgraph knows, or a sample holds no visual token.
    """
    flow = _declared(graph, stream, classes) if graph.task.visual else _found(graph, stream, classes)
    mask = visual_mask(graph, flow, stream)
    counts = mask.sum(1)
    if (counts == 0).any():
        which = "the example batch" if not counts.any() else f"sample {int(counts.argmin())} of the example batch"
        raise AnalysisError(
            f"task {graph.name!r}: {which} holds no visual token",
            help="check visual= against the ids, mask or positions of the example batch; every sample needs an image",
        )
    starts = mask[:, 1:] & ~mask[:, :-1]
    runs = (starts.sum(1) + mask[:, 0]).max()
    least, most = int(counts.min()), int(counts.max())
    mean = least if least == most else float(counts.double().mean())
    step = math.gcd(*counts.tolist())
    return replace(flow, count=least, most=most, mean=mean, step=step, runs=int(runs))


def visual_mask(graph: TaskGraph, flow: VisualFlow, stream: fx.Node, tokens: int | None = None) -> torch.Tensor:
    """``[batch, tokens]`` bool on the CPU: the visual tokens of the task's inputs (the example batch).

    Args:
        graph: the task graph.
        flow: its visual flow.
        stream: a value with the batch axis first.
        tokens: length of the token axis; ``None``: that of ``stream``.
    """
    nodes = by_name(graph.graph)
    if flow.kind == "range":
        tokens = actual_size(graph, stream, 1) if tokens is None else tokens
        offset = sum(actual_size(graph, nodes[name], axis) for name, axis in flow.before)
        at = torch.arange(tokens)
        start, stop = range_bounds(flow, tokens, offset)
        return ((at >= start) & (at < stop)).expand(actual_size(graph, stream, 0), -1)
    assert flow.source is not None
    found = evaluate(graph, [nodes[flow.source]])[0].cpu()
    if flow.kind == "ids" and flow.low is not None and flow.high is not None:
        return (found >= flow.low) & (found <= flow.high)
    beside = [
        more + sum(actual_size(graph, nodes[name], axis) for name, axis in joined)
        for joined, more in zip((flow.before, flow.after), flow.padding, strict=True)
    ]
    return torch.nn.functional.pad(found.reshape(found.shape[:2]).bool(), beside)


def range_bounds(flow: VisualFlow, tokens: int, offset: int) -> tuple[int, int]:
    """First and last-plus-one position of a range flow, for a token axis of length ``tokens``."""
    stop = tokens if flow.stop is None else flow.stop + (offset if flow.stop >= 0 else 0)
    start, stop, _ = slice(flow.start + offset, stop).indices(tokens)
    return start, stop


def _begins(stream: fx.Node) -> str:
    """Where a stream begins, for a message."""
    place = where(stream)
    return " in ".join(filter(None, (place.node or stream.name, place.module))) + (
        f" ({place.source})" if place.source else ""
    )


def _refuse_beyond(graph: TaskGraph, stream: fx.Node, start: int, stop: int | None) -> None:
    """Refuse positions that the token axis does not have: Python's slices would leave them out and say nothing."""
    tokens = size_hint(stream, 1)
    wanted = max((abs(i) for i in (start, stop) if i is not None and (i < 0 or i == stop)), default=0)
    if wanted > tokens or start >= tokens:
        raise AnalysisError(
            f"task {graph.name!r}: visual= names positions up to {max(wanted, start + 1)}, and the residual stream that was "
            f"found, which begins at {_begins(stream)}, has {tokens} tokens in the example batch",
            where=where(stream),
            help="give positions of that stream; an encoder-decoder may have another one, which is taken where visual= names "
            "an input that lies along it",
        )


def _declared(graph: TaskGraph, stream: fx.Node, classes: AxisClasses) -> VisualFlow:
    visual = graph.task.visual
    assert visual is not None
    entry = _meeting_point(stream)
    if visual.kind == "positions":
        start, stop = visual.span or (None, None)
        _refuse_beyond(graph, stream, start or 0, stop)
        return VisualFlow("range", entry.name, 0, 0, start=start or 0, stop=stop)
    sources = graph.input_nodes().get(visual.input or "", [])
    source = sources[0] if len(sources) == 1 else None
    if source is None or tensor(source) is None:
        raise AnalysisError(f"task {graph.name!r}: visual input {visual.input!r} is not a plain tensor input")
    shape = tuple(tensor(source).shape)  # type: ignore[union-attr]
    if rank(source) != 2 or (source.users and not classes.same((source, 1), (stream, 1))):
        raise AnalysisError(
            f"task {graph.name!r}: visual= names input {visual.input!r} of shape {shape}, which does not lie along the token "
            f"axis of the residual stream that was found, which begins at {_begins(stream)}",
            where=where(source),
            help="name a [batch, tokens] input of the whole sequence, use VisualTokens.positions, or give visual_inputs=; "
            "where the stream begins later than the decoder, something in between adds to no stream (a norm of the sum, "
            "an operator without a rule)",
        )
    if source.users and not is_one(source, 0) and not classes.same((source, 0), (stream, 0)):
        raise AnalysisError(
            f"task {graph.name!r}: visual= names input {visual.input!r} of shape {shape}, whose first axis is not that of the "
            "residual stream: which samples its rows are of cannot be told",
            where=where(source),
            help="let the stream be [batch, tokens, hidden], with the samples of the input in the same order",
        )
    branch = _branch_of(entry)
    if visual.kind == "ids":
        return VisualFlow("ids", entry.name, 0, 0, source=source.name, low=visual.low, high=visual.high, branch=branch)
    return VisualFlow("mask", entry.name, 0, 0, source=source.name, branch=branch)


def _found(graph: TaskGraph, stream: fx.Node, classes: AxisClasses) -> VisualFlow:
    wanted = set(graph.task.visual_inputs)
    inputs = [n for key, nodes in graph.input_nodes().items() if key in wanted for n in nodes]
    visual = descendants(inputs)
    if stream not in visual:
        _refuse_stream(graph, stream, wanted, visual)
    others = descendants([n for key, nodes in graph.input_nodes().items() if key not in wanted for n in nodes])
    return _followed(graph, VisualRows(graph, visual, others, classes), stream, 1, visual, classes)


def _followed(
    graph: TaskGraph, rows: VisualRows, node: fx.Node, axis: int, visual: set[fx.Node], classes: AxisClasses
) -> VisualFlow:
    """The flow whose visual rows are rows of a value, by their places: from where the image's rows were put among others on.

    Raises:
        AnalysisError: there is no such place.
    """
    combined: fx.Node | None = None
    while True:
        flow = _meeting(node, axis, visual)
        if flow is not None:
            try:
                rows.check(node, axis)
            except AnalysisError:
                # the image's rows are among others already, to which more are joined here
                found = _before_join(graph, rows, node, axis, visual, classes)
                if found is None:
                    raise
                return found
            if node.op == "placeholder" and combined is not None:
                rows.refuse_combined(combined)
            return flow
        padding = _padding(node, axis)
        if padding is not None:
            flow = _followed(graph, rows, tensor_inputs(node)[0], axis, visual, classes)
            return _joined(flow, node, (), (), padding) or rows.refuse_joined(node)
        (x, at), after = _back(graph, node, axis, visual, classes), node
        if rows.combined(after, x, axis):
            combined = after
            if after.target is aten.where.self:
                rows.refuse_combined(after)
        node, axis = x, at


def _before_join(
    graph: TaskGraph, rows: VisualRows, node: fx.Node, axis: int, visual: set[fx.Node], classes: AxisClasses
) -> VisualFlow | None:
    """The flow of the one operand of a ``cat`` that has image content, as one of the rows that are joined."""
    operands: list[fx.Node] = argument(node, "tensors") if node.target is aten.cat.default else []
    mine = [x for x in operands if x in visual]
    if len(mine) != 1:
        return None
    try:
        flow = _followed(graph, rows, mine[0], axis, visual, classes)
    except AnalysisError:
        return None
    if flow.kind == "range" and flow.entry == mine[0].name and mine[0].op == "placeholder":
        return None
    at = operands.index(mine[0])
    return _joined(flow, node, operands[:at], operands[at + 1 :], (0, 0), axis)


def _joined(
    flow: VisualFlow,
    node: fx.Node,
    before: Sequence[fx.Node],
    after: Sequence[fx.Node],
    padding: tuple[int, int],
    axis: int = 1,
) -> VisualFlow | None:
    """A flow in what joins more rows to those that it was found in; ``None`` where they would not be found again.

    Args:
        flow: the flow.
        node: what joins them.
        before: the values whose rows are put before.
        after: those whose rows are put behind.
        padding: how many rows of zeros are put before and behind.
        axis: the axis of the rows.
    """
    more, rest = (tuple((x.name, axis) for x in values) for values in (before, after))
    lead, trail = padding
    if flow.kind != "range":
        both = flow.padding[0] + lead, flow.padding[1] + trail
        return replace(flow, entry=node.name, before=(*more, *flow.before), after=(*flow.after, *rest), padding=both)
    stop = flow.stop
    if stop is None or stop < 0:
        sizes = [dims(x)[axis] for x in after]
        if not all(isinstance(size, int) for size in sizes):
            return None
        stop = (stop or 0) - trail - sum(sizes) or None
    else:
        stop += lead
    return replace(flow, entry=node.name, start=flow.start + lead, stop=stop, before=(*more, *flow.before))


def _padding(node: fx.Node, axis: int) -> tuple[int, int] | None:
    """How many rows of one number are put before and behind those of the input, if that is what a node does."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return None
    pads = list(argument(node, "pad"))
    pads += [0] * (2 * rank(node) - len(pads))
    at = 2 * (rank(node) - 1 - axis)
    mine, others = pads[at : at + 2], pads[:at] + pads[at + 2 :]
    if node.target is aten.pad.default and argument(node, "mode", "constant") != "constant":
        return None
    rows = all(isinstance(pad, int) and pad >= 0 for pad in mine) and not any(others)
    return (mine[0], mine[1]) if rows else None


def _refuse_stream(graph: TaskGraph, stream: fx.Node, wanted: set[str], visual: set[fx.Node]) -> NoReturn:
    """Raise for a stream that begins without image content."""
    looks = loss_node(graph) in visual
    raise AnalysisError(
        f"task {graph.name!r}: the residual stream does not depend on the visual inputs {sorted(wanted)}"
        + (
            ": its layers look at the image from beside, by cross-attention, and none of its own tokens is visual"
            if looks
            else ""
        ),
        where=where(stream),
        help="tokens of an encoder that is only looked at cannot be dropped: name inputs whose rows are among the decoder's"
        if looks
        else "name the inputs that carry image content in visual_inputs=, or say where they are with visual=",
    )


def _meeting(node: fx.Node, axis: int, visual: set[fx.Node]) -> VisualFlow | None:
    """The flow, if visual and other rows meet at this node."""
    if node.op == "placeholder":  # the whole sequence is image content
        return VisualFlow("range", node.name, 0, 0)
    if node.target is aten.cat.default:
        operands: list[fx.Node] = argument(node, "tensors")
        mine = [x for x in operands if x in visual]
        first = operands.index(mine[0])
        if axis == axis_argument(node, node) and operands[first : first + len(mine)] == mine:
            before = tuple((x.name, axis) for x in operands[:first])
            last = first + len(mine) == len(operands)
            stop = None if last else sum(size_hint(x, axis) for x in mine)
            return VisualFlow("range", node.name, 0, 0, stop=stop, before=before, branch=_names(mine))
    if node.target is aten.masked_scatter.default and argument(node, "source") in visual:
        mask = _flat_mask(argument(node, "mask"))
        return VisualFlow("mask", node.name, 0, 0, source=mask.name, branch=_branch_of(node)) if mask else None
    if node.target is aten.where.self:
        mask = _flat_mask(node.args[0])  # type: ignore[arg-type]
        if mask is not None and node.args[1] in visual and node.args[2] not in visual:
            return VisualFlow("mask", node.name, 0, 0, source=mask.name, branch=_names([node.args[1]]))  # type: ignore[list-item]
    if node.target is aten.index_put.default:
        indices = argument(node, "indices")
        if len(indices) == 1 and rank(indices[0]) == 2 and argument(node, "values") in visual:
            return VisualFlow("mask", node.name, 0, 0, source=indices[0].name, branch=_branch_of(node))
    return None


def _back(
    graph: TaskGraph, node: fx.Node, axis: int, visual: set[fx.Node], classes: AxisClasses
) -> tuple[fx.Node, int]:
    """The one input that carries the visual rows of ``node``, and its token axis."""
    found: list[Axis] = []
    for x in tensor_inputs(node):
        if x in visual:
            found += [(x, a) for a in range(rank(x)) if classes.same((x, a), (node, axis))]
    if len(found) != 1:
        raise AnalysisError(
            f"task {graph.name!r}: cannot follow the visual inputs into the residual stream",
            where=where(node),
            help="say where the visual tokens are with visual=tg.VisualTokens.ids(...), .mask(...) or .positions(...)",
        )
    return found[0]


def _flat_mask(mask: fx.Node) -> fx.Node | None:
    """The ``[batch, tokens]`` mask (or one with trailing axes of size 1) behind a broadcast one."""
    while True:
        if rank(mask) == 2 or (rank(mask) == 3 and size_hint(mask, 2) == 1 and not _broadcasts(mask)):
            return mask
        inputs = tensor_inputs(mask)
        if not _broadcasts(mask) or len(inputs) != 1 or rank(mask) < 2:
            return None
        mask = inputs[0]


def _broadcasts(node: fx.Node) -> bool:
    """Whether a node repeats its input's values along more axes, or copies them."""
    return node.target in (aten.unsqueeze.default, aten.expand.default) or traits(node.target).copies


def _meeting_point(stream: fx.Node) -> fx.Node:
    """The node before the stream's first block where rows of several kinds meet (as embeddings, or as ids that are then
    embedded), else the embedding of all rows, else the stream's first value.
    """
    node = stream
    while node.target not in MEETS:
        if node.target is aten.embedding.default:
            ids: fx.Node = argument(node, "indices")
            return ids if ids.target in MEETS else node
        inputs = [x for x in tensor_inputs(node) if x.op != "get_attr"]
        if len(inputs) != 1:
            return stream
        node = inputs[0]
    return node


def _branch_of(entry: fx.Node) -> tuple[str, ...]:
    if entry.target is aten.masked_scatter.default:
        return _names([argument(entry, "source")])
    if entry.target is aten.index_put.default:
        return _names([argument(entry, "values")])
    return ()


def _names(nodes: list[fx.Node]) -> tuple[str, ...]:
    return tuple(sorted(n.name for n in ancestors(nodes) if n.op == "call_function"))

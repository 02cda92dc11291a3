"""Decoder blocks and their attentions: residual segments grouped by where tokens mix, confirmed by the module stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.blocks import Attention, Between, Block, Stream, Unplaced
from tokgraph.ir.node import ancestors, argument, module_path, rank, source_line, tensor, where
from tokgraph.ir.program import TaskGraph

from ..rules import axis_map, has_rule, traits
from ..rules.registry import Axis
from .attentions import TokenMix, as_attention, attentions, token_mixes
from .axes import AxisClasses
from .between import Part, belong_after, named_by, parameters, read_tensors
from .cuts import in_call, layer_modules, plain, pointwise
from .flow import computed_from
from .projections import find_projections, projection_weights
from .states import Layers
from .stream import Segment, common_module
from .units import grown, list_of, parts_of_one_layer

aten = torch.ops.aten
_SCALING = (aten.mul.Tensor, aten.div.Tensor)
_PLACING = ("order", "layout")  # what puts rows somewhere makes no layer: image features that come in again


def token_axis(graph: TaskGraph, segments: Sequence[Segment], classes: AxisClasses) -> tuple[fx.Node, int]:
    """The stream's first value and its token axis: the axis over which the segments' attentions mix.

    Raises:
        AnalysisError: no attention mixes an axis of the stream, or the stream is not ``[batch, tokens, hidden]``.
    """
    entry = segments[0].start
    votes: Counter[int] = Counter()
    for segment in segments:
        for node in segment.nodes:
            described = axis_map(node)
            for mix in described.mixes if described else ():
                if mix.kind in ("attention", "softmax"):
                    votes.update(a for a in range(rank(entry)) if classes.same((entry, a), mix.axes[0]))
    if not votes:
        raise _no_attention(graph, segments)
    axis = 1 if votes[1] else votes.most_common(1)[0][0]  # attention over samples as well is refused in spans
    _check_layout(graph, entry, axis)
    return entry, axis


def check_layout(graph: TaskGraph, node: fx.Node, classes: AxisClasses, tokens: Axis) -> None:
    """Check that a value of the state is laid out as dropping needs it.

    Raises:
        AnalysisError: it is not ``[batch, tokens, ...]``.
    """
    _check_layout(graph, node, next(iter(classes.of(node, tokens)), -1))


def _check_layout(graph: TaskGraph, node: fx.Node, axis: int) -> None:
    if rank(node) < 3 or axis != 1:
        raise AnalysisError(
            f"task {graph.name!r}: the residual stream has shape {tuple(tensor(node).shape)} with its tokens on axis "  # type: ignore[union-attr]
            f"{axis}; tokgraph needs [batch, tokens, ...]",
            where=where(node),
            help="samples that are packed, one after the other, are a batch of one: give inputs and stream an axis of samples "
            "in front ([1, tokens]), with a mask that keeps samples apart",
        )


def _no_attention(graph: TaskGraph, segments: Sequence[Segment]) -> AnalysisError:
    """Why no attention was found: an operator that cannot be followed, or a softmax over an axis that is not the stream's."""
    inside = [node for segment in segments for node in segment.nodes]
    unruled = next((node for node in inside if tensor(node) is not None and not has_rule(node)), None)
    lost = next((node for node in inside if _may_attend(node)), None)
    beside = next((node for node in graph.graph.nodes if _may_attend(node)), None)
    turned = next((x for x in ancestors([beside]) if traits(x.target).turns), None) if beside is not None else None
    what = ""
    if unruled is not None:
        what = f": {unruled.target} has no token-axis rule, so that tokens cannot be followed through it"
    elif lost is not None:
        what = f": {lost.target} works over an axis that was joined, cut or merged on its way from the stream's tokens"
    elif turned is not None:
        what = f": {turned.target} moves rows to places of other tokens"
    elif beside is not None:
        what = (
            f": the longest run of additions, {segments[0].start.name} to {segments[-1].end.name}, does not lead past "
            f"{beside.target}; a decoder whose layers gate, mix or replace their rows, or run several streams, has no stream"
        )
    return AnalysisError(
        f"task {graph.name!r}: no attention over the residual stream was found{what}",
        where=where(unruled or lost or turned or beside or segments[0].start),
        help="tokgraph understands scaled_dot_product_attention, and matmul, softmax, matmul over the stream's tokens; write "
        "the attention in these, or add a rule (CONTRIBUTING.md, 'How to add an op rule')",
    )


def _may_attend(node: fx.Node) -> bool:
    """Whether a node is, or may be part of, an attention."""
    return tensor(node) is not None and bool(attentions([node]))


def find_blocks(
    segments: Sequence[Segment], classes: AxisClasses, tokens: Axis
) -> tuple[tuple[Block, ...], tuple[Between, ...]]:
    """Group residual segments into blocks.

    A block begins where tokens mix; segments that mix none (the FFN) belong to the block before them, or to the one after
    them where the module stack or the number of their module says so, and those before the first mix (what is added to
    embeddings) to none. An item of the list of layers that mixes none is a block. Neighbours that both mix tokens are one
    block when the module stack says that one module holds both (self- and cross-attention).

    Returns:
        The blocks, and the segments of which it is not known to which of two blocks they belong.
    """
    mixing = [
        any(found.mix.kind not in _PLACING for found in token_mixes(segment.nodes, classes, tokens))
        for segment in segments
    ]
    following = [
        next((s for s, mixes in zip(segments[number:], mixing[number:], strict=True) if mixes), None)
        for number in range(len(segments))
    ]
    later, layers, unsure = belong_after(_between(segments, mixing, following))
    groups: list[list[Segment]] = []
    heading = False  # the last block holds no mix yet, only what belongs to it before that
    for number, segment in enumerate(segments):
        mixes, after = mixing[number] or segment in layers, following[number]
        leads = not mixes and after is not None and (_together(segment, after) or segment in later)
        if groups and (heading or _together(groups[-1][0], segment)):
            groups[-1].append(segment)
        elif mixes or leads:
            groups.append([segment])
        elif groups:
            groups[-1].append(segment)
        heading = not mixes and (heading or (leads and groups[-1] == [segment]))
    return tuple(_block(index, group, classes, tokens) for index, group in enumerate(groups)), unsure


def _between(
    segments: Sequence[Segment], mixing: Sequence[bool], following: Sequence[Segment | None]
) -> Iterator[Part]:
    """The segments with parameters of their own that are in the module of neither layer beside them."""
    before = None
    for segment, mixes, after in zip(segments, mixing, following, strict=True):
        if mixes:
            before = segment
        elif named_by(segment) and not any(s is not None and _together(segment, s) for s in (before, after)):
            yield Part(segment, before, after)


def blocks_of(layers: Layers, classes: AxisClasses) -> tuple[Block, ...]:
    """The blocks that layers are."""
    blocks = []
    main = _residual(layers)
    order = {node: i for i, node in enumerate(layers.tokens[0].graph.nodes)}
    for index, (before, after) in enumerate(pairwise(layers.states)):
        born = layers.born.get(index, ())
        first, last = min(before), max(*after, *born, after[0])
        inside = computed_from(before, last) & ancestors([*after, *born], first) - ancestors(before, first)
        nodes = tuple(sorted(inside, key=order.__getitem__))
        unit = layers.units[index]
        found = _attentions_of(nodes, classes, layers.tokens)
        found = tuple(replace(a, direct=_direct(a, nodes, before)) for a in found)
        streams = [Stream(a.name, b.name) for a, b in zip(before, after, strict=True)]
        start, end = before[main].name, after[main].name
        made = computed_from(unit.nodes) if born else set()
        blocks.append(
            Block(
                index,
                _module_of(layers, index, nodes),
                start,
                end,
                tuple(node.name for node in nodes),
                found,
                find_projections(found, nodes),
                tuple(sorted(read_tensors(nodes))),
                tuple(stream for number, stream in enumerate(streams) if number != main),
                tuple(node.name for node in born if node in made),
            )
        )
    return tuple(blocks)


def _residual(layers: Layers) -> int:
    """Which of several streams stands for all where one is asked for: the one that ends last."""
    order = {node: i for i, node in enumerate(layers.tokens[0].graph.nodes)}
    last = layers.states[-1]
    return max(range(len(last)), key=lambda role: order[last[role]])


def _module_of(layers: Layers, index: int, nodes: Sequence[fx.Node]) -> str:
    """The module of a layer: what the modules of its nodes have in common, without what lies between layers."""
    other = layers.units[index - 1 if index else 1]
    module, _ = layer_modules(layers.units[index], other)
    return common_module(tuple(node for node in nodes if in_call(node, module))) if module else ""


def _direct(attention: Attention, nodes: Sequence[fx.Node], before: Sequence[fx.Node]) -> bool:
    """Whether keys and values are made of the state before a block, without anything that the block has added to it.

    Something is added where an operator works element by element on the state and on what linear maps made of it. Rows that
    are scaled by a gate that is made of them are the state's still, until they are added to it.
    """
    by_name, inside = {node.name: node for node in nodes}, set(nodes)
    read = [by_name[k.node] for k in attention.keys if k.role != "attn_mask" and k.node in by_name]
    above = set().union(read, *(above_inside(x, inside) for x in read)) - {by_name[attention.output]}
    plain, mapped = set(before), set[fx.Node]()
    for node in nodes:
        if node in above:
            inputs = set(node.all_input_nodes)
            if pointwise(node) and inputs & plain:
                if inputs & mapped:
                    if node.target not in _SCALING:
                        return False
                    mapped.add(node)
                else:
                    plain.add(node)
            elif traits(node.target).products or inputs & mapped:
                mapped.add(node)
    return True


def find_unplaced(graph: fx.Graph, blocks: Sequence[Block], classes: AxisClasses, tokens: Axis) -> tuple[Unplaced, ...]:
    """The attentions of tokens to tokens whose layers are no blocks, in graph order.

    They are in no block where something beside the stream keeps it from being cut between their layers; or in one block with
    attentions of other layers, one after the other. Layers of the same list that work on more tokens, or on fewer, since
    some were joined to them or cut from them, are no blocks either.
    """
    family = grown(graph, classes, tokens)
    lists = {list_of(block.module) for block in blocks} - {""}
    inside = {name: block for block in blocks for name in block.nodes}
    crowded = {block.index for block in blocks if not _one_layer(graph, block)}
    found = []
    live = ancestors([graph.output_node()])  # torch keeps dead attentions: their dropout may draw numbers
    for mixing in attentions(node for node in graph.nodes if node in live):
        axis = next((axis for axis in family if _of_tokens(mixing, classes, axis)), None)
        if axis is None or (axis is not tokens and list_of(module_path(mixing.node)) not in lists):
            continue
        block = inside.get(mixing.node.name)
        if block is None or block.index in crowded:
            node, number = mixing.node, None if block is None else block.index
            found.append(Unplaced(node.name, module_path(node), number, source_line(node)))
    return tuple(found)


def _of_tokens(mixing: TokenMix, classes: AxisClasses, tokens: Axis) -> bool:
    """Whether an attention is one of tokens to tokens."""
    if not any(classes.same(axis, tokens) for axis in mixing.mix.axes):
        return False
    if mixing.mix.kind == "attention":
        query = argument(mixing.node, "query")
        return classes.same((query, rank(query) - 2), tokens)
    return len(classes.of(mixing.mix.axes[0][0], tokens)) > 1


def _one_layer(graph: fx.Graph, block: Block) -> bool:
    """Whether attentions of a block that follow each other are parts of one layer: each with projections of its own, in
    modules of one layer.
    """
    if len(block.attention) < 2:
        return True
    names, attending = set(block.nodes), {a.node for a in block.attention}
    inside = {node for node in graph.nodes if node.name in names}
    mine = [node for node in inside if node.name in attending]
    weights = {node: projection_weights(node, inside) for node in mine}
    return all(
        a is b
        or a not in above_inside(b, inside)
        or (not weights[a] & weights[b] and parts_of_one_layer(module_path(a), module_path(b)))
        for a in mine
        for b in mine
    )


def above_inside(node: fx.Node, inside: Collection[fx.Node]) -> set[fx.Node]:
    """What a node is computed from among ``inside``."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for x in stack.pop().all_input_nodes:
            if x in inside and x not in found:
                found.add(x)
                stack.append(x)
    return found


def _together(a: Segment, b: Segment) -> bool:
    return a.call != "" and b.call != "" and _same_layer(a.call, b.call)


def _same_layer(a: str, b: str) -> bool:
    shorter, longer = sorted((a.split("."), b.split(".")), key=len)
    return bool(shorter[-1]) and longer[: len(shorter)] == shorter and any(plain(part).isdigit() for part in shorter)


def _block(index: int, group: list[Segment], classes: AxisClasses, tokens: Axis) -> Block:
    nodes = tuple(node for segment in group for node in segment.nodes)
    found = _attentions_of(nodes, classes, tokens)
    found = tuple(replace(attention, direct=_direct(attention, nodes, [group[0].start])) for attention in found)
    module = min((s.module for s in group if s.module), key=len, default="")
    names = tuple(n.name for n in nodes)
    read = set().union(*map(parameters, group))
    projections = find_projections(found, nodes)
    return Block(index, module, group[0].start.name, group[-1].end.name, names, found, projections, tuple(sorted(read)))


def _attentions_of(nodes: Sequence[fx.Node], classes: AxisClasses, tokens: Axis) -> tuple[Attention, ...]:
    return tuple(
        attention
        for mixing in token_mixes(nodes, classes, tokens)
        if (attention := as_attention(mixing, classes, tokens)) is not None
    )

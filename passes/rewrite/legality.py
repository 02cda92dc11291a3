"""What must hold before rows may be dropped inside a block: every operator on the token axis and on the batch axis is
understood, and a row depends on no row of another sample.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tokgraph.errors import IllegalRewriteError
from tokgraph.ir.blocks import Block
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import (
    ancestors,
    axis_arguments,
    by_name,
    is_write,
    module_path,
    output_args,
    rank,
    same_sizes,
    sizes_of,
    tensor,
    tensor_inputs,
    value,
    where,
)

from ..analysis.attentions import TokenMix, token_mixes
from ..analysis.axes import AxisClasses
from ..analysis.flow import computed_from
from ..rules import axis_map, has_rule, traits
from ..rules.registry import Axis, is_one

aten = torch.ops.aten
_WHY = {
    "attention": "is an attention that tokgraph does not recognise",
    "softmax": "normalises over the token axis outside an attention that tokgraph recognises",
    "contraction": "sums over the token axis outside an attention that tokgraph recognises",
    "reduction": "reduces over the token axis",
    "scan": "runs along the token axis",
    "window": "mixes neighbouring tokens (a convolution or pooling over the token axis)",
    "order": "reads or writes tokens by order or index",
    "layout": "splits, merges, cuts or joins the token axis",
}

_FOR_GOOD = ("scan", "window")
"""Mixes that no rule of another operator could make an attention of: they are said first (gated delta nets)."""
_WHY_SAMPLES = {
    "attention": "lets samples attend to one another",
    "softmax": "normalises over the batch axis",
    "contraction": "sums over the batch axis",
    "reduction": "reduces over the batch axis",
    "scan": "runs along the batch axis",
    "window": "mixes neighbouring samples",
    "order": "reads or writes samples by order or index",
    "layout": "splits, merges, cuts or joins the batch axis",
}


def check_blocks(graph: fx.Graph, facts: TaskFacts, blocks: Sequence[Block], frozen: Collection[int] = ()) -> None:
    """Check that rows can be dropped in the given blocks.

    Args:
        graph: the captured graph.
        facts: its facts.
        blocks: the blocks in which rows are dropped.
        frozen: numbers of those in which dropped rows still serve as keys and values.

    Raises:
        IllegalRewriteError: an operator there has no rule, mixes tokens other than by attention, or mixes samples; or the
            axes of an attention, or the keys of frozen rows, are not what dropping needs; or a buffer is written from rows
            there.
    """
    nodes = by_name(graph)
    _check_writes(graph, facts, blocks)
    classes = AxisClasses(graph)
    tokens, samples = (nodes[facts.entry], 1), (nodes[facts.entry], 0)
    for block in blocks:
        inside = [nodes[name] for name in block.nodes]
        mixes = token_mixes(inside, classes, tokens)
        _check_mixes(facts, block, [mixing for mixing in mixes if mixing.mix.kind in _FOR_GOOD])
        _check_rules(facts, block, inside)
        _check_state(facts, block, nodes)
        _check_order(facts, block, nodes, classes, tokens)
        _check_beside(facts, block, nodes)
        _check_mixes(facts, block, mixes)
        for mixing in token_mixes(inside, classes, samples) if not is_one(*samples) else ():
            raise IllegalRewriteError(
                f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: {mixing.node.target} "
                f"{_WHY_SAMPLES[mixing.mix.kind]}, and each sample drops tokens at places of its own",
                where=where(mixing.node),
                help="choose a span without this block, or keep operators that mix samples out of the decoder blocks",
            )
        _check_followed(facts, block, [*(nodes[name] for name in block.before), *inside], classes, (tokens, samples))
        _check_attention(facts, block, nodes, block.index in frozen)


def _check_mixes(facts: TaskFacts, block: Block, mixes: Sequence[TokenMix]) -> None:
    """Check that tokens are mixed by the block's attention alone."""
    attention = {k.user for a in block.attention for k in a.keys}
    for mixing in mixes:
        if mixing.node.name not in attention:
            if _counts_out(mixing.node):
                raise _counted_out(facts, block, mixing.node)
            raise IllegalRewriteError(
                f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: {mixing.node.target} "
                f"{_WHY[mixing.mix.kind]}",
                where=where(mixing.node),
                help="choose a span without this block, or keep such operators out of the decoder blocks",
            )


def _counts_out(node: fx.Node) -> bool:
    """Whether values say how many rows a node takes."""
    before = [free_unbacked_symbols(x) for source in tensor_inputs(node) if (x := tensor(source)) is not None]
    result = tensor(node)
    return result is not None and not free_unbacked_symbols(result) <= set().union(*before)


def _counted_out(facts: TaskFacts, block: Block, taken: fx.Node) -> IllegalRewriteError:
    """Why no rows can be dropped around a node that takes as many as values say."""
    return IllegalRewriteError(
        f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: how many rows {taken.target} takes depends on "
        "values of the batch, and what is made of them is not put back row by row",
        where=where(taken),
        help="put what is made of each row back at its place (docs/rules.md, 'Experts of modalities'), or compute it for all "
        "rows and choose with torch.where; or choose a span without this block",
    )


def _check_writes(graph: fx.Graph, facts: TaskFacts, blocks: Sequence[Block]) -> None:
    """Check that no buffer is written from rows of the given blocks: a forward that has fewer of them writes another value.

    What only a write needs is computed beside the blocks; it matters what it reads of them.
    """
    writes = [node for node in graph.nodes if is_write(node)]
    owners = {name: block for block in blocks for name in (*block.before, *block.nodes, *block.after)}
    reached = ancestors(output_args(graph)) if writes else set()
    last = {x for block in blocks for x in block.after} - {x for block in blocks for x in block.before}
    for write in writes:
        beside = {node for node in ancestors([write]) if node not in reached}
        for reader, read in ((node, x) for node in beside for x in node.all_input_nodes if x.name in owners):
            block = owners[read.name]
            put_back = read.name in last and not module_path(reader).startswith(block.module or " ")
            if read not in beside and not put_back:
                raise IllegalRewriteError(
                    f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: a buffer is written from its rows",
                    where=where(reader),
                    help="choose a span without this block, or capture the model in eval mode",
                )


def _check_state(facts: TaskFacts, block: Block, nodes: dict[str, fx.Node]) -> None:
    """Check that rows that do not change fit in behind the block."""
    for before, after in zip(block.before, block.after, strict=True):
        x, y = tensor(nodes[before]), tensor(nodes[after])
        if x is None or y is None:
            continue
        if x.dtype != y.dtype or not same_sizes(sizes_of(x)[2:], sizes_of(y)[2:]):
            raise IllegalRewriteError(
                f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: its rows are {tuple(x.shape[2:])} of "
                f"{x.dtype} before it and {tuple(y.shape[2:])} of {y.dtype} behind it, so that none can go past it unchanged",
                where=where(nodes[after]),
                help="choose a span without this block",
            )


def _check_order(facts: TaskFacts, block: Block, nodes: dict[str, fx.Node], classes: AxisClasses, tokens: Axis) -> None:
    """Check that the rows before the block stand where their tokens do: masks do not tell that they were turned around."""
    made = computed_from([tokens[0]])
    for node in ancestors([nodes[name] for name in block.before]) & made:
        if traits(node.target).turns:
            x = node.args[0]
            assert isinstance(x, fx.Node)
            dims = axis_arguments(node, x, "dim", "dims") or range(rank(x))
            if any(classes.same((x, axis), tokens) for axis in dims):
                raise IllegalRewriteError(
                    f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: {node.target} before it moves "
                    "rows to places of other tokens",
                    where=where(node),
                    help="choose a span before that, or leave the order of tokens as it is between layers",
                )


def _check_beside(facts: TaskFacts, block: Block, nodes: dict[str, fx.Node]) -> None:
    """Check that nothing beside the streams is made of rows that are not there, or that it is a mean, of those that are."""
    for name in block.beside:
        raise IllegalRewriteError(
            f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: a later block reads what its attention "
            "makes, past the residual stream, and dropped tokens have none",
            where=where(nodes[name]),
            help="choose a span without this block",
        )
    for side in block.sides:
        if side.why:
            raise IllegalRewriteError(
                f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: {nodes[side.reader].target} reads "
                f"rows of it beside the decoder and {side.why}",
                where=where(nodes[side.reader]),
                help="let the loss read a mean over rows, which is then one over those that are kept, or no rows inside the "
                "span; or choose a span without this block",
            )


def _check_rules(facts: TaskFacts, block: Block, inside: list[fx.Node]) -> None:
    for node in inside:
        if isinstance(value(node), torch.SymInt) and tensor_inputs(node) and free_unbacked_symbols(value(node)):
            raise _counted_out(facts, block, tensor_inputs(node)[0])
        if not has_rule(node) and tensor_inputs(node):
            raise IllegalRewriteError(
                f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: {node.target} has no token-axis rule",
                where=where(node),
                help="add a rule (CONTRIBUTING.md, 'How to add an op rule'), or choose a span without this block",
            )


def _check_followed(
    facts: TaskFacts, block: Block, inside: list[fx.Node], classes: AxisClasses, axes: Sequence[Axis]
) -> None:
    """Every token or batch axis that an operator reads is followed to its result, or said to be mixed.

    Args:
        facts: the task's facts.
        block: the block.
        inside: the stream before it, and its nodes.
        classes: the graph's axes.
        axes: the token and the batch axis of the stream.
    """
    known = set(inside)
    for node in inside[1:]:
        described = axis_map(node) if tensor(node) is not None and not traits(node.target).shape_only else None
        if described is None:
            continue
        said = {source for rows in described.rows for source in rows or ()}
        said |= {source for _, source in described.aligned} | {axis for mix in described.mixes for axis in mix.axes}
        for x in tensor_inputs(node):
            read = [(x, a) for axis in axes for a in classes.of(x, axis)] if x in known else []
            if any(axis not in said and not is_one(*axis) for axis in read):
                raise IllegalRewriteError(
                    f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: the rule of {node.target} does "
                    "not say what it does to the token or the batch axis of its input",
                    where=where(node),
                    help="let the rule name the axis among its rows or its mixes, or choose a span without this block",
                )


def _check_attention(facts: TaskFacts, block: Block, nodes: dict[str, fx.Node], frozen: bool) -> None:
    for attention in block.attention:
        operands = [
            k for k in attention.keys if k.role == "scores" or (k.role == "value" and attention.kind == "eager")
        ]
        if attention.batch is None or any(k.batch is None for k in operands):
            raise IllegalRewriteError(
                f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: which axes of its attention index "
                "samples and tokens cannot be told",
                where=where(nodes[attention.node]),
                help="let every operand of the attention have one axis for the samples, and queries, keys and values be rows "
                "of the residual stream; or choose a span without this block",
            )
        if frozen and not attention.direct:
            raise IllegalRewriteError(
                f"task {facts.name!r}: mode 'freeze' keeps dropped rows as keys and values as they are before block "
                f"{block.index}, but this attention reads what the block has added to them already",
                where=where(nodes[attention.node]),
                help="use mode 'hide', or choose a span without this block",
            )

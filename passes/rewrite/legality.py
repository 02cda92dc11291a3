"""What must hold before rows may be dropped inside a block: every operator on the token axis is understood."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tokgraph.errors import IllegalRewriteError
from tokgraph.ir.facts import Block, TaskFacts
from tokgraph.ir.node import by_name, tensor_inputs, where

from ..analysis.axes import AxisClasses
from ..analysis.blocks import token_mixes
from ..rules import has_rule

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


def check_blocks(graph: fx.Graph, facts: TaskFacts, blocks: Sequence[Block]) -> None:
    """Check that rows can be dropped in the given blocks.

    Raises:
        IllegalRewriteError: an operator there has no rule, or mixes tokens other than by attention.
    """
    nodes = by_name(graph)
    classes = AxisClasses(graph)
    tokens = (nodes[facts.entry], 1)
    for block in blocks:
        inside = [nodes[name] for name in block.nodes]
        _check_rules(facts, block, inside)
        attention = {k.user for a in block.attention for k in a.keys}
        for mixing in token_mixes(inside, classes, tokens):
            if mixing.node.name not in attention:
                raise IllegalRewriteError(
                    f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: {mixing.node.target} "
                    f"{_WHY[mixing.mix.kind]}",
                    where=where(mixing.node),
                    help="choose a span without this block, or keep such operators out of the decoder blocks",
                )


def _check_rules(facts: TaskFacts, block: Block, inside: list[fx.Node]) -> None:
    for node in inside:
        if not has_rule(node) and tensor_inputs(node):
            raise IllegalRewriteError(
                f"task {facts.name!r}: tokens cannot be dropped in block {block.index}: {node.target} has no token-axis rule",
                where=where(node),
                help="add a rule (CONTRIBUTING.md, 'How to add an op rule'), or choose a span without this block",
            )

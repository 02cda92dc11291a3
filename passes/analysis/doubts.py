"""Doubts whether blocks are layers: a module says that a layer begins earlier or goes on longer, or that items of the layers'
list are none of the blocks, or are parts of one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import permutations

from torch import fx

from tokgraph.ir.blocks import Block
from tokgraph.ir.node import ancestors, by_name, module_path, tensor

from ..rules import traits
from ..rules.registry import Axis
from .axes import AxisClasses
from .cuts import within
from .flow import computed_from
from .units import list_of


@dataclass(frozen=True)
class Doubt:
    """Why a block may be no layer.

    Args:
        block: the block.
        node: where its layer is otherwise.
        why: what is there.
    """

    block: Block
    node: fx.Node
    why: str


def find_doubt(
    graph: fx.Graph, blocks: Sequence[Block], classes: AxisClasses, tokens: Axis, behind: Collection[str] = ()
) -> Doubt | None:
    """The first reason why blocks are not the layers of a decoder; ``None`` where modules say nothing against it.

    Args:
        graph: the graph.
        blocks: its blocks.
        classes: its axes.
        tokens: the token axis.
        behind: modules of attentions of layers behind the decoder's last, which are no blocks.
    """
    live = ancestors([graph.output_node()])
    rows = [node for node in graph.nodes if node in live and tensor(node) is not None and classes.of(node, tokens)]
    nodes = by_name(graph)
    return (
        _begins_earlier(blocks[0], rows, nodes)
        or _ends_outside(blocks, nodes)
        or _no_block(blocks, rows, live, nodes, {item_of(module) for module in behind})
        or _parts(blocks, rows, nodes)
    )


def _begins_earlier(first: Block, rows: Sequence[fx.Node], nodes: dict[str, fx.Node]) -> Doubt | None:
    """The first layer computes what counts as the state before it, other than by a copy."""
    above, item = ancestors([nodes[name] for name in first.before]), item_of(first.module)
    for node in rows if item else ():
        if node in above and within(node, item) and not traits(node.target).copies:
            why = f"the first layer begins at {node.name} already, before what plays the role of that which enters the others"
            return Doubt(first, node, why)
    return None


def _ends_outside(blocks: Sequence[Block], nodes: dict[str, fx.Node]) -> Doubt | None:
    """The last layer ends behind its module, where those before it end in theirs: what follows it looks like its end."""
    *others, last = blocks
    for role, name in enumerate(last.after) if others and item_of(last.module) else ():
        inside = (within(nodes[block.after[role]], item_of(block.module) or block.module) for block in others)
        if not within(nodes[name], item_of(last.module)) and all(inside):
            return Doubt(
                last, nodes[name], f"the last layer ends in another way than those before it, {name} is behind it"
            )
    return None


def _no_block(
    blocks: Sequence[Block],
    rows: Sequence[fx.Node],
    live: set[fx.Node],
    nodes: dict[str, fx.Node],
    behind: Collection[str],
) -> Doubt | None:
    """An item of the layers' own list works on tokens, or on what blocks make of them, and is no block, nor behind them."""
    lists = {item_of(block.module).rpartition(".")[0] for block in blocks} - {""}
    reached = (computed_from([nodes[blocks[0].start]]) | set(rows)) & live
    for node in nodes.values() if lists else ():
        path = module_path(node).split(".") if node in reached else []
        for at, part in enumerate(path):
            item = ".".join(path[: at + 1])
            listed = part.isdigit() and ".".join(path[:at]) in lists and item not in behind
            if listed and not any((block.module + ".").startswith(item + ".") for block in blocks):
                return Doubt(blocks[-1], node, f"{item} is an item of the layers' list, and no block")
    return None


def _parts(blocks: Sequence[Block], rows: Sequence[fx.Node], nodes: dict[str, fx.Node]) -> Doubt | None:
    """A module of the layers' list holds several blocks, and what works on tokens beside them."""
    items = [item_of(block.module) for block in blocks]
    for one, other in permutations(zip(items, blocks, strict=True), 2):
        if one[0] and (other[1].module + ".").startswith(one[0] + ".") and one[0] != item_of(other[1].module):
            return Doubt(other[1], nodes[other[1].end], f"two blocks lie in {one[0]}")
    outer = [".".join(item.split(".")[: len(list_of(item).split(".")) + 1]) for item in items]
    for item in dict.fromkeys(name for name in outer if 1 < outer.count(name) < len(outer)):
        for node in rows:
            if within(node, item) and not any(within(node, mine) for mine in items if mine):
                return Doubt(
                    blocks[outer.index(item)], node, f"several blocks lie in {item}, which does more than run them"
                )
    return None


def item_of(module: str) -> str:
    """The innermost item of a list that a module is or lies in; empty where it is in none, and may hold more than a layer."""
    path = module.split(".")
    return ".".join(path[: max((at + 1 for at, part in enumerate(path) if part.isdigit()), default=0)])

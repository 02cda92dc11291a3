"""Queries of dropped rows that cannot be removed get something to see: a softmax over no key at all is NaN.

Mostly push-down removes the queries of the rows that a block drops. Where an operator keeps it from that they are computed,
and nobody reads what becomes of them. Among the keys that are left they may see none, as where an image begins the sequence,
all of it is hidden and the mask is causal; gradients would then be zero times NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from tokgraph.ir.blocks import Attention
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, by_name, rank, set_argument

from ..emitter import Emitter
from ..rules.registry import is_one
from .row_space import laid_out
from .wants import Along, Selections, selections

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


def let_left_queries_see(emit: Emitter, facts: TaskFacts, hidden: Mapping[int, Sequence[fx.Node]]) -> None:
    """Let queries of dropped rows that push-down is going to leave see all keys that are left.

    Args:
        emit: where nodes go, into a seeded graph.
        facts: the task's facts.
        hidden: number of a block -> the indices, outermost first, of the rows that are keys there.
    """
    nodes = by_name(emit.graph)
    found = selections(emit.graph) if hidden else Selections()
    for number, kept in hidden.items():
        for attention in facts.blocks[number].attention:
            node = nodes.get(attention.node)
            if node in found.live and not _removed(found, node, attention, kept):
                _see(emit, nodes[facts.entry], node, attention, kept)


def _removed(found: Selections, node: fx.Node, attention: Attention, kept: Sequence[fx.Node]) -> bool:
    """Whether push-down computes an attention for the given rows, or some of them, only."""
    assert attention.batch is not None  # checked before
    chain = found.own.get(node, {}).get(Along(rank(node) - 2, attention.batch), ())
    return len(chain) >= len(kept) and all(a is b for a, b in zip(chain, kept, strict=False))


def _see(emit: Emitter, entry: fx.Node, node: fx.Node, attention: Attention, kept: Sequence[fx.Node]) -> None:
    """Take the mask away from the queries of all rows but the given ones."""
    fused = attention.kind == "sdpa"
    mask: fx.Node | None = argument(node, "attn_mask" if fused else "self")
    if mask is None or is_one(mask, rank(mask) - 2) or node.target is tokgraph.softmax_beside.default:
        return  # they see what others see, or a column of their own
    assert attention.batch is not None
    rows = _among(emit, entry, kept)
    for axis in (1, 3):
        rows = emit.call(aten.unsqueeze.default, rows, axis, origin=node)
    rows = laid_out(emit, rows, rank(node), attention.batch)
    if mask.meta["val"].dtype is torch.bool:
        others = emit.call(aten.logical_not.default, rows, origin=node)
        seen = emit.call(aten.logical_or.default, mask, others, origin=node)
    else:
        seen = emit.call(aten.where.ScalarOther, rows, mask, 0.0, origin=node)
    if fused:
        set_argument(node, "attn_mask", seen)
    else:
        node.update_arg(0, seen)


def _among(emit: Emitter, entry: fx.Node, kept: Sequence[fx.Node]) -> fx.Node:
    """``[batch, tokens]`` bool: the rows that are left by one index after the other."""
    rows = emit.call(aten.ones_like.default, kept[-1], dtype=torch.bool, origin=entry)
    for number in reversed(range(len(kept))):
        if number:
            around = emit.call(aten.zeros_like.default, kept[number - 1], dtype=torch.bool, origin=entry)
        else:
            sizes = [emit.size(entry, axis) for axis in (0, 1)]
            around = emit.call(aten.new_zeros.default, entry, sizes, dtype=torch.bool, origin=entry)
        rows = emit.call(tokgraph.restore.default, around, rows, kept[number], origin=entry)
    return rows

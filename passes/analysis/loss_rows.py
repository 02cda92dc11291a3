"""The rows of a task's loss: its logits and labels one step before batch and tokens are merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.ir.node import argument, rank, tensor

from ..rules import traits
from ..rules.registry import first_input

aten = torch.ops.aten


@dataclass(frozen=True)
class LossRows:
    """The rows of a cross entropy, before batch and tokens are merged.

    Args:
        loss: the loss node.
        logits: ``[batch, tokens, classes]`` or ``[batch, classes, tokens]``.
        axis: token axis of the logits.
        logits_user: node that reads them (a view that merges, or the loss).
        targets: ``[batch, tokens]`` labels.
        targets_user: node that reads the labels.
    """

    loss: fx.Node
    logits: fx.Node
    axis: int
    logits_user: fx.Node
    targets: fx.Node
    targets_user: fx.Node


def loss_rows(node: fx.Node) -> LossRows | None:
    """The rows of a cross entropy whose batch and token axes are still apart one step before it."""
    if node.target is not aten.cross_entropy_loss.default or argument(node, "reduction", 1) == 0:
        return None
    logits, targets = node.args[:2]
    assert isinstance(logits, fx.Node)
    assert isinstance(targets, fx.Node)
    val = tensor(targets)
    if val is None or val.is_floating_point():
        return None
    if rank(logits) == 3 and rank(targets) == 2:
        return LossRows(node, logits, 2, node, targets, node)
    merged, labels = _view_behind(logits), _view_behind(targets)
    if merged is None or labels is None:
        return None
    x, y = first_input(merged), first_input(labels)
    if rank(merged) == 2 and rank(x) == 3 and rank(labels) == 1 and rank(y) == 2:
        return LossRows(node, x, 1, merged, y, labels)
    return None


def _view_behind(node: fx.Node) -> fx.Node | None:
    while traits(node.target).copies:
        node = first_input(node)
    return node if traits(node.target).reshape else None

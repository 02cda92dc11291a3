"""The rows of a task's loss: its logits and labels one step before batch and tokens are merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.ir.node import argument, dims, rank, same_size, tensor

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
        targets: ``[batch, tokens]`` labels.
    """

    loss: fx.Node
    logits: fx.Node
    axis: int
    targets: fx.Node


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
        return LossRows(node, logits, 2, targets)
    merged, labels = _view_behind(logits), _view_behind(targets)
    if merged is None or labels is None:
        return None
    x, y = first_input(merged), first_input(labels)
    if rank(x) == 3 and rank(y) == 2 and _merges_rows(merged, x) and _merges_rows(labels, y) and _alike(x, y):
        return LossRows(node, x, 1, y)
    return None


def _view_behind(node: fx.Node) -> fx.Node | None:
    while traits(node.target).copies:
        node = first_input(node)
    return node if traits(node.target).reshape else None


def _merges_rows(view: fx.Node, x: fx.Node) -> bool:
    """Whether a view merges the first two axes of its input and leaves the others alone."""
    (first, second, *rest), (merged, *others) = dims(x), dims(view)
    return len(rest) == len(others) and same_size(merged, first * second) and all(map(same_size, rest, others))


def _alike(logits: fx.Node, targets: fx.Node) -> bool:
    """Whether there is a label for every row."""
    return all(map(same_size, dims(logits)[:2], dims(targets)))

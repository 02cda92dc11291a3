"""Losses of every row (``reduction="none"``) written with row-wise operators, and label smoothing with them.

torch.export keeps a cross entropy whole, which is what analysis wants of one that returns a number. Of one that returns a
loss for every row it writes down a value without axes, and a ``view`` of it cannot be traced at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def row_losses() -> dict[Any, Callable[..., Any]]:
    """Operator -> what it is in plain operators, as ``run_decompositions`` takes it; others than losses of rows stay."""
    return {aten.cross_entropy_loss.default: _cross_entropy, aten.nll_loss_nd.default: _negative_log_likelihood}


def _cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    if reduction != 0:
        return NotImplemented
    if target.is_floating_point():
        return soft_rows(x, target, weight, label_smoothing)
    return cross_entropy_rows(x, target, weight, ignore_index, label_smoothing)


def _negative_log_likelihood(
    x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1, ignore_index: int = -100
) -> Any:
    return likelihood_rows(x, target, weight, ignore_index) if reduction == 0 else NotImplemented


def smoothed_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """A cross entropy with label smoothing, of which converters know no more than that without."""
    if label_smoothing == 0 or target.is_floating_point():
        return NotImplemented
    rows = cross_entropy_rows(x, target, weight, ignore_index, label_smoothing)
    if reduction == 0:
        return rows
    if reduction == 2:
        return rows.sum()
    read, safe = _read(target, ignore_index)
    counts = read.to(rows.dtype) if weight is None else torch.where(read, label_weights(weight, safe), 0.0)
    return rows.sum() / counts.sum()


def cross_entropy_rows(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The cross entropy of every row, 0 where the label is ignored.

    Args:
        x: logits, of the shape of ``logs`` of :func:`likelihood_rows`; the other arguments are as there.
        target: the labels.
        weight: of classes.
        ignore_index: the label of rows that do not count.
        label_smoothing: the share of the probability that all classes have alike.
    """
    logs = aten.log_softmax.int(x, _classes(x))
    likely = likelihood_rows(logs, target, weight, ignore_index)
    if label_smoothing == 0:
        return likely
    smooth = smooth_rows(logs, target, weight, ignore_index)
    return likely * (1 - label_smoothing) + smooth * (label_smoothing / x.shape[_classes(x)])


def soft_rows(x: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """The cross entropy of every row with the probabilities of its classes.

    Args:
        x: logits, ``[rows, classes]`` or ``[batch, classes, rows...]``, or ``[classes]``.
        target: probabilities, of the same shape.
        weight: ``[classes]``.
        label_smoothing: the share of the probability that all classes have alike.
    """
    axis = _classes(x)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / x.shape[axis]
    losses: Tensor = aten.log_softmax.int(x, axis) * target
    if weight is not None:
        losses = losses * weight.view([-1] + [1] * (x.dim() - 1 - axis))
    return -losses.sum(axis)


def likelihood_rows(logs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The negative log-likelihood of every row, 0 where the label is ignored.

    Args:
        logs: ``[rows, classes]`` or ``[batch, classes, rows...]`` log-probabilities, or ``[classes]``.
        target: the labels, the shape of ``logs`` without classes, int64.
        weight: ``[classes]``.
        ignore_index: the label of rows that do not count.
    """
    axis, read, safe = _classes(logs), *_read(target, ignore_index)
    picked = -logs.gather(axis, safe.unsqueeze(axis)).squeeze(axis)
    if weight is not None:
        picked = picked * label_weights(weight, safe)
    return torch.where(read, picked, 0.0)


def smooth_rows(logs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The sum over classes that label smoothing adds to every row, 0 where the label is ignored; arguments as above."""
    axis = _classes(logs)
    if weight is not None:
        logs = logs * weight.view([-1] + [1] * (logs.dim() - 1 - axis))
    return torch.where(target != ignore_index, -logs.sum(axis), 0.0)


def label_weights(weight: Tensor, target: Tensor) -> Tensor:
    """The class weight of every label."""
    return weight.index_select(0, target.reshape(-1)).reshape(target.shape)


def _read(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Where a label counts, and the labels with a class in place of those that do not."""
    read = target != ignore_index
    return read, torch.where(read, target, 0)


def _classes(x: Tensor) -> int:
    return 1 if x.dim() > 1 else 0

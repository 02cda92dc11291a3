"""Averages over the rows of several tensors, which may be weighed: what a loss over the routers of all layers is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import NAMESPACE

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _mean_of_rows(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The mean over the rows of all tensors, one tensor after the other: nothing of the size of all is made.

    Args:
        rows: ``[n, ...]`` each, of one type and of one shape but for ``n``.
        weights: ``[n]`` for each, or none: every row counts once.

    Returns:
        ``[...]``: the sum of all rows, times their weights, divided by the sum of the weights.
    """
    if weights:
        shape = [-1, *[1] * (rows[0].dim() - 1)]
        rows = [x * w.reshape(shape) for x, w in zip(rows, weights, strict=True)]
    return _sum([x.sum(0) for x in rows]) / _count(rows, weights)


def _class_shares(classes: Sequence[Tensor], weights: Sequence[Tensor], bins: int, dtype: torch.dtype) -> Tensor:
    """How often each class is chosen, on average over the rows of all tensors.

    Args:
        classes: int64 ``[n, choices]`` each; without weights, others than ``0 .. bins - 1`` do not count.
        weights: ``[n]`` for each, or none: every row counts once.
        bins: the number of classes.
        dtype: of the result.

    Returns:
        ``[bins]``; its sum is the number of choices of a row.
    """
    return _shares(_counted_once, classes, weights, bins, dtype)


def _lowered_class_shares(
    classes: Sequence[Tensor], weights: Sequence[Tensor], bins: int, dtype: torch.dtype
) -> Tensor:
    """The same without a histogram, which not every runtime has."""
    return _shares(_compared, classes, weights, bins, dtype)


def _shares(
    once: Callable[[Tensor, int], Tensor],
    classes: Sequence[Tensor],
    weights: Sequence[Tensor],
    bins: int,
    dtype: torch.dtype,
) -> Tensor:
    if not weights:
        return _sum([once(x, bins).to(dtype) for x in classes]) / _count(classes, weights)
    zeros = classes[0].new_zeros(bins, dtype=dtype)
    counted = [
        zeros.scatter_add(0, x.reshape(-1), w.to(dtype).unsqueeze(-1).expand(x.shape).reshape(-1))
        for x, w in zip(classes, weights, strict=True)
    ]
    return _sum(counted) / _count(classes, weights)


def _counted_once(classes: Tensor, bins: int) -> Tensor:
    """``[bins]``: a histogram, which does not wait for the device; in the types that have a deterministic one."""
    counting = torch.float32 if classes.device.type in ("cpu", "mps") else torch.int32
    return torch.histc(classes.reshape(-1).to(counting), bins=bins, min=0, max=bins)


def _compared(classes: Tensor, bins: int) -> Tensor:
    return (classes.reshape(-1, 1) == torch.arange(bins, device=classes.device)).sum(0)


def _count(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor | int:
    return _sum([w.sum() for w in weights]) if weights else sum(x.shape[0] for x in rows)


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for x in values[1:]:
        total = total + x
    return total


_LIBRARY.define("mean_of_rows(Tensor[] rows, Tensor[] weights) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "class_shares(Tensor[] classes, Tensor[] weights, int bins, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("mean_of_rows", _mean_of_rows, "CompositeImplicitAutograd")
_LIBRARY.impl("class_shares", _class_shares, "CompositeImplicitAutograd")

LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.tokgraph.mean_of_rows.default: _mean_of_rows,
    torch.ops.tokgraph.class_shares.default: _lowered_class_shares,
}
"""Operator -> the plain ATen function it is."""

AVERAGES = frozenset(LOWERED)

"""What the operators share: the namespace, checks on a batch, indices as ``gather`` takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokgraph.errors import BatchError, Where

NAMESPACE = "tokgraph"


LIKE_THE_EXAMPLE = "make the batch like the example batch of the task, or optimize for this one"


@dataclass(frozen=True)
class Condition:
    """What an operator asks of a batch, apart from the operator: for runtimes in which it cannot raise.

    Args:
        holds: a plain ATen function of the operator's arguments, a bool scalar tensor: whether the operator would not raise.
        says: what it says otherwise, from the same arguments, of which tensors may have no values.
    """

    holds: Callable[..., Tensor]
    says: Callable[..., str]


def require(ok: Tensor, message: str, help: str = LIKE_THE_EXAMPLE, where: Where | None = None) -> None:
    """Raise on the CPU, assert asynchronously on a device: ``ok`` is a boolean scalar tensor."""
    if ok.device.type == "meta":
        return
    if ok.device.type == "cpu":
        if not bool(ok):
            raise BatchError(message, where=where, help=help)
    else:
        torch._assert_async(ok, message)


def expand_index(index: Tensor, shape: torch.Size, dim: int, batch_dim: int) -> Tensor:
    """``[batch, rows]`` index -> the index that ``gather`` along ``dim`` of a tensor of ``shape`` needs."""
    view = [1] * len(shape)
    view[batch_dim], view[dim] = index.shape
    sizes = list(shape)
    sizes[dim] = index.shape[1]
    rows = index if batch_dim < dim else index.t()
    return rows.reshape(view).expand(sizes)


def true_rows(mask: Tensor, count: int) -> Tensor:
    """``[batch, count]`` int64, ascending: the first ``count`` true positions of ``mask``, filled up with false ones."""
    first = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    return first[:, :count].sort(dim=1).values


def rank_of(valid: Tensor) -> Tensor:
    """``[batch, m]`` int64: how many true positions lie before, where ``valid`` is true, else 0."""
    return (valid.to(torch.int64).cumsum(1) - 1).clamp(min=0) * valid

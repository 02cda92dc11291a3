"""Operators that make masks over the token axis: ranges, demanded rows, the last prompt token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import NAMESPACE


def _range_mask(like: Tensor, start: int, stop: int) -> Tensor:
    at = torch.arange(like.shape[1], device=like.device)
    return ((at >= start) & (at < stop)).unsqueeze(0).expand(like.shape[0], -1).clone()


def _demand_mask(visual: Tensor, reads: str) -> Tensor:
    read = visual if reads == "visual" else ~visual
    return read | F.pad(read[:, 1:], (0, 1), value=False)


def _prompt_mask(targets: Tensor, like: Tensor, ignore_index: int, first: int) -> Tensor:
    labelled = targets != ignore_index
    end = torch.where(labelled.any(1), labelled.to(torch.uint8).argmax(1), targets.shape[1] - 1) + first
    return torch.arange(like.shape[1], device=like.device).unsqueeze(0) == end.unsqueeze(1)


@torch.library.custom_op(f"{NAMESPACE}::range_mask", mutates_args=())
def range_mask(like: Tensor, start: int, stop: int) -> Tensor:
    """``[batch, tokens]`` bool, true at positions ``start <= i < stop``; batch and tokens are those of ``like``."""
    return _range_mask(like, start, stop)


@torch.library.custom_op(f"{NAMESPACE}::demand_mask", mutates_args=())
def demand_mask(visual: Tensor, reads: str) -> Tensor:
    """The demanded rows of a next-token loss: rows of the kind it reads, and rows whose successor is of that kind.

    Args:
        visual: ``[batch, tokens]`` bool.
        reads: ``"text"`` or ``"visual"``.
    """
    return _demand_mask(visual, reads)


@torch.library.custom_op(f"{NAMESPACE}::prompt_mask", mutates_args=())
def prompt_mask(targets: Tensor, like: Tensor, ignore_index: int, first: int) -> Tensor:
    """The last prompt token: the row that predicts the first label.

    Args:
        targets: ``[batch, rows]`` int64 labels, already shifted.
        like: ``[batch, tokens, ...]``.
        ignore_index: the label of rows that have none.
        first: position of the labels' first row; a sample without labels has its last row.

    Returns:
        ``[batch, tokens]`` bool, true once in each sample.
    """
    return _prompt_mask(targets, like, ignore_index, first)


@range_mask.register_fake
def _(like: Tensor, start: int, stop: int) -> Tensor:
    return like.new_empty(like.shape[:2], dtype=torch.bool)


@demand_mask.register_fake
def _(visual: Tensor, reads: str) -> Tensor:
    return torch.empty_like(visual)


prompt_mask.register_fake(
    lambda targets, like, ignore_index, first: like.new_empty(like.shape[:2], dtype=torch.bool, requires_grad=False)
)

LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.tokgraph.range_mask.default: _range_mask,
    torch.ops.tokgraph.demand_mask.default: _demand_mask,
    torch.ops.tokgraph.prompt_mask.default: _prompt_mask,
}
"""Operator -> the plain ATen function it is."""

"""Attention weights beside sinks: columns of scores that take their share of the weight and are read by nobody."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import NAMESPACE

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _softmax_beside(scores: Tensor, sinks: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weights of scores over their last axis, with further scores in the sum.

    Args:
        scores: ``[..., keys]``.
        sinks: ``[..., n]``, whose other axes broadcast.
        dtype: what both are cast to first.

    Returns:
        ``[..., keys]``, which sum up to less than 1.
    """
    both = torch.cat([scores, sinks.expand(*scores.shape[:-1], -1)], -1)
    return both.softmax(-1, dtype=dtype)[..., : scores.shape[-1]]


_LIBRARY.define(
    "softmax_beside(Tensor scores, Tensor sinks, ScalarType? dtype=None) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_LIBRARY.impl("softmax_beside", _softmax_beside, "CompositeImplicitAutograd")

LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.tokgraph.softmax_beside.default: _softmax_beside
}
"""Operator -> the plain ATen function it is."""

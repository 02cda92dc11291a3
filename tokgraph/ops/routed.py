"""Rows that are computed where a mask says so and nowhere else, as a choice between two values of every row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import NAMESPACE

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _routed(mask: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """``rows`` where the mask is true, else ``others``: as ``where``, and no other rows of ``rows`` need be computed.

    Args:
        mask: bool, of the rank of ``rows``, with axes of size 1 behind those that count rows.
        rows: ``[..., width]``.
        others: of the same shape and type.
    """
    return torch.where(mask, rows, others)


_LIBRARY.define(
    "routed(Tensor mask, Tensor rows, Tensor others) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.pointwise),
)
_LIBRARY.impl("routed", _routed, "CompositeImplicitAutograd")

LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {torch.ops.tokgraph.routed.default: _routed}
"""Operator -> the plain ATen function it is."""

"""What a write in place becomes in a functional graph: ``copy``, which PyTorch cannot differentiate, in plain operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def copies() -> dict[Any, Callable[..., Any]]:
    """Operator -> what it is in plain operators, as ``run_decompositions`` takes it."""
    return {aten.copy.default: copied}


def copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``source`` in the shape and type of ``into``, whose values are gone: what ``into.copy_(source)`` leaves there."""
    alike = source if source.dtype == into.dtype else source.to(into.dtype)
    return alike if alike.shape == into.shape else alike.expand(into.shape)

"""Operators that PyTorch computes by other operators, where no rule describes them: written with those they are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..rules.registry import entry

aten = torch.ops.aten
_KEPT = frozenset({aten.broadcast_tensors.default})
"""Those that a later pass reads as they are."""


@cache
def composites() -> dict[Any, Callable[..., Any]]:
    """Operator -> what it is in others, as ``run_decompositions`` takes it."""
    return {op: plain for op, plain in torch.export.default_decompositions().items() if _is_opaque(op)}


def _is_opaque(operator: Any) -> bool:
    """Whether an operator has no rule, and what torch computes it by is the same on all devices and for gradients."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
    return composite and operator not in _KEPT and entry(operator) is None

"""Arithmetic of half-precision tensors and numbers as PyTorch does it: in float32, and rounded once.

An operator of ONNX takes operands of one type, so the converter rounds a number to that of the tensor: 1.702 becomes 1.703125
in bfloat16, for every element alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import frexp, isfinite
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
_ELEMENTWISE = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.pow.Tensor_Scalar,
    aten.pow.Scalar,
    aten.addcmul.default,
    aten.addcdiv.default,
    aten.lerp.Scalar,
)


def half_numbers() -> dict[Any, Callable[..., Any]]:
    """Operator -> function of plain operators."""
    return {operator: partial(once_rounded, operator) for operator in _ELEMENTWISE}


def once_rounded(operator: Any, *args: Any, **options: Any) -> Any:
    """An operator in float32 where its tensors are of half precision and one of its numbers would be rounded to that."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    dtypes = {x.dtype for x in tensors if x.dim()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if dtype not in HALF:
        return NotImplemented
    finer = any(not x.dim() and x.dtype in (torch.float32, torch.float64) for x in tensors)
    if not finer and not any(_is_rounded(x, dtype) for x in (*args, *options.values())):
        return NotImplemented
    return operator(*(x.to(torch.float32) if isinstance(x, Tensor) else x for x in args), **options).to(dtype)


def _is_rounded(number: Any, dtype: torch.dtype) -> bool:
    """Whether a number is another one in a type; what a size is in another batch is not known, and taken as it is."""
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not isfinite(number) or not number:
        return False
    about = torch.finfo(dtype)
    digits = frexp(number)[0] * 2 / about.eps
    return digits != round(digits) or not about.tiny <= abs(number) <= about.max

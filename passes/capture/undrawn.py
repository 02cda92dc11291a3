"""Calls without chance: dropout drops nothing, and what draws random numbers gives the same ones, in eager and in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DROPOUT = frozenset(
    "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout feature_dropout_ alpha_dropout alpha_dropout_"
    " feature_alpha_dropout feature_alpha_dropout_ native_dropout".split()
)
_DRAWS = frozenset(
    "rand randn randint rand_like randn_like randint_like normal normal_ uniform_ random_ bernoulli bernoulli_"
    " exponential_ multinomial".split()
)
_ATTENTION = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}
"""Name -> position of ``dropout_p``."""


class Undrawn(TorchFunctionMode):
    """Takes chance out of what runs inside: eager and graph can be compared though they draw in another order."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), _name(func)
        if name in _DROPOUT:
            x = args[0] if args else kwargs["input"]
            return (x, torch.ones_like(x, dtype=torch.bool)) if name == "native_dropout" else x
        if name in _ATTENTION:
            position = _ATTENTION[name]
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs["dropout_p"] = 0.0
        result = func(*args, **kwargs)
        if name in _DRAWS and isinstance(result, torch.Tensor):
            with torch.no_grad():
                result.fill_(0.5 if result.is_floating_point() else 0)
        return result


def _name(func: Any) -> str:
    """``dropout`` of ``F.dropout``, ``torch.dropout`` and ``aten.dropout.default`` alike."""
    return str(getattr(func, "_opname", None) or getattr(func, "__name__", "")).partition(".")[0]

"""Flex attention as its own definition in plain operators: fused attention under the mask that its ``mask_mod`` says.

``flex_attention`` is a kernel that is generated: no graph of plain operators holds it, and on a CPU it has no gradient. What it
computes is defined by two functions of the user's, of one score and its positions. While a task is traced these are applied
to all positions at once, as tensors that broadcast: the mask becomes one that fused attention is given. Its blocks only say
where the mask is empty or full, and are left out. The user's own forward, which the graph is held against, computes by the
kernel on a GPU, and elsewhere by PyTorch's reference, which applies the functions position by position.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_MODULE = "torch.nn.attention.flex_attention"
_KERNEL = "flex_attention_hop"
"""What ``flex_attention`` calls when its arguments are checked."""


@contextmanager
def flex_traced() -> Iterator[None]:
    """While it is entered, flex attention is traced as plain operators."""
    flex = sys.modules.get(_MODULE)
    with ExitStack() as patches:
        patches.enter_context(_instead(_attend))
        if flex is not None:
            patches.enter_context(mock.patch.object(flex, "create_mask", _traced_mask(flex.create_mask)))
        yield


@contextmanager
def flex_with_gradients(device: str) -> Iterator[None]:
    """While it is entered, flex attention has gradients on every type of device; no function runs compiled where the kernel has
    none.
    """
    if device == "cuda" or _MODULE not in sys.modules:
        yield
        return
    from torch._higher_order_ops.flex_attention import math_attention

    def reference(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
        query, key, value = _cast(query, key, value)
        with torch.autocast(query.device.type, enabled=False):  # as the kernel does
            return math_attention(query, key, value, *rest)

    with _instead(reference), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _instead(attend: Callable[..., Any]) -> Iterator[None]:
    """Let flex attention call another function than its kernel."""
    flex = sys.modules.get(_MODULE)
    with ExitStack() as patches:
        if flex is not None:  # else nobody can call it
            patches.enter_context(mock.patch.object(flex, _KERNEL, attend))
            patches.enter_context(mock.patch.object(flex, "_validate_device", return_value=None))
            patches.enter_context(mock.patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True))
        yield


def _traced_mask(create_mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``create_mask``, by which blocks are made, without ``torch.vmap``, which a trace takes for operators of its own."""

    def traced(mod_fn: Any, B: Any, H: Any, Q_LEN: Any, KV_LEN: Any, device: Any = None) -> Tensor:
        if flex._get_mod_type(mod_fn) is not flex._ModificationType.MASK_MOD:
            return create_mask(mod_fn, B, H, Q_LEN, KV_LEN, device)
        sizes = (B or 1, H or 1, Q_LEN, KV_LEN)
        with _Indexing():
            mask: Tensor = mod_fn(*_positions(sizes, device))
            return mask.expand(sizes)

    flex: Any = sys.modules[_MODULE]
    return traced


def _attend(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor], block_mask: tuple[Any, ...], scale: float,
    kernel_options: dict[str, Any], score_buffers: tuple[Any, ...] = (), mask_buffers: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the kernel of flex attention computes.

    Args:
        query: ``[batch, heads, queries, head]``.
        key: ``[batch or 1, key heads, keys, head]``.
        value: ``[batch or 1, key heads, keys, any]``.
        score_mod: ``(score, batch, head, query, key, *score_buffers)`` to a score, of scalars.
        block_mask: the blocks, and last ``mask_mod``: ``(batch, head, query, key, *mask_buffers)`` to a bool.
        scale: factor of the scores.
        kernel_options: how the kernel is to run.
        score_buffers: tensors that ``score_mod`` is given.
        mask_buffers: tensors that ``mask_mod`` is given.

    Returns:
        The rows ``[batch, heads, queries, any]``, 0 where a query sees no key; the logarithm of the sum of exponentials, and
        the largest score, ``[batch, heads, queries]``, both by base 2.
    """
    query, key, value = _cast(query, key, value)
    if key.shape[0] != query.shape[0]:
        key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    at = _positions((query.shape[0], query.shape[1], query.shape[2], key.shape[2]), query.device)
    with _Indexing():
        seen = None if block_mask[-1] is sys.modules[_MODULE].noop_mask else block_mask[-1](*at, *mask_buffers)
        mask = None if seen is None else seen.expand(*seen.shape[:-2], query.shape[2], key.shape[2])
        one = query.new_zeros(())
        plain = score_mod(one, *at, *score_buffers) is one
    fused = None
    if plain:
        fused = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=groups > 1)
        if not kernel_options.get("OUTPUT_LOGSUMEXP") and not kernel_options.get("OUTPUT_MAX"):
            return fused, query.new_empty(0), query.new_empty(0)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if fused is None:
        with _Indexing():
            scores = score_mod(scores, *at, *score_buffers).to(wide)
    found = _weighted(scores, value, mask) if fused is None else fused
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return found, scores.logsumexp(-1) / math.log(2), scores.amax(-1) / math.log(2)


def _cast(*operands: Tensor) -> list[Tensor]:
    """What the kernel is given in a region of autocast."""
    kind = operands[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return list(operands)
    return [x.to(torch.get_autocast_dtype(kind)) for x in operands]


def _positions(sizes: tuple[int, ...], device: torch.device | str | None) -> list[Tensor]:
    """Batch, head, query and key of every score, each along its own of four axes."""
    return [
        torch.arange(size, device=device).reshape([size if place == axis else 1 for place in range(4)])
        for axis, size in enumerate(sizes)
    ]


def _weighted(scores: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The values weighted by a softmax of scores, 0 where a query sees none."""
    if mask is None:
        return scores.softmax(-1).to(value.dtype) @ value
    any_key = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | ~any_key), -math.inf)  # a softmax over no key would be NaN, and its gradients
    return (scores.softmax(-1).to(value.dtype) @ value).masked_fill(~any_key, 0)


class _Indexing(TorchFunctionMode):
    """Lets a tensor be indexed by one position after the other, ``x[batch][query]``, as by all at once, ``x[batch, query]``:
    what positions have indexed begins with their axes, which a further index does not mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self._part: dict[int, tuple[Tensor, Tensor, tuple[Any, ...]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        index = index if isinstance(index, tuple) else (index,)
        whole, before = self._part[id(x)][1:] if id(x) in self._part else (x, ())
        index = (*before, *index)
        found = func(whole, index)
        if any(isinstance(i, Tensor) and i.dim() for i in index) and len(index) < whole.dim():
            self._part[id(found)] = (found, whole, index)  # kept, as another value might take its place
        return found

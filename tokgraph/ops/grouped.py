"""Products of rows with the matrix of their group, as experts that each take some of the tokens: row by row as seen from
outside, sorted by group inside.

In bfloat16 a GPU has one kernel for all groups, which reads where they end from its own memory. For other types PyTorch has
none: it multiplies group by group, of sizes that the host has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .base import NAMESPACE

_FUSED = (torch.float32, torch.bfloat16, torch.float16)
_TAGS = (torch.Tag.cudagraph_unsafe,)  # the host has to know sizes, of all types but bfloat16; a tag is for all


@torch.library.custom_op(f"{NAMESPACE}::grouped_mm", mutates_args=(), tags=_TAGS)
def grouped_mm(x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    """Each row times the matrix of its group.

    Args:
        x: ``[..., k]``.
        weight: ``[groups, k, m]``.
        groups: ``[...]`` integers in ``[0, groups)``, the group of each row.

    Returns:
        ``[..., m]``.
    """
    rows, order, ends = _sorted(x, groups, len(weight))
    if _fused(rows, weight):
        found = F.grouped_mm(rows, _aligned(weight), offs=ends)
    else:
        found = torch.cat([rows[part] @ matrix for part, matrix in zip(_parts(ends), weight, strict=True)])
    return torch.empty_like(found).index_copy(0, order, found).reshape(*x.shape[:-1], weight.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::grouped_mm_weight", mutates_args=(), tags=_TAGS)
def grouped_mm_weight(x: Tensor, grad: Tensor, groups: Tensor, count: int) -> Tensor:
    """The gradient of the matrices of :func:`grouped_mm`, ``[groups, k, m]``.

    Args:
        x: its rows, ``[..., k]``.
        grad: the gradient of its result, ``[..., m]``.
        groups: ``[...]``.
        count: how many groups there are.
    """
    rows, order, ends = _sorted(x, groups, count)
    grads = grad.reshape(-1, grad.shape[-1])[order]
    if _fused(rows, grads):
        found = F.grouped_mm(rows.t(), grads, offs=ends)
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0  # a kernel may leave what was in the memory of such a matrix
        return found.masked_fill_(empty[:, None, None], 0.0)
    return torch.stack([rows[part].T @ grads[part] for part in _parts(ends)])


def _sorted(x: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by group, the order that makes them so, and where each group ends."""
    found = groups.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(found.values, torch.arange(count, device=x.device), right=True, out_int32=True)
    return x.reshape(-1, x.shape[-1])[found.indices], found.indices, ends


def _parts(ends: Tensor) -> Iterator[slice]:
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


def _fused(rows: Tensor, other: Tensor) -> bool:
    """Whether PyTorch has a function for all groups at once: it asks for rows that begin at multiples of 16 bytes."""
    aligned = all(x.shape[-1] * x.element_size() % 16 == 0 for x in (rows, other))
    return rows.device.type in ("cpu", "cuda") and rows.dtype in _FUSED and rows.dtype == other.dtype and aligned


def _aligned(weight: Tensor) -> Tensor:
    """Matrices whose rows, or columns, stand in memory as the function wants them."""
    steps, bytes_ = weight.stride(), weight.element_size()
    dense = 1 in steps[1:] and all(step == 1 or step * bytes_ % 16 == 0 for step in steps)
    return weight if dense and weight.data_ptr() % 16 == 0 else weight.clone(memory_format=torch.contiguous_format)


def _plain(x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    """All rows with all matrices, for runtimes that know no groups."""
    chosen = [groups.unsqueeze(-1) == group for group in range(weight.shape[0])]
    return sum(
        (torch.where(rows, x @ matrix, 0.0) for rows, matrix in zip(chosen, weight, strict=True)), x.new_zeros(())
    )


def _plain_weight(x: Tensor, grad: Tensor, groups: Tensor, count: int) -> Tensor:
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    chosen = [(groups.reshape(-1, 1) == group).to(x.dtype) for group in range(count)]
    return torch.stack([(rows * mine).T @ grads for mine in chosen])


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-1])


@grouped_mm_weight.register_fake
def _(x: Tensor, grad: Tensor, groups: Tensor, count: int) -> Tensor:
    return x.new_empty(count, x.shape[-1], grad.shape[-1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, groups = ctx.saved_tensors
    of_rows, of_weight, _ = ctx.needs_input_grad
    return (
        grouped_mm(grad, weight.transpose(1, 2), groups) if of_rows else None,
        grouped_mm_weight(x, grad, groups, weight.shape[0]) if of_weight else None,
        None,
    )


grouped_mm.register_autograd(_backward, setup_context=_save)


@register_flop_formula([torch.ops.tokgraph.grouped_mm, torch.ops.tokgraph.grouped_mm_weight])
def _flops(x: Any, other: Any, *_: Any, **__: Any) -> Any:
    """A product with one matrix for each row, whichever it is."""
    flops = 2 * other[-1]
    for size in x:
        flops = flops * size
    return flops


LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.tokgraph.grouped_mm.default: _plain,
    torch.ops.tokgraph.grouped_mm_weight.default: _plain_weight,
}
"""Operator -> the plain ATen function it is."""

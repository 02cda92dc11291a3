"""Operators that move rows: select, drop, restore and merge, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import NAMESPACE, expand_index, true_rows


def _for_all(index: Tensor) -> bool:
    """Whether one row of an index serves all samples: whole slices of memory can then be moved.

    Symbols are not asked: the answer would become a guard, and what a trace over symbols makes of an index_copy asks for a
    number of elements, which ONNX has no operator for.
    """
    samples, rows = index.shape
    return isinstance(samples, int) and isinstance(rows, int) and samples == 1


def _select(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    if _for_all(index):
        return x.index_select(dim, index.squeeze(0))
    return x.gather(dim, expand_index(index, x.shape, dim, batch_dim))


def _drop(x: Tensor, keep: Tensor) -> Tensor:
    return _select(x, keep, 1, 0)


def _restore(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    if _for_all(index):
        return x.index_copy(1, index.squeeze(0), rows)
    return x.scatter(1, expand_index(index, x.shape, 1, 0), rows)


def _gaps(index: Tensor, count: int) -> Tensor:
    """``[batch, count]`` int64: the positions below ``count`` plus the index's that are not in it, ascending."""
    taken = torch.zeros(index.shape[0], index.shape[1] + count, dtype=torch.bool, device=index.device)
    return true_rows(~taken.scatter(1, index, True), count)


def _merge(others: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    order = torch.cat([_gaps(index, others.shape[1]), index], 1).argsort(1)
    both = torch.cat([others, rows], 1)
    return both.gather(1, expand_index(order, both.shape, 1, 0))


def _filled(others: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """As :func:`_merge`, by writing into new memory, which compiled graphs must not: they decide on memory themselves."""
    whole = others.new_empty((others.shape[0], others.shape[1] + rows.shape[1], *others.shape[2:]))
    for x, at in ((others, _gaps(index, others.shape[1])), (rows, index)):  # each row is read and written once
        whole.scatter_(1, expand_index(at, x.shape, 1, 0), x)
    return whole


@torch.library.custom_op(f"{NAMESPACE}::select", mutates_args=())
def select(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """Rows ``index`` of ``x`` along ``dim``, per sample.

    Args:
        x: any tensor with a batch axis.
        index: ``[batch, rows]`` int64, unique positions in each row; ``[1, rows]``: those of all samples.
        dim: the token axis of ``x``.
        batch_dim: the batch axis of ``x``.

    Returns:
        ``x`` with ``dim`` narrowed to ``rows``.
    """
    return _select(x, index, dim, batch_dim)


@torch.library.custom_op(f"{NAMESPACE}::drop", mutates_args=())
def drop(x: Tensor, keep: Tensor) -> Tensor:
    """The residual stream without its dropped rows: ``[batch, tokens, hidden]`` -> ``[batch, rows, hidden]``.

    Args:
        x: the residual stream.
        keep: ``[batch, rows]`` int64 positions that stay, ascending; ``[1, rows]``: those of all samples.
    """
    return _drop(x, keep)


@torch.library.custom_op(f"{NAMESPACE}::restore", mutates_args=())
def restore(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """``x`` with its rows ``index`` replaced: dropped rows, unchanged, take their places again.

    Args:
        x: ``[batch, tokens, hidden]``, the residual stream at the start of the span; or ``[batch, tokens]``, a mask.
        rows: ``[batch, rows, hidden]``, the kept rows at its end; or ``[batch, rows]``.
        index: ``[batch, rows]`` int64 positions of ``rows`` in ``x``; ``[1, rows]``: those of all samples.
    """
    return _restore(x, rows, index)


@torch.library.custom_op(f"{NAMESPACE}::merge", mutates_args=())
def merge(others: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Two sets of rows as one: ``rows`` at the positions ``index``, ``others``, in order, at the positions between.

    Args:
        others: ``[batch, m, width]``.
        rows: ``[batch, n, width]``.
        index: ``[batch, n]`` int64, ascending positions below ``m + n``.

    Returns:
        ``[batch, m + n, width]``.
    """
    return _filled(others, rows, index)


def _select_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (index,) = ctx.saved_tensors
    into = grad.new_zeros(ctx.shape)  # filled in place: a scatter that returned another tensor would copy the zeros
    if _for_all(index):
        return into.index_copy_(ctx.dim, index.squeeze(0), grad), None, None, None
    return into.scatter_(ctx.dim, expand_index(index, ctx.shape, ctx.dim, ctx.batch_dim), grad), None, None, None


def _select_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, ctx.dim, ctx.batch_dim = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(index)


def _drop_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _select_setup(ctx, (*inputs, 1, 0), output)


def _drop_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _select_backward(ctx, grad)[0], None


def _restore_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _restore_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    (index,) = ctx.saved_tensors
    rows = _select(grad, index, 1, 0)
    if _for_all(index):
        return grad.index_fill(1, index.squeeze(0), 0.0), rows, None
    return grad.scatter(1, expand_index(index, grad.shape, 1, 0), 0.0), rows, None


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    others, _, index = inputs
    ctx.save_for_backward(_gaps(index, others.shape[1]), index)


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    gaps, index = ctx.saved_tensors
    others, rows = (grad.gather(1, expand_index(at, grad.shape, 1, 0)) for at in (gaps, index))
    return others, rows, None


def _empty_rows(x: Tensor, rows: Any, dim: int = 1) -> Tensor:
    dim %= x.dim()
    return x.new_empty((*x.shape[:dim], rows, *x.shape[dim + 1 :]))


# Shapes alone: tracing what an operator does would cost more, once for every node that a pass makes.
select.register_fake(lambda x, index, dim, batch_dim: _empty_rows(x, index.shape[1], dim))
drop.register_fake(lambda x, keep: _empty_rows(x, keep.shape[1]))
restore.register_fake(lambda x, rows, index: x.new_empty(x.shape))
merge.register_fake(lambda others, rows, index: _empty_rows(others, others.shape[1] + rows.shape[1]))
select.register_autograd(_select_backward, setup_context=_select_setup)
drop.register_autograd(_drop_backward, setup_context=_drop_setup)
restore.register_autograd(_restore_backward, setup_context=_restore_setup)
merge.register_autograd(_merge_backward, setup_context=_merge_setup)

LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.tokgraph.select.default: _select,
    torch.ops.tokgraph.drop.default: _drop,
    torch.ops.tokgraph.restore.default: _restore,
    torch.ops.tokgraph.merge.default: _merge,
}
"""Operator -> the plain ATen function it is."""

"""Operators that move neighbouring rows: what select, restore and merge do where an index is a range.

A range needs no gather: its rows are a slice of memory that is read where it lies, and rows that follow one another are
put together by one concatenation. The operators are made of ATen's own, and so are their gradients. The index is still an
argument: whatever asks which rows a value holds finds it there, and its checks of the batch are made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import NAMESPACE

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _select_range(x: Tensor, index: Tensor, dim: int, batch_dim: int, start: int) -> Tensor:
    """Rows ``start`` and on of ``x`` along ``dim``, as many as the index has; shares the memory of ``x``.

    Args:
        x: any tensor with a batch axis.
        index: ``[batch, rows]`` or ``[1, rows]`` int64, the positions ``start .. start + rows - 1`` in each sample.
        dim: the token axis of ``x``.
        batch_dim: the batch axis of ``x``.
        start: the first position.
    """
    rows: Tensor = torch.ops.aten.slice.Tensor(x, dim, start, start + index.shape[1])
    return rows


def _restore_range(x: Tensor, rows: Tensor, index: Tensor, start: int) -> Tensor:
    """``x`` with its rows from ``start`` on replaced.

    Args:
        x: ``[batch, tokens, hidden]``.
        rows: ``[batch, rows, hidden]``.
        index: ``[batch, rows]`` or ``[1, rows]`` int64, the positions ``start .. start + rows - 1`` in each sample.
        start: the first position.
    """
    return _joined(x[:, :start], rows, x[:, start + rows.shape[1] :])


def _merge_range(others: Tensor, rows: Tensor, index: Tensor, start: int) -> Tensor:
    """``rows`` at the positions from ``start`` on, ``others``, in order, before and after them.

    Args:
        others: ``[batch, m, width]``.
        rows: ``[batch, n, width]``.
        index: ``[batch, n]`` or ``[1, n]`` int64, the positions ``start .. start + n - 1`` in each sample.
        start: the first position.

    Returns:
        ``[batch, m + n, width]``.
    """
    return _joined(others[:, :start], rows, others[:, start:])


def _join(others: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """``others``, then ``rows``: ``select`` by ``index`` of what ``merge`` makes of the two.

    Args:
        others: ``[batch, m, width]``.
        rows: ``[batch, n, width]``.
        index: ``[batch, m + n]`` int64, the positions of ``others`` and then those of ``rows``.
    """
    return torch.cat([others, rows], 1)


def _joined(*parts: Tensor) -> Tensor:
    """The parts one after the other, without those that are known to be empty."""
    return torch.cat([x for x in parts if not (isinstance(x.shape[1], int) and x.shape[1] == 0)] or [parts[0]], 1)


_SCHEMAS: dict[str, Callable[..., Tensor]] = {
    "select_range(Tensor x, Tensor index, int dim, int batch_dim, SymInt start) -> Tensor": _select_range,
    "restore_range(Tensor x, Tensor rows, Tensor index, SymInt start) -> Tensor": _restore_range,
    "merge_range(Tensor others, Tensor rows, Tensor index, SymInt start) -> Tensor": _merge_range,
    "join(Tensor others, Tensor rows, Tensor index) -> Tensor": _join,
}
for _schema, _function in _SCHEMAS.items():
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(_schema.partition("(")[0], _function, "CompositeImplicitAutograd")

LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.tokgraph.select_range.default: _select_range,
    torch.ops.tokgraph.restore_range.default: _restore_range,
    torch.ops.tokgraph.merge_range.default: _merge_range,
    torch.ops.tokgraph.join.default: _join,
}
"""Operator -> the plain ATen function it is."""

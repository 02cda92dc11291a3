"""Operators that runtimes lack, or convert wrongly, written with operators that they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn import functional as F

from tokgraph.ops import decompositions
from tokgraph.passes.capture.row_losses import smoothed_cross_entropy

from .half import HALF, half_numbers, once_rounded
from .pools import pools

aten = torch.ops.aten
_of_torch = get_decompositions([aten.embedding_dense_backward])


def runtime_decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator -> function of plain ATen operators, for tracing a graph that a runtime can take.

    Our own operators; losses, whose conversion fakes ``total_weight``; and backward operators without a converter.
    """
    known = get_decompositions(
        [
            aten.nll_loss_forward,
            aten.nll_loss_backward,
            aten.nll_loss2d_forward,
            aten.nll_loss2d_backward,
            aten.silu_backward,
            aten.gelu_backward,
            aten._fused_rms_norm_backward,
            aten.index_add,
            aten._unsafe_masked_index_put_accumulate,
        ]
    )
    return {
        **known,
        **decompositions(),
        aten.cross_entropy_loss.default: smoothed_cross_entropy,
        aten.to.dtype: to_dtype,
        aten.masked_scatter.default: masked_scatter,
        aten.masked_scatter_backward.default: masked_scatter_backward,
        aten.slice_backward.default: slice_backward,
        aten.native_layer_norm.default: half_layer_norm,
        aten.embedding_dense_backward.default: embedding_dense_backward,
        aten.index_put.default: index_put,
        aten._unsafe_index_put.default: index_put,
        aten.scatter_add.default: half_scatter_add,
        aten.convolution_backward.default: convolution_backward,
        aten.conv3d.default: plain_conv3d,
        aten.squeeze.dim: squeeze,
        **dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), any_along),
        **half_numbers(),
        aten.rsub.Scalar: rsub,
        **pools(),
    }


def to_dtype(
    x: Tensor, dtype: torch.dtype, non_blocking: bool = False, copy: bool = False, memory_format: Any = None
) -> Any:
    """A cast, which is nothing where ``x`` has the type already."""
    if memory_format is not None:
        return NotImplemented
    return aten._to_copy.default(x, dtype=dtype) if copy or x.dtype != dtype else x


def squeeze(x: Tensor, dim: int) -> Any:
    """``x`` without an axis of size 1, and as it is where the axis is longer, which ONNX refuses."""
    return NotImplemented if guard_or_false(x.shape[dim] == 1) else aten.alias.default(x)


def any_along(x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Any:
    """Whether any element along axes, which may be empty, is true; the greatest of none, which ONNX takes, is true as well."""
    axes = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if all(guard_or_false(x.shape[axis] > 0) for axis in axes):
        return NotImplemented
    return (x != 0).to(torch.int64).sum(axes, keepdim) > 0


def rsub(x: Tensor, other: Any, alpha: Any = 1) -> Any:
    """``other - alpha * x`` for integers and a float, which the converter's promotion of types does not know."""
    dtype = torch.result_type(x, other)
    return (
        once_rounded(aten.rsub.Scalar, x, other, alpha)
        if x.dtype == dtype
        else aten.rsub.Scalar(x.to(dtype), other, alpha)
    )


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """The mask with a last axis of size 1 where whole rows are masked, which is so for image features."""
    mask = mask.expand(like.shape[: like.dim() - mask.dim()] + mask.shape)
    whole = mask.shape[-1] == 1 or mask.stride(-1) == 0
    return mask[..., :1].expand(*like.shape[:-1], 1) if whole else mask.expand(like.shape)


def _merged(x: Tensor, axes: int) -> Tensor:
    """The first ``axes`` axes as one, the rest as another; by sizes, as converters know none for what ``-1`` stands for."""
    return x.reshape(reduce(mul, x.shape[:axes], 1), reduce(mul, x.shape[axes:], 1))


def _by_width(x: Tensor, width: Any) -> Tensor:
    """The elements in order, as rows of a width."""
    return _merged(x, x.dim() - 1) if x.shape[-1] == width else x.reshape(-1, width)


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """``x`` where ``mask`` is false, else the elements of ``source`` in order; by gathering, row by row where it can."""
    rows = _rows(mask, x)
    width = x.shape[-1] if rows.shape[-1] == 1 else 1
    at = (rows.reshape(-1).to(torch.int64).cumsum(0) - 1).clamp(min=0)
    found = _by_width(source, width).index_select(0, at).reshape(x.shape)
    return torch.where(rows, found, x)


def masked_scatter_backward(grad: Tensor, mask: Tensor, sizes: Sequence[Any]) -> Tensor:
    """The gradient of ``source``: the masked elements of ``grad`` in order, then zeros, in the shape ``sizes``."""
    rows = _rows(mask, grad)
    width = grad.shape[-1] if rows.shape[-1] == 1 else 1
    count = reduce(mul, sizes, 1) // width
    flat = rows.reshape(-1)
    at = torch.where(
        flat, flat.to(torch.int64).cumsum(0) - 1, count
    )  # what is not masked goes to a row that is cut off
    into = grad.new_zeros((count + 1, width))
    moved = into.scatter(0, at.unsqueeze(1).expand(-1, width), _by_width(grad, width))
    return moved[:count].reshape(sizes)


def slice_backward(grad: Tensor, sizes: Sequence[Any], dim: int, start: Any, end: Any, step: int) -> Tensor:
    """The gradient of a sliced tensor: ``grad`` padded with zeros to ``sizes``."""
    if step != 1:
        return torch.slice_scatter(grad.new_zeros(sizes), grad, dim, start, end, step)
    dim = dim % len(sizes)
    start = start + sizes[dim] if start < 0 else start
    start = min(max(start, 0), sizes[dim])
    after = sizes[dim] - start - grad.shape[dim]
    return F.pad(grad, [*(0, 0) * (len(sizes) - 1 - dim), start, after])


def embedding_dense_backward(grad: Tensor, indices: Tensor, rows: Any, padding_idx: int, by_frequency: bool) -> Any:
    """The gradient of an embedding table; torch's also masks indices out of range, by a copy of all of ``grad``."""
    if by_frequency:
        return _of_torch[aten.embedding_dense_backward.default](grad, indices, rows, padding_idx, by_frequency)
    if padding_idx >= 0:
        grad = torch.where((indices == padding_idx).unsqueeze(-1), 0.0, grad)
    return _add_rows(grad.new_zeros((rows, grad.shape[-1])), indices, _merged(grad, grad.dim() - 1))


def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """``x`` with ``values`` added at indices, which is the gradient of ``x[indices]``."""
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    if not accumulate or any(index.dtype in (torch.bool, torch.uint8) for index in given):
        return NotImplemented
    given = list(torch.broadcast_tensors(*(index.to(torch.int64) for index in given)))
    rest = [axis for axis in range(x.dim()) if axis not in axes]
    together = axes[-1] - axes[0] + 1 == len(axes)  # else the indexed axes stand first in x[indices]
    before = [x.shape[axis] for axis in rest if together and axis < axes[0]]
    after = [x.shape[axis] for axis in rest[len(before) :]]
    values = values.expand(*before, *given[0].shape, *after)
    values = values.movedim(tuple(range(len(before), len(before) + given[0].dim())), tuple(range(given[0].dim())))

    at = torch.zeros_like(given[0])
    for axis, index in zip(axes, given, strict=True):
        at = at * x.shape[axis] + torch.where(index < 0, index + x.shape[axis], index)
    first = tuple(range(len(axes)))
    moved = x.movedim(axes, first)
    added = _add_rows(_merged(moved, len(axes)), at, _merged(values, at.dim()))
    return added.reshape(moved.shape).movedim(first, axes)


def _add_rows(x: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """``x [n, d]`` with ``rows [k, d]`` added at the rows ``at`` (``k`` numbers), one after another.

    The converter makes an adding ``index_put`` a ScatterND that adds, and ONNX Runtime's runs on several threads: where an
    index occurs twice, one addition may get lost.
    """
    return x.scatter_add(0, at.to(torch.int64).reshape(-1, 1).expand(-1, x.shape[1]), rows)


def half_scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """Additions of half-precision numbers, in float32: ONNX Runtime has no kernel for them."""
    if x.dtype not in HALF:
        return NotImplemented
    return x.float().scatter_add(dim, index, source.float()).to(x.dtype)


def half_layer_norm(x: Tensor, shape: Sequence[Any], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """Layer norm in half precision: its mean and deviation are float32 in ONNX, and half in PyTorch."""
    if x.dtype not in HALF:
        return NotImplemented
    axes = list(range(x.dim() - len(shape), x.dim()))
    wide = x.to(torch.float32)
    mean = wide.mean(axes, keepdim=True)
    centred = wide - mean  # torch's own decomposition takes a variance by an operator that has no form in ONNX
    deviation = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    found = centred * deviation
    if weight is not None:
        found = found * weight
    if bias is not None:
        found = found + bias
    return found.to(x.dtype), mean.to(x.dtype), deviation.to(x.dtype)


def plain_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """A convolution without bias, for which the converter makes up one of the wrong shape."""
    if bias is not None:
        return NotImplemented
    return aten.convolution.default(x, weight, None, *map(_three, (stride, padding, dilation)), False, [0] * 3, groups)


def _three(sizes: Any) -> list[int]:
    given: list[int] = [sizes] if isinstance(sizes, int) else list(sizes)
    return given * 3 if len(given) == 1 else given


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[Any] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> Any:
    """The gradients of a convolution, which are convolutions as well.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (arXiv 1603.07285), section 4.
    """
    if transposed:
        return NotImplemented
    space = range(weight.dim() - 2)
    stride, padding, dilation = ([v[0]] * len(space) if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    kernel = weight.shape[2:]
    into = of_weight = of_bias = None
    if mask[0]:
        reach = [
            (grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1 for i in space
        ]
        rest = [x.shape[2 + i] - reach[i] for i in space]
        into = aten.convolution.default(grad, weight, None, stride, padding, dilation, True, rest, groups)
    if mask[1]:
        of_weight = _of_weight(grad, x, stride, padding, dilation, groups)
        for i in space:  # a stride that does not divide the input leaves rows that the forward never read
            of_weight = of_weight.narrow(2 + i, 0, kernel[i])
    if mask[2]:
        of_bias = grad.sum([0, *(2 + i for i in space)])
    return into, of_weight, of_bias


def _of_weight(
    grad: Tensor, x: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Samples become channels: the input, convolved with the gradient, stride and dilation exchanged."""
    samples = x.shape[0]
    signal = x.unflatten(1, (groups, -1)).movedim(2, 0).transpose(1, 2)  # [channels, groups, samples, ...]
    filters = grad.unflatten(1, (groups, -1)).movedim(0, 2)  # [groups, channels, samples, ...]
    found: Tensor = aten.convolution.default(
        signal.reshape(signal.shape[0], groups * samples, *x.shape[2:]),
        filters.reshape(grad.shape[1], samples, *grad.shape[2:]),
        None, dilation, padding, stride, False, [0] * (x.dim() - 2), groups,
    )  # fmt: skip
    return found.transpose(0, 1)

"""Gradients of averages over windows and of smoothed resizing: linear along each axis, so a matrix product for each.

The matrix of an axis is what the operator itself makes of the unit vectors, whatever its padding and rounding of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Along = Callable[[Tensor], Tensor]
"""Applies an operator to axis -2 of ``[1, 1, n, n]`` and leaves the last as it is."""


def pools() -> dict[Any, Callable[..., Any]]:
    """Operator -> function of plain operators, of those that have no converter or one that is wrong."""
    return {
        aten.avg_pool2d.default: overridden_average,
        aten.avg_pool2d_backward.default: average_backward,
        aten.avg_pool3d_backward.default: average_backward,
        aten._adaptive_avg_pool2d_backward.default: adaptive_average_backward,
        aten._adaptive_avg_pool3d_backward.default: adaptive_average_backward,
        aten._upsample_bilinear2d_aa_backward.default: partial(
            smoothed_resize_backward, aten._upsample_bilinear2d_aa.default
        ),
        aten._upsample_bicubic2d_aa_backward.default: partial(
            smoothed_resize_backward, aten._upsample_bicubic2d_aa.default
        ),
    }


def overridden_average(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil: bool = False,
    with_padding: bool = True,
    divisor: int | None = None,
) -> Any:
    """Sums over windows divided by a number of the caller's, which the converter takes no notice of."""
    if divisor is None:
        return NotImplemented
    matrices = [m.t() for m in _averages(x, 2, kernel, stride, padding, ceil, with_padding, divisor)]
    return _applied(x, matrices) / divisor


def average_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    with_padding: bool,
    divisor: int | None,
) -> Tensor:
    """The gradient of ``avg_pool2d`` and ``avg_pool3d``."""
    axes = 2 if len(kernel) == 2 else 3
    into = _applied(grad, _averages(x, axes, kernel, stride, padding, ceil, with_padding, divisor))
    return into if divisor is None else into / divisor


def adaptive_average_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``adaptive_avg_pool2d`` and ``adaptive_avg_pool3d``."""
    axes = 2 if x.dim() == 4 else 3

    def along(size: Any) -> Along:
        return lambda units: aten._adaptive_avg_pool2d.default(units, [size, units.shape[-1]])

    return _applied(grad, [_matrix(along(grad.shape[i]), x, x.shape[i]) for i in range(-axes, 0)])


def smoothed_resize_backward(
    resize: Callable[..., Tensor],
    grad: Tensor,
    output_size: Sequence[Any],
    input_size: Sequence[Any],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    """The gradient of ``resize``, which is ``interpolate(antialias=True)``."""

    def along(size: Any, scale: float | None) -> Along:
        return lambda units: resize(units, [size, units.shape[-1]], align_corners, scale, None)

    sizes = zip(output_size, (scales_h, scales_w), input_size[-2:], strict=True)
    return _applied(grad, [_matrix(along(size, scale), grad, before) for size, scale, before in sizes])


def _averages(
    x: Tensor,
    axes: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    with_padding: bool,
    divisor: int | None,
) -> list[Tensor]:
    """A matrix for each axis: the weights of an average, or ones where the caller divides."""
    kernel, stride, padding = (list(v) * (axes // len(v) if v else 1) for v in (kernel, stride or kernel, padding))

    def along(k: int, s: int, p: int) -> Along:
        return lambda units: aten.avg_pool2d.default(units, [k, 1], [s, 1], [p, 0], ceil, with_padding)

    found = [
        _matrix(along(k, s, p), x, x.shape[i - axes])
        for i, (k, s, p) in enumerate(zip(kernel, stride, padding, strict=True))
    ]
    return found if divisor is None else [(m > 0).to(m.dtype) for m in found]


def _matrix(along: Along, like: Tensor, size: Any) -> Tensor:
    """``[size after, size]``: what comes of unit vectors."""
    units = torch.eye(size, dtype=like.dtype, device=like.device)
    return along(units[None, None])[0, 0]


def _applied(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``x``, the last axes of which are multiplied with a matrix each."""
    for axis, matrix in enumerate(matrices, start=-len(matrices)):
        x = torch.matmul(x.movedim(axis, -1), matrix).movedim(-1, axis)
    return x

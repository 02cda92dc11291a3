"""How far a tensor is from what it should be."""

from __future__ import annotations

import torch

_CHUNK = 2**22
"""Elements compared at once: logits and embeddings of large models do not fit a second time in float64."""
_ORDINARY = 1e30
"""From here on a value stands for infinity, as what fills masked logits does."""


def relative_distance(a: torch.Tensor, b: torch.Tensor, floor: float = 0.0) -> float:
    """``max |a - b| / max(max |b|, floor)``, in float64; the absolute distance where that would divide by zero.

    Equal infinities and NaNs are equal. Values that stand for infinity (a type's smallest number in masked logits) are
    held against themselves, so that they do not hide the others.

    Args:
        a: what was found.
        b: what it should be, on any device.
        floor: the least that counts as the size of ``b``.

    Returns:
        The distance; infinite where shapes differ, one is NaN where the other is not, or values without rounding differ.
    """
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach(), b.detach().to(a.device)
    if not a.numel() or (a.dtype == b.dtype and torch.equal(a, b)):
        return 0.0
    if a.is_complex() and b.is_complex():
        return relative_distance(torch.view_as_real(a), torch.view_as_real(b), floor)
    if not (a.is_floating_point() and b.is_floating_point()):
        return 0.0 if torch.equal(a, b) else float("inf")
    ordinary = min(_ORDINARY, 1e-3 * torch.finfo(b.dtype).max)
    parts = [
        _of_chunk(x.double(), y.double(), ordinary)
        for x, y in zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True)
    ]
    error, size, extreme = (float(x) for x in torch.stack(parts).amax(0))
    size = max(size, floor)
    return max(extreme, error / size if size else error)


def _of_chunk(a: torch.Tensor, b: torch.Tensor, ordinary: float) -> torch.Tensor:
    """The largest distance and size of ordinary values, and the largest relative distance of others."""
    gap = (a - b).abs_().masked_fill_((a == b) | (a.isnan() & b.isnan()), 0.0).nan_to_num_(float("inf"), float("inf"))
    size = b.abs()
    plain = size < ordinary
    extreme = torch.where(plain | (gap == 0), 0.0, gap / size).nan_to_num_(float("inf"), float("inf"))
    return torch.stack([gap.where(plain, 0.0).max(), size.where(plain, 0.0).max(), extreme.max()])

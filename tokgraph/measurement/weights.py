"""Attention weights of a call in a captured graph, some heads and rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokgraph.errors import SpecError

from .observe import Call


@dataclass(frozen=True)
class Chunk:
    """Attention weights of some heads and query rows of one sample.

    Args:
        sample: which sample.
        heads: which heads.
        rows: ``[rows]`` int64, positions of the query rows.
        weights: ``[heads, rows, keys]``, float32 or wider; all zero in a row that is masked from every key.
    """

    sample: int
    heads: slice
    rows: torch.Tensor
    weights: torch.Tensor


def is_fused(call: Call) -> bool:
    """Whether the call is a fused attention; else it is the softmax of one."""
    return "query" in call.named()


def weights_shape(call: Call) -> tuple[int, ...]:
    """The shape of all weights, ``[batch, heads..., queries, keys]``."""
    if is_fused(call):
        given = call.named()
        return (*given["query"].shape[:-1], given["key"].shape[-2])
    shape = tuple(call.result.shape)
    return shape if call.rows is None else (*shape[:-2], call.total, shape[-1])


def weight_chunks(call: Call, asked: torch.Tensor, max_bytes: int) -> Iterator[Chunk]:
    """The weights of the query rows that are asked for; let go of each chunk before the next.

    Args:
        call: a fused attention, whose weights are recomputed, or the softmax of another.
        asked: ``[batch, queries]`` bool.
        max_bytes: bound of what is held at once, scores and softmax together.

    Raises:
        SpecError: a single row is more than that.
    """
    shape = weights_shape(call)
    heads = math.prod(shape[1:-2])
    fused = is_fused(call)
    own: torch.dtype = (call.named()["query"] if fused else call.result).dtype
    width = torch.promote_types(own, torch.float32)  # half precision would round the sums over keys
    # a fused attention: scores and their softmax; another: a copy of its rows, and that in the wider type
    some_heads, some_rows = _pieces(heads, shape[-1] * (width.itemsize + (width if fused else own).itemsize), max_bytes)
    for sample, positions in enumerate(asked.to(call.result.device)):
        here = positions if call.rows is None else positions[call.rows]  # of the rows that the result holds
        for rows in here.nonzero().squeeze(1).split(some_rows):
            for start in range(0, heads, some_heads):
                part = slice(start, min(start + some_heads, heads))
                if not len(rows):
                    continue
                if fused:
                    yield Chunk(sample, part, rows, _recomputed(call.named(), sample, part, rows, width))
                else:
                    weights = _widened(_by_head(call.result[sample])[part, rows], width)
                    yield Chunk(sample, part, rows if call.rows is None else call.rows[rows], weights)
                    del weights


def _pieces(heads: int, row: int, max_bytes: int) -> tuple[int, int]:
    """Heads and rows of a chunk, for rows of ``row`` bytes."""
    fit = max_bytes // row
    if fit < 1:
        raise SpecError(
            f"max_bytes={max_bytes} does not hold one row of attention weights ({row} bytes)",
            help="give a larger max_bytes",
        )
    return min(heads, fit), max(fit // heads, 1)


def _widened(weights: torch.Tensor, width: torch.dtype) -> torch.Tensor:
    """Weights in a type of at least float32, their rows summing to 1 again where half precision had rounded them."""
    if weights.dtype is width:
        return weights
    wide = weights.to(width)
    return wide.div_(wide.sum(-1, keepdim=True).clamp_min_(torch.finfo(width).tiny))


def _recomputed(
    given: Mapping[str, Any], sample: int, heads: slice, rows: torch.Tensor, width: torch.dtype
) -> torch.Tensor:
    """``[heads, rows, keys]``: what a fused attention with these arguments weighs its values with."""
    query, key = given["query"][sample], _of_sample(given["key"], sample)
    if given.get("enable_gqa", False):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    key = key.expand(*query.shape[:-2], *key.shape[-2:])
    scale = given.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    scores = (_by_head(query)[heads, rows].to(width) * scale) @ _by_head(key)[heads].to(width).transpose(1, 2)
    _mask(scores, given, sample, heads, rows, query.shape[:-2])
    blind = scores.amax(-1, keepdim=True) == -math.inf
    return scores.softmax(-1).masked_fill_(blind, 0.0)


def _mask(
    scores: torch.Tensor, given: Mapping[str, Any], sample: int, heads: slice, rows: torch.Tensor, lead: Sequence[int]
) -> None:
    """Apply the mask of a fused attention to scores ``[heads, rows, keys]`` in place; ``lead``: the head axes."""
    if given.get("is_causal", False):  # aligned at the first query and the first key, as in the fused operator
        later = torch.arange(scores.shape[-1], device=rows.device) > rows.unsqueeze(1)
        scores.masked_fill_(later, -math.inf)
    mask = given.get("attn_mask")
    if mask is None:
        return
    mask = _of_sample(mask[(None,) * (len(lead) + 3 - mask.dim())], sample)
    if any(size > 1 for size in mask.shape[:-2]):
        mask = mask.expand(*lead, *mask.shape[-2:])
        mask = _by_head(mask)[heads]
    else:  # one mask for all heads
        mask = _by_head(mask)
    mask = mask[:, rows] if mask.shape[1] > 1 else mask
    if mask.dtype is torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    else:
        scores.add_(mask)


def _of_sample(x: torch.Tensor, sample: int) -> torch.Tensor:
    """One sample of a value whose batch axis may be broadcast."""
    return x[sample if len(x) > 1 else 0]


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """``[heads..., rows, width]`` with its head axes merged, with one where there is none."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])

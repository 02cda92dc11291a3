"""Operators that score visual tokens: those of highest score stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .base import NAMESPACE, Condition, expand_index, rank_of, require


def _spread_score(valid: Tensor, drop: Tensor) -> Tensor:
    n = valid.sum(1, keepdim=True)
    keep, rank = (n - drop.unsqueeze(1)).clamp(min=0), rank_of(valid)
    n = n.clamp(min=1)
    ends = [(at * keep + n - 1) // n for at in (rank, rank + 1)]  # numbers j with j * n / keep below rank, rank + 1
    return ((ends[1] > ends[0]) & valid).to(torch.float32)


def _uniform_score(candidates: Tensor, keep: int) -> Tensor:
    width = candidates.shape[1]
    rank = torch.arange(keep, device=candidates.device) * width // max(keep, 1)
    score = torch.zeros(width, device=candidates.device).scatter(0, rank, 1.0)
    return score.unsqueeze(0).expand(candidates.shape[0], -1).clone()


def _random_score(candidates: Tensor, seed: int, step: Tensor | None = None) -> Tensor:
    samples, width = candidates.shape
    device = candidates.device
    x = torch.arange(samples, device=device).unsqueeze(1) * 0x9E3779B1 + torch.arange(width, device=device)
    x = (x + (seed * 0x85EBCA6B & 0xFFFFFFFF)) & 0xFFFFFFFF  # reduced first: a large seed would overflow int64
    if step is not None:
        x = (x + (step & 0x3FFFFFFF) * 0xC2B2AE35) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x


def _prompt_attention(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
    return scores.softmax(-1)


def _prompt_mass(weights: Tensor, visual: Tensor) -> Tensor:
    return weights.mean([1, 2])


_UNSEEN = (
    "the last prompt token does not see all visual tokens that it is to choose from (its attention mask leaves some out: "
    "an image after the first answer, another document packed into the row, a window)"
)


def _all_seen(weights: Tensor, visual: Tensor) -> Tensor:
    return ((weights > 0).any(1).any(1) | ~visual).all()


def _similarity_score(rows: Tensor, pivots: int) -> Tensor:
    pivots = min(pivots, rows.shape[1])
    found = rows.norm(dim=-1).sort(dim=1, descending=True, stable=True).indices[:, :pivots]
    unit = F.normalize(rows, dim=-1)
    alike = unit @ unit.gather(1, expand_index(found, unit.shape, 1, 0)).transpose(1, 2)
    return (-alike.amax(-1)).scatter(1, found, torch.inf)


@torch.library.custom_op(f"{NAMESPACE}::spread_score", mutates_args=())
def spread_score(valid: Tensor, drop: Tensor) -> Tensor:
    """:func:`uniform_score` for samples with different numbers of candidates.

    Args:
        valid: ``[batch, m]`` bool, the candidates.
        drop: ``[batch]`` int64, or ``[1]`` for all samples: how many of them go; ``n - drop`` of ``n`` stay.

    Returns:
        ``[batch, m]`` float32: 1 at the candidates of rank ``floor(j * n / keep)``, ``j = 0 .. keep - 1``, else 0.
    """
    return _spread_score(valid, drop)


@torch.library.custom_op(f"{NAMESPACE}::uniform_score", mutates_args=())
def uniform_score(candidates: Tensor, keep: int) -> Tensor:
    """``[batch, m]`` float32: 1 at the ranks ``floor(j * m / keep)``, ``j = 0 .. keep - 1``, else 0."""
    return _uniform_score(candidates, keep)


@torch.library.custom_op(f"{NAMESPACE}::random_score", mutates_args=())
def random_score(candidates: Tensor, seed: int, step: Tensor | None = None) -> Tensor:
    """``[batch, m]`` int64 in ``[0, 2**32)``: a hash of sample, rank, seed and step, the same on every device.

    Args:
        candidates: ``[batch, m]``.
        seed: another seed, another choice.
        step: int64 scalar tensor, the number of training steps so far; ``None``: 0.

    Source: the 32-bit integer finaliser with constants ``7feb352d``/``846ca68b`` (C. Wellons, hash-prospector).
    """
    return _random_score(candidates, seed, step)


@torch.library.custom_op(f"{NAMESPACE}::prompt_attention", mutates_args=())
def prompt_attention(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention weights of a few query rows, beside a fused attention that keeps its weights to itself.

    Args:
        query: ``[batch, heads, rows, head]``.
        key: ``[batch, key heads, keys, head]``; groups of query heads share one.
        attn_mask: bool (true: seen) or additive, broadcastable to ``[batch, heads, rows, keys]``.
        scale: factor of the scores; ``None``: ``head ** -0.5``.

    Returns:
        ``[batch, heads, rows, keys]``.
    """
    return _prompt_attention(query, key, attn_mask, scale)


@torch.library.custom_op(f"{NAMESPACE}::prompt_mass", mutates_args=())
def prompt_mass(weights: Tensor, visual: Tensor) -> Tensor:
    """What the last prompt token pays each key, the mean over heads.

    Args:
        weights: ``[batch, heads, 1, keys]``, its attention weights.
        visual: ``[batch, keys]`` bool, the keys that are to be ranked by it.

    Returns:
        ``[batch, keys]``.

    Raises:
        BatchError: no head gives one of these any weight: it is masked for the row, which then cannot rank it.
    """
    require(
        _all_seen(weights, visual),
        _UNSEEN,
        help="use a selector that needs no prompt ('uniform', 'random', 'norm', 'similarity'), or batches in which the row "
        "that predicts the first label sees every image of its sample",
    )
    return _prompt_mass(weights, visual)


@torch.library.custom_op(f"{NAMESPACE}::similarity_score", mutates_args=())
def similarity_score(rows: Tensor, pivots: int) -> Tensor:
    """How little a row repeats others: minus its largest cosine similarity to a pivot; pivots score infinity.

    Args:
        rows: ``[batch, m, hidden]``.
        pivots: how many rows of largest L2 norm are pivots.

    Returns:
        ``[batch, m]``.

    Source: DART (Wen et al., arXiv 2502.11494): tokens are kept by their duplication with a few pivots.
    """
    return _similarity_score(rows, pivots)


spread_score.register_fake(lambda valid, drop: torch.empty_like(valid, dtype=torch.float32))
uniform_score.register_fake(lambda candidates, keep: candidates.new_empty(candidates.shape, dtype=torch.float32))
random_score.register_fake(lambda candidates, seed, step=None: torch.empty_like(candidates))
prompt_attention.register_fake(
    lambda query, key, attn_mask, scale: query.new_empty((*query.shape[:3], key.shape[2]), requires_grad=False)
)
prompt_mass.register_fake(lambda weights, visual: weights.new_empty(visual.shape, requires_grad=False))
similarity_score.register_fake(lambda rows, pivots: rows.new_empty(rows.shape[:2], requires_grad=False))


@register_flop_formula(torch.ops.tokgraph.prompt_attention)
def _prompt_attention_flop(query: Any, key: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> Any:
    batch, heads, rows, head = query
    return 2 * batch * heads * rows * head * key[2]


@register_flop_formula(torch.ops.tokgraph.similarity_score)
def _similarity_score_flop(rows: Any, pivots: int, *args: Any, out_shape: Any = None, **kwargs: Any) -> Any:
    batch, count, hidden = rows
    return 2 * batch * count * hidden * pivots


LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.tokgraph.spread_score.default: _spread_score,
    torch.ops.tokgraph.uniform_score.default: _uniform_score,
    torch.ops.tokgraph.random_score.default: _random_score,
    torch.ops.tokgraph.prompt_attention.default: _prompt_attention,
    torch.ops.tokgraph.prompt_mass.default: _prompt_mass,
    torch.ops.tokgraph.similarity_score.default: _similarity_score,
}
"""Operator -> the plain ATen function it is."""
CONDITIONS = {torch.ops.tokgraph.prompt_mass.default: Condition(_all_seen, lambda *_: _UNSEEN)}
"""Operator -> what it asks of a batch."""

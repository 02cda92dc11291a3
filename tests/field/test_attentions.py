"""Attentions as users write them: repeated key heads are followed; where none is found, the error names what hides it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import HEADS, TASK, Block, Hidden
from tokgraph.passes.lower import places_of


def repeated(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, groups: int) -> Tensor:
    """Key and value heads that several query heads share, repeated as many models do it."""
    q, k, v = (m.heads(x).transpose(1, 2) for x in (q, k, v))
    k, v = (x[:, :groups].repeat_interleave(HEADS // groups, dim=1) for x in (k, v))
    mask = m.causal(q.shape[2], hidden).unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def scores(q: Tensor, k: Tensor, hidden: Hidden) -> Tensor:
    q, k = (m.heads(x).transpose(1, 2) for x in (q, k))
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~m.causal(q.shape[2], hidden).unsqueeze(1), -math.inf)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    found = torch.einsum("bqhd,bkhd->bhqk", m.heads(q), m.heads(k)) / math.sqrt(4)
    found = found.masked_fill(~m.causal(q.shape[1], hidden).unsqueeze(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", found.softmax(-1), m.heads(v)).flatten(2)


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    return (weights @ m.heads(v).transpose(1, 2)).transpose(1, 2).flatten(2)


def with_padding(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    return weighted(F.pad(scores(q, k, hidden), (0, 1)).softmax(-1)[..., :-1], v)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    found = scores(q, k, hidden)
    sinks = torch.arange(HEADS).to(q).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[1], -1)
    found = torch.cat([sinks, found], -1)
    return weighted((found - found.max(-1, keepdim=True).values).softmax(-1)[..., 1:], v)


def difference(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    weights = scores(q, k, hidden).softmax(-1) - 0.3 * scores(q.flip(-1), k.flip(-1), hidden).softmax(-1)
    return weighted(weights, v)


def difference_of_heads(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    weights = scores(q, k, hidden).softmax(-1).unflatten(1, (HEADS // 2, 2))
    weights = weights[:, :, 0] - 0.3 * weights[:, :, 1]
    return (weights @ v.unflatten(-1, (HEADS // 2, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


def turned(x: Tensor) -> Tensor:
    """Rotary embeddings by complex numbers."""
    x = m.heads(x)
    angles = torch.outer(torch.arange(x.shape[1]).to(x), torch.tensor([1.0, 0.1]).to(x))
    factors = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * factors).flatten(2)


def rotated(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    return m.plain(turned(q), turned(k), v, hidden)


def in_a_window(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    q, k, v = (m.heads(x).transpose(1, 2) for x in (q, k, v))
    at = torch.arange(q.shape[2])
    near = (at[:, None] - at < 4) & (at[:, None] // 5 == at // 5)
    mask = (m.causal(q.shape[2], hidden) & near).unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def heads_first(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    q, k, v = (m.heads(x).permute(2, 0, 1, 3) for x in (q, k, v))
    mask = m.causal(q.shape[2], hidden).unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(1, 2, 0, 3).flatten(2)


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_repeated_heads_are_followed(groups: int) -> None:
    model = m.model(lambda: Block(partial(repeated, groups=groups)))
    accelerated = tg.optimize(m.spec(model, m.batch()), tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),)))
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = m.loss(model, **inputs, span=range(1, 2), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10


WRITTEN = (by_einsum, with_padding, with_sinks, difference, difference_of_heads, rotated, in_a_window, heads_first)
QUICK = (with_sinks, difference_of_heads)


@pytest.mark.parametrize(
    ("attend", "dynamic"),
    [
        *((a, False) if a in QUICK else pytest.param(a, False, marks=pytest.mark.slow) for a in WRITTEN),
        *(pytest.param(a, True, marks=pytest.mark.slow) for a in (by_einsum, rotated, in_a_window)),
    ],
)
def test_attentions_as_they_are_written(attend: Callable[..., Tensor], dynamic: bool) -> None:
    model = m.model(lambda: Block(attend), layers=2)
    accelerated = tg.optimize(m.spec(model, m.batch(), dynamic=dynamic), tg.Plan((tg.DropSite(TASK, 0, 1, 0.5),)))
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = m.loss(model, **inputs, span=range(1), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10
    places = places_of(accelerated[TASK].task_graph).values()
    assert {place.kind for place in places if "softmax_beside" in place.node} <= {"attention"}  # no work of the drop


def joined_with_scores(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    """Two sets of scores in one softmax: which keys are whose cannot be told."""
    found = scores(q, k, hidden)
    left, right = torch.cat([found, found], -1).softmax(-1).chunk(2, -1)
    return weighted(left + right, v)


@pytest.mark.parametrize(
    ("attend", "why"),
    [(joined_with_scores, r"aten\.softmax\.int works over an axis that was joined, cut or merged")],
)
def test_what_hides_an_attention_is_named(attend: Callable[..., Tensor], why: str) -> None:
    program = tg.capture(m.spec(m.model(lambda: Block(attend), layers=2), m.batch()))
    with pytest.raises(tg.AnalysisError, match=why) as caught:
        tg.analyze(program)
    assert caught.value.where is not None
    assert str(caught.value.where.module).startswith("layers.0")


class Gated(Block):
    """A layer whose rows are replaced, not added to."""

    def forward(self, x: Tensor, hidden: Hidden = None) -> Tensor:
        return torch.where(x > 0, super().forward(x, hidden), x)


def test_layers_that_replace_rows_are_layers() -> None:
    model = m.model(Gated)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch())))
    assert [block.module for block in facts[TASK].blocks] == ["layers.0", "layers.1", "layers.2"]
    accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),)))
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = m.loss(model, **inputs, span=range(1, 2), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10

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
    weights = torch.einsum("bqhd,bkhd->bhqk", m.heads(q), m.heads(k)).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, m.heads(v)).flatten(2)


def with_sink(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    weights = F.pad(scores(q, k, hidden), (0, 1)).softmax(-1)[..., :-1]
    return (weights @ m.heads(v).transpose(1, 2)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_repeated_heads_are_followed(groups: int) -> None:
    model = m.model(lambda: Block(partial(repeated, groups=groups)))
    accelerated = tg.optimize(m.spec(model, m.batch()), tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),)))
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = m.loss(model, **inputs, span=range(1, 2), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (by_einsum, r"aten\.einsum\.default has no token-axis rule"),
        (with_sink, r"aten\.softmax\.int works over an axis that was joined, cut or merged"),
    ],
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

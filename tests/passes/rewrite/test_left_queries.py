"""Queries of dropped rows that an operator keeps get something to see: gradients are those of a loop by hand, and no NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.passes.tools import calls
from tokgraph.passes import Pipeline
from tokgraph.passes.rewrite.realise import seeds

AT_THE_BEGINNING = (0, 0)  # of the sequence, where image rows see nothing but one another
LEAST = torch.finfo(torch.float64).min


def keeping_rows(self: nn.Module, h: Tensor) -> Tensor:
    """A norm whose results have different shapes: no rows can be taken of one of them alone."""
    return torch.native_layer_norm(h, (m.HIDDEN,), self.norm2.weight, self.norm2.bias, 1e-5)[0]


def by_hand(fill: float, added: bool = False) -> Callable[..., Tensor]:
    """Attention of products and a softmax, its mask written into the scores or added to them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        q, k, v = (m.heads(x).transpose(1, 2) for x in (q, k, v))
        scores, unseen = q @ k.mT / math.sqrt(q.shape[-1]), ~m.causal(q.shape[2], hidden).unsqueeze(1)
        bias = torch.zeros_like(scores[:, :1]).masked_fill(unseen, fill)
        scores = scores + bias if added else scores.masked_fill(unseen, fill)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    return attend


def added(fill: float) -> Callable[..., Tensor]:
    """Fused attention with numbers that are added."""

    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        q, k, v = (m.heads(x).transpose(1, 2) for x in (q, k, v))
        unseen = ~m.causal(q.shape[2], hidden).unsqueeze(1)
        bias = torch.zeros_like(unseen, dtype=q.dtype).masked_fill(unseen, fill)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    return attend


ATTENTIONS = {
    "-inf by hand": by_hand(-math.inf),
    "added -inf by hand": by_hand(-math.inf, added=True),
    "least number by hand": by_hand(LEAST),
    "boolean mask": m.plain,
    "added -inf": added(-math.inf),
    "added least number": added(LEAST),
}
QUICK = {"-inf by hand", "added -inf"}


def model_of(attention: str, step: Callable[..., Tensor] | None = keeping_rows) -> m.Model:
    return m.model(lambda: m.Block(ATTENTIONS[attention], step), layers=4)


def facts_of(model: m.Model) -> tg.Facts:
    return tg.analyze(tg.capture(m.spec(model, m.batch(AT_THE_BEGINNING))))


@pytest.mark.parametrize(
    "attention", [a if a in QUICK else pytest.param(a, marks=pytest.mark.slow) for a in ATTENTIONS]
)
def test_rows_that_see_no_key_leave_no_trace(attention: str) -> None:
    model = model_of(attention)
    accelerated = tg.apply(facts_of(model), tg.Plan((tg.DropSite(m.TASK, 1, 3, 0.0),), exact=False))
    tg.verify(accelerated).raise_if_failed()
    for inputs in (m.batch(AT_THE_BEGINNING), m.batch(AT_THE_BEGINNING, seed=4)):
        reference = m.loss(model, **inputs, span=range(1, 3), hidden=inputs["ids"] == m.IMAGE_ID)
        assert m.worst(accelerated[m.TASK](**inputs), reference, model) < 1e-10


SITES = {
    "nested": (tg.DropSite(m.TASK, 0, 4, 0.5), tg.DropSite(m.TASK, 1, 3, 0.0)),
    "for good": (tg.DropSite(m.TASK, 1, 4, 0.0, restore=False),),
    "for good in stages": (
        tg.DropSite(m.TASK, 0, 4, 0.5, restore=False),
        tg.DropSite(m.TASK, 2, 4, 0.0, restore=False),
    ),
    "frozen among hidden": (tg.DropSite(m.TASK, 0, 4, 0.25), tg.DropSite(m.TASK, 1, 3, 0.0, mode="freeze")),
}


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sites", SITES)
def test_rows_that_see_no_key_where_sites_meet(sites: str, exact: bool) -> None:
    facts = facts_of(model_of("-inf by hand"))
    accelerated = tg.apply(facts, tg.Plan(SITES[sites], exact=exact))
    tg.verify(accelerated).raise_if_failed()


def test_where_queries_are_removed_nothing_is_added() -> None:
    found = {}
    for step in (None, keeping_rows):
        facts = facts_of(model_of("-inf by hand", step))
        sites = (tg.DropSite(m.TASK, 1, 3, 0.0),)
        seeded = Pipeline(seeds(facts[m.TASK], sites, exact=False)).run_task(facts.program[m.TASK], facts[m.TASK])
        found[step] = len(calls(seeded, torch.ops.aten.where.ScalarOther))
    assert found == {None: 0, keeping_rows: 2}

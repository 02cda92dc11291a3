"""Streams that are stacked, or whose tokens stand before their samples: found, and thinned as by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import HIDDEN, TASK

SLOW = pytest.mark.slow
STREAMS, LAYERS = 3, 3


class Updates(m.Block):
    """Alternating updates: a layer predicts all streams, ``[streams, batch, tokens, hidden]``, computes one, corrects all."""

    def __init__(self, streams: int = STREAMS) -> None:
        super().__init__()
        self.predict, self.correct = nn.Linear(HIDDEN, streams * streams), nn.Linear(HIDDEN, streams)

    def forward(self, x: Tensor, hidden: m.Hidden = None) -> Tensor:
        streams = x.shape[0]
        mixing = self.predict(x[0]).unflatten(-1, (streams, streams))
        predicted = torch.matmul(x.permute(1, 2, 3, 0), mixing).permute(3, 0, 1, 2) + x
        new = super().forward(predicted[0], hidden)
        scale = (self.correct(new) + 1.0).permute(2, 0, 1).unsqueeze(-1)
        corrected = (new - predicted[0]).repeat(streams, 1, 1, 1) * scale + predicted
        corrected[1:] += self.norm2(corrected[0].clone())
        return corrected


class Rates(m.Block):
    """Hyper-connections, ``[batch, tokens, streams, hidden]``: streams are mixed, one is read, all are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Parameter(torch.randn(STREAMS)), nn.Parameter(torch.randn(STREAMS))
        self.mix = nn.Parameter(torch.eye(STREAMS) + 0.1 * torch.randn(STREAMS, STREAMS))

    def forward(self, x: Tensor, hidden: m.Hidden = None) -> Tensor:
        h = torch.matmul(self.read, x)
        new = super().forward(h, hidden) - h
        return torch.matmul(self.mix, x) + self.write[:, None] * new.unsqueeze(2)


class TokensFirst(m.Block):
    """``[tokens, batch, hidden]``."""

    def forward(self, x: Tensor, hidden: m.Hidden = None) -> Tensor:
        q, k, v = (m.heads(y).permute(1, 2, 0, 3) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        mask = m.causal(len(x), hidden).unsqueeze(1)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(found.permute(2, 0, 1, 3).flatten(2))
        return x + self.feed(self.norm2(x))


class Stacked(m.Model):
    def forward(self, ids: Tensor, patches: Tensor, span: range = range(0), hidden: m.Hidden = None) -> Tensor:  # type: ignore[override]
        rows = self.enter(ids, patches)
        x = self.started(rows)
        for number, layer in enumerate(self.layers):
            after = layer(x, hidden if number in span else None)
            x = after if hidden is None or number not in span else torch.where(self.laid_out(hidden), x, after)
        return self.read(self.ended(x))

    def started(self, rows: Tensor) -> Tensor:
        streams = self.layers[0].correct.out_features
        return torch.stack([rows, *(rows.roll(i, -1) * 0.5 for i in range(1, streams))])

    def ended(self, x: Tensor) -> Tensor:
        return x.mean(0)

    def laid_out(self, hidden: Tensor) -> Tensor:
        return hidden[None, :, :, None]


class Rated(Stacked):
    def started(self, rows: Tensor) -> Tensor:
        return rows.unsqueeze(2) * torch.linspace(0.5, 1.5, STREAMS).to(rows)[:, None]

    def ended(self, x: Tensor) -> Tensor:
        return x.sum(2)

    def laid_out(self, hidden: Tensor) -> Tensor:
        return hidden[:, :, None, None]


class InFront(Rates):
    """``[batch, streams, tokens, hidden]``."""

    def forward(self, x: Tensor, hidden: m.Hidden = None) -> Tensor:
        h = (self.read[:, None, None] * x).sum(1)
        new = m.Block.forward(self, h, hidden) - h
        return torch.einsum("ij,bjth->bith", self.mix, x) + self.write[:, None, None] * new.unsqueeze(1)


class FrontRated(Stacked):
    def started(self, rows: Tensor) -> Tensor:
        return rows.unsqueeze(1).expand(-1, STREAMS, -1, -1)

    def ended(self, x: Tensor) -> Tensor:
        return x.sum(1)

    def laid_out(self, hidden: Tensor) -> Tensor:
        return hidden[:, None, :, None]


class Turned(Stacked):
    def started(self, rows: Tensor) -> Tensor:
        return rows.transpose(0, 1)

    def ended(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def laid_out(self, hidden: Tensor) -> Tensor:
        return hidden.t().unsqueeze(-1)


CASES: dict[str, tuple[type[Stacked], Any]] = {
    "stacked": (Stacked, Updates),
    "as many streams as samples": (Stacked, lambda: Updates(2)),
    "stacked behind tokens": (Rated, Rates),
    "stacked behind samples": (FrontRated, InFront),
    "tokens first": (Turned, TokensFirst),
}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("name", [n if n == "stacked" else pytest.param(n, marks=SLOW) for n in CASES])
def test_streams_of_other_layouts(name: str, dynamic: bool) -> None:
    cls, make = CASES[name]
    model = m.model(make, LAYERS, cls)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), dynamic=dynamic)))
    assert [block.module for block in facts[TASK].blocks] == [f"layers.{i}" for i in range(LAYERS)]
    accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 0, 2, 0.5),), exact=True))
    tg.verify(accelerated).raise_if_failed()
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = m.loss(model, **inputs, span=range(2), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10


@SLOW
@pytest.mark.parametrize("selector", ["norm", "attention", "similarity"])
def test_selectors_score_all_streams_of_a_row(selector: str) -> None:
    model = m.model(Updates, LAYERS, Stacked)
    accelerated = tg.optimize(m.spec(model, m.batch()), tg.Plan((tg.DropSite(TASK, 1, 2, 0.5, selector),)))
    tg.verify(accelerated).raise_if_failed()

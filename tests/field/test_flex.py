"""Flex attention: captured by its own definition, under masks and scores of positions, and thinned as any attention is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, flex_attention, or_masks

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import HEADS, IMAGE_ID, TASK

SLOW = pytest.mark.slow
Mod = Callable[..., Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch.compile imports it
]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q - k < 4


def by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k <= 2 + 3 * h)


def padded(ids: Tensor) -> Mod:
    """The first tokens of the second sample are padding: its first rows see no key at all."""
    lengths = torch.tensor([0, 2])
    return and_masks(causal, lambda b, h, q, k: k >= lengths[b])


def image_in_full(ids: Tensor) -> Mod:
    image = ids == IMAGE_ID
    return or_masks(causal, lambda b, h, q, k: image[b, q] & image[b][k])


def packed(ids: Tensor) -> Mod:
    document = (torch.arange(ids.shape[1]) >= 9).long().expand(len(ids), -1)
    return and_masks(causal, lambda b, h, q, k: document[b, q] == document[b, k])


class Scores(nn.Module):
    """What is done to scores, with a table that is learned."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.table = kind, nn.Parameter(torch.randn(HEADS, 33))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.kind == "capped":
            return 2.0 * torch.tanh(score / 2.0)
        if self.kind == "slopes":
            return score + (k - q) * torch.exp2(-8.0 * (h + 1) / HEADS)
        return score + self.table[h, (q - k).clamp(-16, 16) + 16]


@dataclass(frozen=True)
class Case:
    """How an attention is written.

    Args:
        mask: ids to its ``mask_mod``.
        scores: what is done to scores.
        groups: query heads of a key head.
        compiled: by ``torch.compile``, as it is meant to be.
    """

    mask: Callable[[Tensor], Mod] | None = None
    scores: str | None = None
    groups: int = 1
    compiled: bool = False


class Flex(m.Block):
    """A layer with flex attention; by hand: with the dense mask and scores, and hidden rows."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.scores = case, None if case.scores is None else Scores(case.scores)
        self.kernel = torch.compile(flex_attention) if case.compiled else flex_attention

    def forward(self, x: Tensor, seen: Any = None, hidden: Tensor | None = None, flex: bool = True) -> Tensor:
        q, k, v = (m.heads(y).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        k, v = (y[:, :: self.case.groups] for y in (k, v))
        if flex:
            found = self.kernel(q, k, v, score_mod=self.scores, block_mask=seen, enable_gqa=self.case.groups > 1)
        else:
            found = self.by_hand(q, *(y.repeat_interleave(self.case.groups, 1) for y in (k, v)), seen, hidden)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, hidden: Tensor | None) -> Tensor:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.scores is not None:
            at = [
                torch.arange(size).reshape([-1 if i == j else 1 for j in range(4)])
                for i, size in enumerate(scores.shape)
            ]
            if self.case.scores == "table":
                scores = scores + self.scores.table[at[1], (at[2] - at[3]).clamp(-16, 16) + 16]
            else:
                scores = self.scores(scores, *at)
        seen = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen.expand_as(scores)
        if hidden is not None:
            seen = seen & (~hidden[:, None, None, :] | hidden[:, None, :, None])
        none = ~seen.any(-1, keepdim=True)
        return (scores.masked_fill(~seen & ~none, -math.inf).softmax(-1) @ v).masked_fill(none, 0)


class Decoder(m.Model):
    """Makes one mask for all layers."""

    case: Case

    def forward(  # type: ignore[override]
        self, ids: Tensor, patches: Tensor, flex: bool = True, span: range = range(0), hidden: Tensor | None = None
    ) -> Tensor:
        batch, tokens = ids.shape
        seen: Any = None
        if self.case.mask is not None:
            make = create_block_mask if flex else create_mask
            seen = make(self.case.mask(ids), batch, HEADS, tokens, tokens, device="cpu")
        x = self.enter(ids, patches)
        for number, layer in enumerate(self.layers):
            gone = hidden if number in span else None
            after = layer(x, seen, gone, flex)
            x = after if gone is None else torch.where(gone.unsqueeze(-1), x, after)
        return self.read(x)


def model(case: Case) -> Decoder:
    made = m.model(lambda: Flex(case), layers=2, cls=Decoder)
    assert isinstance(made, Decoder)
    made.case = case
    return made


CASES = {
    "causal": Case(lambda ids: causal),
    "no mask": Case(),
    "window": Case(lambda ids: and_masks(causal, window)),
    "by head": Case(lambda ids: by_head),
    "padding": Case(padded),
    "image in full": Case(image_in_full),
    "packed": Case(packed),
    "grouped": Case(image_in_full, groups=2),
    "compiled": Case(packed, compiled=True),
    "capped": Case(lambda ids: causal, "capped"),
    "slopes": Case(packed, "slopes"),
    "table": Case(padded, "table", groups=2),
}
OPEN = ("causal", "padding", "packed", "table")
"""Captured with an open number of tokens."""


@pytest.mark.parametrize("name", [n if n == "image in full" else pytest.param(n, marks=SLOW) for n in CASES])
def test_flex_attention_is_thinned(name: str) -> None:
    decoder, dynamic = model(CASES[name]), name in OPEN
    sizes: Any = {key: {1: "tokens"} for key in ("ids", "labels")} if dynamic else None
    accelerated = tg.optimize(m.spec(decoder, m.batch(), dynamic=sizes), tg.Plan((tg.DropSite(TASK, 0, 1, 0.5),)))
    others = [m.batch((5, 1), seed=3), *([m.batch((3, 6), tokens=15, seed=4)] if dynamic else [])]
    for inputs in (m.batch(), *others):
        by_hand = m.loss(decoder, **inputs, flex=False, span=range(1), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, decoder) < 1e-10


def reducing(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < 3).any()


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        pytest.param(
            reducing, "differs between the user's forward and the captured graph", marks=SLOW, id="a mask that reduces"
        ),
        pytest.param(causal, "Unsupported input type", id="a mask that is an input"),
    ],
)
def test_what_cannot_be_captured_is_refused(mask: Mod, why: str) -> None:
    decoder, inputs = model(Case(lambda ids: mask)), m.batch()
    more = {"seen": create_block_mask(mask, 2, HEADS, 12, 12, device="cpu")} if mask is causal else {}

    def forward(model: Decoder, seen: Any = None, **inputs: Tensor) -> Tensor:
        return m.loss(model, **inputs)

    with pytest.raises(tg.CaptureError, match=why) as caught:
        tg.capture(m.spec(decoder, {**inputs, **more}, forward=forward))
    assert mask is reducing or "create_block_mask" in str(caught.value.help)

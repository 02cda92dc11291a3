"""Decoders of PyTorch's own layers: ``nn.MultiheadAttention`` merges heads with samples, and is followed through that."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import tokgraph as tg
from tests.field import decoder as m
from tests.field import structures as s
from tests.field.decoder import HEADS, HIDDEN, TASK, Block, Hidden


def left_out(x: Tensor, hidden: Hidden) -> Tensor:
    """``[tokens, tokens]`` or, by hand, ``[batch * heads, tokens, tokens]``: true where a row does not see another."""
    mask = ~m.causal(x.shape[1], hidden)
    return mask[0] if hidden is None else mask.repeat_interleave(HEADS, 0)


class Multihead(Block):
    """A layer whose attention is PyTorch's."""

    weights = False

    def __init__(self) -> None:
        super().__init__()
        del self.qkv, self.out
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)

    def forward(self, x: Tensor, hidden: Hidden = None) -> Tensor:
        h = self.norm1(x)
        made, _ = self.attention(h, h, h, attn_mask=left_out(x, hidden), need_weights=self.weights)
        return x + made + self.feed(self.norm2(x + made))


class Weighing(Multihead):
    """Written out by PyTorch, since it returns its weights (as it does unless told otherwise)."""

    weights = True


class TokensFirst(Multihead):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS)

    def forward(self, x: Tensor, hidden: Hidden = None) -> Tensor:
        h = self.norm1(x).transpose(0, 1)
        x = x + self.attention(h, h, h, attn_mask=left_out(x, hidden), need_weights=False)[0].transpose(0, 1)
        return x + self.feed(self.norm2(x))


class Encoding(nn.Module):
    """PyTorch's whole layer: what is added stands in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 24, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, hidden: Hidden = None) -> Tensor:
        made: Tensor = self.layer(x, src_mask=left_out(x, hidden))
        return made


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "block", [Weighing, *(pytest.param(b, marks=pytest.mark.slow) for b in (Multihead, TokensFirst, Encoding))]
)
def test_layers_of_torch_are_layers(block: type[nn.Module], dynamic: bool) -> None:
    """Samples and heads were on one axis, which no operator may split in a span."""
    model = m.model(block, cls=s.Looped)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss, dynamic=dynamic)))
    for site in (tg.DropSite(TASK, 1, 2, 0.5), tg.DropSite(TASK, 0, 2, 0.5, mode="freeze")):
        accelerated = tg.apply(facts, tg.Plan((site,)))
        tg.verify(accelerated).raise_if_failed()
        for inputs in (m.batch(), m.batch((5, 1), seed=3)):
            dropped, span = m.dropped(inputs["ids"]), range(site.start, site.end or 0)
            by_hand = model.loss(**inputs, span=span, dropped=dropped, hide=site.mode == "hide")
            assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10

"""Steps on features that users write between attention and feed-forward: each row is its own, drops are those by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import HIDDEN, TASK, Block

Step = Callable[[nn.Module, Tensor], Tensor]


def square(layer: nn.Module) -> Tensor:
    """``[heads, 4, 4]`` of a layer's weights."""
    return layer.out.weight.view(4, 4, 16)[..., :4]  # type: ignore[operator, union-attr]


ROW_BY_ROW: dict[str, Step] = {
    "variance": lambda _, h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + h.std(-1, keepdim=True)),
    "largest": lambda _, h: h - h.max(-1, keepdim=True).values + torch.aminmax(h, dim=-1, keepdim=True)[0],
    "median": lambda _, h: h - h.median(-1, keepdim=True).values,
    "gated": lambda _, h: F.glu(torch.cat([h, h.flip(-1)], -1)),
    "einsum": lambda s, h: torch.einsum("bsd,de->bse", h, s.out.weight),  # type: ignore[arg-type]
    "einsum of heads": lambda s, h: torch.einsum("bshd,hde->bshe", m.heads(h), square(s)).flatten(2),
    "similarity": lambda _, h: h * F.cosine_similarity(h, h + 1, dim=-1).unsqueeze(-1),
    "taken along": lambda _, h: torch.take_along_dim(h, h.argsort(-1), -1),
    "transformed": lambda _, h: torch.fft.rfft(h, dim=-1).real.sum(-1, keepdim=True) * h,
    "windows of features": lambda _, h: h.unfold(-1, 4, 4).sum(-1).repeat_interleave(4, -1),
    "a ladder": lambda _, h: h * torch.bucketize(h, torch.tensor([-1.0, 0.0, 1.0], dtype=h.dtype)),
    "added by index": lambda _, h: torch.zeros_like(h).scatter_add(-1, h.topk(3, -1).indices, h.topk(3, -1).values),
    "copies of views": lambda _, h: torch.transpose_copy(torch.slice_copy(h, 1).transpose(1, 2), 1, 2),
    "a number at some features": lambda _, h: h.index_fill(-1, torch.tensor([0, 5]), 0.5),
}  # fmt: skip
QUICK = ("einsum of heads",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ROW_BY_ROW])
def test_drops_beside_steps_on_features_are_those_by_hand(name: str) -> None:
    model = m.model(lambda: Block(step=ROW_BY_ROW[name]), layers=2)
    accelerated = tg.optimize(m.spec(model, m.batch()), tg.Plan((tg.DropSite(TASK, 0, 1, 0.5),)))
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = m.loss(model, **inputs, span=range(1), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10


MIXED: dict[str, tuple[Step, str]] = {
    "statistics of the batch": (
        lambda _, h: F.batch_norm(h.transpose(1, 2), None, None, training=True).transpose(1, 2),
        "reduces over the token axis",
    ),
    "largest token": (lambda _, h: h - h.max(1, keepdim=True).values, "reduces over the token axis"),
    "summed over tokens": (
        lambda _, h: torch.einsum("bsd,bte->bse", h, h)[..., :HIDDEN],
        "over the token axis",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_steps_that_mix_tokens_are_refused(name: str) -> None:
    step, why = MIXED[name]
    model = m.model(lambda: Block(step=step), layers=2)
    with pytest.raises(tg.IllegalRewriteError, match=why):
        tg.optimize(m.spec(model, m.batch()), tg.Plan((tg.DropSite(TASK, 0, 1, 0.5),)))

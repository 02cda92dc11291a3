"""The decoder is the stream of the tokens that text is among, not the tower, resampler or head that has more layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import HIDDEN, TASK, Block

SLOW = pytest.mark.slow
IMAGE, LAYERS, DEEP = 4, 2, 4


def seeing_all(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    q, k, v = (m.heads(x).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Tower(nn.Module):
    """An encoder with more layers than the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(seeing_all) for _ in range(DEEP))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Asking(Block):
    """A layer of a resampler: queries see one another, then the image."""

    def __init__(self) -> None:
        super().__init__(seeing_all)
        self.look = nn.MultiheadAttention(HIDDEN, m.HEADS, batch_first=True)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        x = super().forward(x)
        return x + self.look(x, image, image, need_weights=False)[0]


class PostNorm(Block):
    """A layer that normalises sums."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.out(self.attend(*self.qkv(x).chunk(3, -1), hidden)))
        return self.norm2(x + self.feed(x))


class Seeing(m.Model):
    """Image rows in front of the text; what makes them is exchanged."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.tower, self.other = Tower(), Tower()
        self.ask = nn.ModuleList(Asking() for _ in range(DEEP))
        self.queries, self.both = nn.Parameter(torch.randn(1, IMAGE, HIDDEN)), nn.Linear(2 * HIDDEN, HIDDEN)

    def image(self, patches: Tensor) -> Tensor:
        return self.tower(self.patch(patches))

    def loss(self, ids: Tensor, patches: Tensor, labels: Tensor, span: range = range(0), drop: bool = False) -> Tensor:
        x = torch.cat([self.image(patches), self.embed(ids)], 1)
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[:, 1:IMAGE:2] = drop
        for number, layer in enumerate(self.layers):
            after = layer(x, hidden if number in span else None)
            x = torch.where(hidden.unsqueeze(-1), x, after) if number in span else after
        return self.out_of(x, ids, patches, labels)

    def out_of(self, x: Tensor, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        return m.cross_entropy(self.read(x)[:, IMAGE:], labels)


class Resampled(Seeing):
    def image(self, patches: Tensor) -> Tensor:
        x = self.queries.expand(len(patches), -1, -1)
        for layer in self.ask:
            x = layer(x, self.patch(patches))
        return x


class TwoTowers(Seeing):
    def image(self, patches: Tensor) -> Tensor:
        rows = self.patch(patches)
        return self.both(torch.cat([self.tower(rows), self.other(rows.flip(1))], -1))


class Headed(Seeing):
    """A head of more layers draws patches from noise, told by the rows of the decoder."""

    def out_of(self, x: Tensor, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        rows = self.patch(patches.flip(2))
        for layer in self.ask:
            rows = layer(rows, x[:, :IMAGE])
        return super().out_of(x, ids, patches, labels) + (rows - self.patch(patches)).square().mean()


class InDepth(Seeing):
    """A transformer over the depth of codes behind every row of text, of more layers."""

    def out_of(self, x: Tensor, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        rows = torch.stack([x[:, IMAGE:], self.embed(ids), self.embed(ids.flip(1))], 2).flatten(0, 1)
        made = self.tower(rows).unflatten(0, ids.shape)[:, :, 0]
        return m.cross_entropy(self.read(made), labels)


class LooksOnly(Seeing):
    """The decoder has text alone, and looks at the image from beside."""

    def loss(self, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        x, image = self.embed(ids), self.image(patches)
        for layer, look in zip(self.layers, self.ask, strict=False):
            x = layer(x)
            x = x + look.look(x, image, image, need_weights=False)[0]
        return m.cross_entropy(self.read(x), labels)


def inputs(seed: int) -> dict[str, Tensor]:
    made = m.batch((0, 0), seed=seed)
    ids = made["ids"].masked_fill(made["ids"] == m.IMAGE_ID, 2)
    return {
        "ids": ids,
        "patches": made["patches"],
        "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 6, m.IGNORED),
    }


DESIGNS: dict[str, tuple[type[Seeing], Callable[[], nn.Module]]] = {
    "a deep tower": (Seeing, Block),
    "a deep tower, norms behind sums": (Seeing, PostNorm),
    "a deep resampler": (Resampled, Block),
    "a deep resampler, norms behind sums": (Resampled, PostNorm),
    "two towers": (TwoTowers, PostNorm),
    "a deep head": (Headed, Block),
    "a deep head, norms behind sums": (Headed, PostNorm),
    "a transformer over depth": (InDepth, PostNorm),
}


@pytest.mark.parametrize("inferred", [False, pytest.param(True, marks=SLOW)], ids=["positions", "visual inputs"])
@pytest.mark.parametrize(
    "name", [n if n == "a deep tower, norms behind sums" else pytest.param(n, marks=SLOW) for n in DESIGNS]
)
def test_the_decoder_is_found(name: str, inferred: bool) -> None:
    cls, make = DESIGNS[name]
    torch.manual_seed(0)
    model = cls([make() for _ in range(LAYERS)]).double()
    where = {"visual_inputs": ("patches",)} if inferred else {"visual": tg.VisualTokens.positions(slice(0, IMAGE))}
    task = tg.Task(lambda model, **batch: model.loss(**batch), inputs(0), reads="text", **where)  # type: ignore[arg-type]
    facts = tg.analyze(tg.capture(tg.ModelSpec(model, {TASK: task})))
    assert [block.module for block in facts[TASK].blocks] == [f"layers.{i}" for i in range(LAYERS)]
    assert (facts[TASK].visual.count, facts[TASK].unplaced) == (IMAGE, ())
    accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 0, LAYERS - 1, 0.5),), exact=True))
    for seed in (0, 1):
        by_hand = model.loss(**inputs(seed), span=range(LAYERS - 1), drop=True)
        assert m.worst(accelerated[TASK](**inputs(seed)), by_hand, model) < 1e-10


@SLOW
def test_a_decoder_that_only_looks_has_no_visual_tokens() -> None:
    torch.manual_seed(0)
    model = LooksOnly([Block() for _ in range(LAYERS)]).double()
    task = tg.Task(lambda model, **batch: model.loss(**batch), inputs(0), reads="text", visual_inputs=("patches",))
    with pytest.raises(tg.AnalysisError, match="look at the image from beside, by cross-attention"):
        tg.analyze(tg.capture(tg.ModelSpec(model, {TASK: task})))

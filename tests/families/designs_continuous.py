"""Unified designs whose images are continuous: Transfusion, BAGEL, JanusFlow, MetaQuery; by their papers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg

from . import design_parts as p
from .family import Example, Family

UNDERSTANDING, GENERATION = {"reads": "text"}, {"reads": "visual"}


def noised(latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """On the straight way from noise (time 0) to an image (time 1)."""
    t = time[:, None, None]
    return t * latents + (1 - t) * noise


def prompt_and_answer(seed: int) -> dict[str, Tensor]:
    """Ids of text with an image in it, and labels of the text behind."""
    ids = p.sequence(seed, 4, 5)
    return {"ids": ids, "patches": p.noise(seed, p.ROWS, p.PATCH), "labels": p.labels_of(ids, False)}


def to_be_drawn(seed: int, before: int = 4, after: int = 2) -> dict[str, Tensor]:
    """Ids of text with an image in it, the image, noise and a time."""
    ids = p.sequence(seed, before, after)
    patches, noise = p.noise(seed, p.ROWS, p.PATCH), p.noise(seed + 500, p.ROWS, p.PATCH)
    return {"ids": ids, "patches": patches, "noise": noise, "time": p.times(seed)}


# ------------------------------------------------------------------ Transfusion: one decoder, two losses


class Transfusion(nn.Module):
    """One decoder predicts the next token of text, and the noise of patches that see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.time = p.Backbone(), p.TimeEmbedding()
        self.enter, self.leave = nn.Linear(p.PATCH, p.HIDDEN), nn.Linear(p.HIDDEN, p.PATCH)

    def rows(self, ids: Tensor, patches: Tensor, time: Tensor) -> Tensor:
        image = ids == p.IMAGE
        features = self.enter(patches) + self.time(time).unsqueeze(1)
        return self.backbone(p.placed(self.backbone.embed(ids), image, features), p.mixed(image))

    def understanding(self, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        """The image is clean."""
        return p.next_token(self.backbone.head(self.rows(ids, patches, torch.ones_like(patches[:, 0, 0]))), labels)

    def generation(self, ids: Tensor, patches: Tensor, noise: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Diffusion by a cosine schedule: the noise is predicted where the image stands; the caption before it is text."""
        angle = (time * torch.pi / 2)[:, None, None]
        rows = self.rows(ids, angle.sin() * patches + angle.cos() * noise, time)
        image = ids == p.IMAGE
        target = p.placed(torch.zeros_like(rows[..., : p.PATCH]), image, noise)
        diffusion = p.mean_on(image, (self.leave(rows) - target).square())
        return p.next_token(self.backbone.head(rows), labels) + 5.0 * diffusion


def transfusion_batch(task: str, seed: int) -> dict[str, Tensor]:
    if task == "understanding":
        return prompt_and_answer(seed)
    inputs = to_be_drawn(seed, 5, 1)
    text = (inputs["ids"] != p.IMAGE) & (inputs["ids"].cumsum(1) > 0)
    before = (inputs["ids"] == p.IMAGE).cumsum(1) == 0
    return {**inputs, "labels": torch.where(text & before, inputs["ids"], p.IGNORED)}


def transfusion() -> Example:
    return p.example(Transfusion, transfusion_batch, understanding=UNDERSTANDING, generation={"reads": "all"})


# ------------------------------------------------------------------ JanusFlow: rectified flow behind a causal decoder


class JanusFlow(nn.Module):
    """Two encoders; a causal decoder; the velocity from noise to image is predicted. Rows of the first layer are drawn near to
    features of the encoder for understanding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.encoder, self.time = p.Backbone(), p.Encoder(), p.TimeEmbedding()
        self.enter, self.leave = nn.Linear(p.PATCH, p.HIDDEN), nn.Linear(p.HIDDEN, p.PATCH)
        self.align = p.ffn()

    def understanding(self, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        x = p.placed(self.backbone.embed(ids), ids == p.IMAGE, self.encoder(patches))
        return p.next_token(self.backbone.head(self.backbone(x, p.causal(ids))), labels)

    def generation(self, ids: Tensor, patches: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The prompt, a row for the time, the rows of the image."""
        x = torch.cat([self.backbone.embed(ids), self.time(time).unsqueeze(1)], 1)
        x = torch.cat([x, self.enter(noised(patches, noise, time))], 1)
        first = self.backbone.through(x, p.causal(x), range(1))
        rows = self.backbone.norm(self.backbone.through(first, p.causal(x), range(1, p.LAYERS)))
        velocity = self.leave(rows[:, -p.ROWS :])
        near = F.cosine_similarity(self.align(first[:, -p.ROWS :]), self.encoder(patches).detach(), -1)
        return (velocity - (patches - noise)).square().mean() - 0.5 * near.mean()


def prompted_batch(task: str, seed: int) -> dict[str, Tensor]:
    if task == "understanding":
        return prompt_and_answer(seed)
    inputs = to_be_drawn(seed)
    return {**inputs, "ids": torch.where(inputs["ids"] == p.IMAGE, 5, inputs["ids"])[:, :5]}


def janusflow() -> Example:
    drawn = {"reads": "visual", "visual": tg.VisualTokens.positions(slice(-p.ROWS, None))}
    return p.example(JanusFlow, prompted_batch, understanding=UNDERSTANDING, generation=drawn)


# ------------------------------------------------------------------ BAGEL: a mixture of transformers


class Expert(nn.Module):
    """What one modality has of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(p.HIDDEN), nn.RMSNorm(p.HIDDEN)
        self.qkv, self.out, self.ffn = nn.Linear(p.HIDDEN, 3 * p.HIDDEN), nn.Linear(p.HIDDEN, p.HIDDEN), p.ffn()


class MixtureLayer(nn.Module):
    """Rows of text and of images to be understood go through one expert, rows of images to be drawn through another one.

    They meet in attention. Which rows go where is an index, ``[rows]``, the same in all samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert(), Expert()])

    def each(self, x: Tensor, at: tuple[Tensor, ...], apply: Callable[[Expert, Tensor], Tensor]) -> Tensor:
        """Every expert on its rows."""
        parts = [(rows, apply(expert, x[:, rows])) for expert, rows in zip(self.experts, at, strict=True)]
        made = x.new_zeros(*x.shape[:2], parts[0][1].shape[-1])
        for rows, part in parts:
            made[:, rows] = part
        return made

    def forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor], *at: Tensor) -> Tensor:
        q, k, v = self.each(x, at, lambda expert, rows: expert.qkv(expert.norm1(rows))).chunk(3, -1)
        q, k = (p.rotated(p.heads_of(y, p.HEADS), rope) for y in (q, k))
        found = F.scaled_dot_product_attention(q, k, p.heads_of(v, p.HEADS), attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.each(found, at, lambda expert, rows: expert.out(rows))
        return x + self.each(x, at, lambda expert, rows: expert.ffn(expert.norm2(rows)))


class MixtureByWhere(MixtureLayer):
    """The same function: both experts see every row, and one is taken."""

    def each(self, x: Tensor, at: tuple[Tensor, ...], apply: Callable[[Expert, Tensor], Tensor]) -> Tensor:
        drawn = (torch.arange(x.shape[1])[:, None] == at[1]).any(1)
        first, second = (apply(expert, x) for expert in self.experts)
        return torch.where(drawn[:, None], second, first)


class MixtureByMask(MixtureLayer):
    """The same function: which rows go to the expert that draws is a mask, and how many is known to no shape."""

    def each(self, x: Tensor, at: tuple[Tensor, ...], apply: Callable[[Expert, Tensor], Tensor]) -> Tensor:
        drawn = (torch.arange(x.shape[1])[:, None] == at[1]).any(1).expand(x.shape[:2])
        first, second = self.experts
        read = apply(first, x[~drawn])
        made = x.new_zeros(*x.shape[:2], read.shape[-1])
        made[~drawn] = read
        made[drawn] = apply(second, x[drawn])
        return made


class Bagel(nn.Module):
    """Rectified flow in an expert of its own beside the language model's; image rows see one another."""

    def __init__(self, layer: Callable[[], nn.Module] = MixtureLayer) -> None:
        super().__init__()
        self.backbone, self.encoder, self.time = p.Backbone(layer), p.Encoder(), p.TimeEmbedding()
        self.enter, self.leave = nn.Linear(p.PATCH, p.HIDDEN), nn.Linear(p.HIDDEN, p.PATCH)

    def understanding(self, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        image = ids == p.IMAGE
        x = p.placed(self.backbone.embed(ids), image, self.encoder(patches))
        everything = torch.arange(ids.shape[1])
        rows = self.backbone(x, p.mixed(image), everything, everything[:0])
        return p.next_token(self.backbone.head(rows), labels)

    def generation(
        self, ids: Tensor, patches: Tensor, noise: Tensor, time: Tensor, text_at: Tensor, image_at: Tensor
    ) -> Tensor:
        features = self.enter(noised(patches, noise, time)) + self.time(time).unsqueeze(1)
        image = ids == p.IMAGE
        x = p.placed(self.backbone.embed(ids), image, features)
        rows = self.backbone(x, p.mixed(image), text_at, image_at)
        return (self.leave(rows[:, image_at]) - (patches - noise)).square().mean()


def bagel_batch(task: str, seed: int) -> dict[str, Tensor]:
    if task == "understanding":
        return prompt_and_answer(seed)
    inputs = to_be_drawn(seed)
    start = 3 + seed % 2  # the same in all samples
    ids = torch.where(inputs["ids"] == p.IMAGE, 5, inputs["ids"])
    ids[:, start : start + p.ROWS] = p.IMAGE
    rows = torch.arange(ids.shape[1])
    image = (rows >= start) & (rows < start + p.ROWS)
    return {**inputs, "ids": ids, "text_at": rows[~image], "image_at": rows[image]}


def bagel(layer: Callable[[], nn.Module] = MixtureLayer) -> Example:
    return p.example(partial(Bagel, layer), bagel_batch, understanding=UNDERSTANDING, generation=GENERATION)


# ------------------------------------------------------------------ MetaQuery: learned queries ask a frozen model


class Connector(nn.Module):
    """From the states of the queries to what the diffusion head is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = p.Layer(), nn.Linear(p.HIDDEN, p.HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        everything = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
        return self.out(self.layer(x, everything, p.rope_of(x, p.HIDDEN // p.HEADS)))


class MetaQuery(nn.Module):
    """A language model that sees; queries behind the prompt; a head that predicts a flow, told by their states."""

    QUERIES = 6

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.encoder = p.Backbone(), p.Encoder()
        self.queries, self.connector = nn.Parameter(torch.randn(self.QUERIES, p.HIDDEN)), Connector()
        self.time, self.enter = p.TimeEmbedding(), nn.Linear(p.PATCH, p.HIDDEN)
        self.look, self.leave = nn.MultiheadAttention(p.HIDDEN, p.HEADS, batch_first=True), nn.Linear(p.HIDDEN, p.PATCH)

    def understanding(self, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        x = p.placed(self.backbone.embed(ids), ids == p.IMAGE, self.encoder(patches))
        return p.next_token(self.backbone.head(self.backbone(x, p.causal(ids))), labels)

    def generation(self, ids: Tensor, patches: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        x = torch.cat([self.backbone.embed(ids), self.queries.expand(ids.shape[0], -1, -1)], 1)
        told = self.connector(self.backbone(x, p.causal(x))[:, -self.QUERIES :])
        rows = self.enter(noised(patches, noise, time)) + self.time(time).unsqueeze(1)
        rows = rows + self.look(rows, told, told, need_weights=False)[0]
        return (self.leave(rows) - (patches - noise)).square().mean()


def metaquery() -> Example:
    """The paper freezes the model and trains the rest; both are trained here, so that every gradient is compared."""
    drawn = {"reads": "visual", "visual": tg.VisualTokens.positions(slice(-MetaQuery.QUERIES, None))}
    return p.example(MetaQuery, prompted_batch, understanding=UNDERSTANDING, generation=drawn)


FAMILIES = [
    Family("Transfusion", "arXiv 2408.11039", transfusion, ("diffusion and next token in one decoder, mixed mask",)),
    Family("BAGEL", "arXiv 2505.14683", bagel, ("mixture of transformers: experts by index", "rectified flow")),
    Family(
        "BAGEL, by where",
        "arXiv 2505.14683",
        partial(bagel, MixtureByWhere),
        ("both experts on all rows, one is taken",),
    ),
    Family(
        "BAGEL, by mask",
        "arXiv 2505.14683",
        partial(bagel, MixtureByMask),
        ("mixture of transformers: experts take the rows of a mask",),
    ),
    Family("JanusFlow", "arXiv 2411.07975", janusflow, ("rectified flow: noise, time and image are inputs",)),
    Family(
        "MetaQuery", "arXiv 2504.06256", metaquery, ("learned queries behind the prompt, a connector, a flow head",)
    ),
]

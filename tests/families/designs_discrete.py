"""Unified designs whose images are discrete codes: Show-o, VILA-U, Liquid, Emu3; by their papers, in plain PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import design_parts as p
from .family import Example, Family

UNDERSTANDING, GENERATION = {"reads": "text"}, {"reads": "visual"}


def ids_and_labels(task: str, seed: int) -> dict[str, Tensor]:
    """Image codes as ids in a prompt with an answer, or behind a prompt."""
    ids = p.sequence(seed, 4, 5, codes=True) if task == "understanding" else p.sequence(seed, 6, 0, codes=True)
    return {"ids": ids, "labels": p.labels_of(ids, task == "generation")}


# ------------------------------------------------------------------ Emu3, Liquid: ids of one vocabulary, next token


class NextToken(nn.Module):
    """Text and image codes are ids of one vocabulary, and the next one is predicted."""

    def __init__(self, layer: type[nn.Module] | partial[nn.Module]) -> None:
        super().__init__()
        self.backbone = p.Backbone(layer)

    def understanding(self, ids: Tensor, labels: Tensor) -> Tensor:
        rows = self.backbone(self.backbone.embed(ids), p.causal(ids))
        return p.next_token(self.backbone.head(rows), labels)

    generation = understanding


def emu3() -> Example:
    """Grouped key-value heads, norms of queries and keys."""
    layer = partial(p.Layer, attention=partial(p.Attention, kv_heads=2, qk_norm=True))
    return p.example(partial(NextToken, layer), ids_and_labels, understanding=UNDERSTANDING, generation=GENERATION)


def liquid() -> Example:
    """A plain language model whose vocabulary holds the image codes as well."""
    return p.example(partial(NextToken, p.Layer), ids_and_labels, understanding=UNDERSTANDING, generation=GENERATION)


# ------------------------------------------------------------------ Show-o: discrete diffusion

MASKED = p.VOCABULARY - 1
"""The code that stands for a hidden one."""


class Parallel(nn.Module):
    """A layer whose attention and feed-forward net read the same rows, queries and keys normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.ffn = nn.LayerNorm(p.HIDDEN), p.Attention(qk_norm=True), p.ffn()

    def forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, mask, rope) + self.ffn(h)


class ShowO(nn.Module):
    """Text is causal and predicts the next token; codes see one another, some are masked, and those are predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = p.Backbone(Parallel)

    def logits(self, ids: Tensor) -> Tensor:
        rows = self.backbone(self.backbone.embed(ids), p.mixed(ids >= p.FIRST_CODE))
        return self.backbone.head(rows)

    def understanding(self, ids: Tensor, labels: Tensor) -> Tensor:
        return p.next_token(self.logits(ids), labels)

    def generation(self, ids: Tensor, masked: Tensor) -> Tensor:
        logits = self.logits(torch.where(masked, MASKED, ids))
        labels = torch.where(masked, ids, p.IGNORED)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=p.IGNORED)


def showo_batch(task: str, seed: int) -> dict[str, Tensor]:
    inputs = ids_and_labels(task, seed)
    if task == "generation":
        drawn = torch.rand(inputs["ids"].shape, generator=p.generator_of(seed)) < 0.6
        return {"ids": inputs["ids"], "masked": drawn & (inputs["ids"] >= p.FIRST_CODE)}
    return inputs


def showo() -> Example:
    return p.example(ShowO, showo_batch, understanding=UNDERSTANDING, generation=GENERATION)


# ------------------------------------------------------------------ VILA-U: residual codes, and a transformer over their depth

DEPTH = 3


class DepthTransformer(nn.Module):
    """Predicts the codes of one position, each from the row of the backbone and the codes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = p.Layer(), nn.Linear(p.HIDDEN, p.CODES)

    def forward(self, rows: Tensor, embedded: Tensor) -> Tensor:
        """Logits ``[batch, image rows, depth, codes]`` from rows ``[batch, image rows, hidden]`` and embeddings of codes."""
        before = embedded.cumsum(2)[:, :, :-1]
        x = torch.cat([rows.unsqueeze(2), before], 2).flatten(0, 1)
        x = self.layer(x, p.causal(x), p.rope_of(x, p.HIDDEN // p.HEADS))
        return self.head(x).unflatten(0, rows.shape[:2])


class VilaU(nn.Module):
    """A position of an image is a sum of several codes' embeddings; text and images predict what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.codes = p.Backbone(), nn.Embedding(p.CODES, p.HIDDEN)
        self.project, self.depth = nn.Linear(p.HIDDEN, p.HIDDEN), DepthTransformer()

    def rows(self, ids: Tensor, codes: Tensor) -> Tensor:
        features = self.project(self.codes(codes).sum(2))
        return self.backbone(p.placed(self.backbone.embed(ids), ids == p.IMAGE, features), p.causal(ids))

    def understanding(self, ids: Tensor, codes: Tensor, labels: Tensor) -> Tensor:
        return p.next_token(self.backbone.head(self.rows(ids, codes)), labels)

    def generation(self, ids: Tensor, codes: Tensor) -> Tensor:
        """The image is at the end: the row before each of its positions predicts that one's codes."""
        before = self.rows(ids, codes)[:, -p.ROWS - 1 : -1]
        logits = self.depth(before, self.codes(codes))
        return F.cross_entropy(logits.flatten(0, 2), codes.flatten())


def vilau_batch(task: str, seed: int) -> dict[str, Tensor]:
    understanding = task == "understanding"
    ids = p.sequence(seed, 4, 5) if understanding else p.sequence(seed, 6, 0)
    codes = torch.randint(p.CODES, (p.BATCH, p.ROWS, DEPTH), generator=p.generator_of(seed))
    return {"ids": ids, "codes": codes, **({"labels": p.labels_of(ids, False)} if understanding else {})}


def vilau() -> Example:
    return p.example(VilaU, vilau_batch, understanding=UNDERSTANDING, generation=GENERATION)


FAMILIES = [
    Family("Show-o", "arXiv 2408.12528", showo, ("discrete diffusion: masked codes see one another",)),
    Family("VILA-U", "arXiv 2409.04429", vilau, ("residual codes, a transformer over their depth",)),
    Family("Liquid", "arXiv 2412.04332", liquid, ("image codes in the text vocabulary",)),
    Family("Emu3", "arXiv 2409.18869", emu3, ("grouped heads, norms of queries and keys",)),
]

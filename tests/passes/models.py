"""Small decoders of every architecture that analysis must tell apart, written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg

VOCABULARY, IMAGE_ID, TOKENS, IMAGE = 12, 9, 8, 3


class Attention(nn.Module):
    """Attention with one head; with ``memory``, over the rows of another value."""

    def __init__(self, hidden: int, eager: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.eager = eager

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = self.q(x).unsqueeze(1), self.k(source).unsqueeze(1), self.v(source).unsqueeze(1)
        if self.eager:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            ones = torch.ones(x.shape[1], source.shape[1], dtype=torch.bool, device=x.device)
            weights = scores.masked_fill(~ones.tril(), -math.inf).softmax(-1)
            rows = F.dropout(weights, 0.0) @ v
        else:
            rows = F.scaled_dot_product_attention(q, k, v, is_causal=memory is None)
        return self.o(rows.squeeze(1))


def mlp(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))


class PreNorm(nn.Module):
    def __init__(self, hidden: int, eager: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention, self.mlp = Attention(hidden, eager), mlp(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Eager(PreNorm):
    """Softmax and matmul instead of a fused attention."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, eager=True)


class Parallel(PreNorm):
    """Attention and FFN read the same normalised rows and are added together."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return x + self.attention(h) + self.mlp(h)


class NormAfter(PreNorm):
    """The norm comes after the sublayer and before the addition."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attention(x))
        return x + self.norm2(self.mlp(x))


class PostNorm(PreNorm):
    """The norm of the original transformer, on the stream itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class SelfAndCross(PreNorm):
    """A second attention in the same layer, over a projection of the same rows."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.norm3, self.cross = nn.LayerNorm(hidden), Attention(hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm3(x)
        x = x + self.cross(h, h)
        return x + self.mlp(self.norm2(x))


class NoAttention(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


class NoResidual(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(self.attention(self.norm1(x))))


class TokensFirst(PreNorm):
    """Layer over ``[tokens, batch, hidden]``."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x).transpose(0, 1)
        x = x + self.attention(h).transpose(0, 1)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, layers, norm, head; its layers are not called ``layers``."""

    def __init__(
        self, block: Callable[[int], nn.Module], depth: int = 2, hidden: int = 4, scale: float | None = None
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, hidden)
        self.image = nn.Linear(2, hidden)
        self.stages = nn.ModuleDict({f"stage_{i}": nn.Sequential(block(hidden)) for i in range(depth)})
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, VOCABULARY)
        self.scale = scale

    def loss(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.scale is not None:
            x = x * self.scale
        for stage in self.stages.values():
            x = stage(x)
        labels = F.pad(ids.masked_fill(ids == IMAGE_ID, -100), (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def embedded(model: Decoder, ids: Tensor) -> Tensor:
    """A loss whose image rows are rows of the embedding table."""
    return model.loss(model.tokens(ids), ids)


def image_ids(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    """Text with three image tokens, in another place in every sample."""
    ids = torch.arange(batch * tokens).reshape(batch, tokens) % 7
    for row in range(batch):
        ids[row, 1 + row : 1 + row + IMAGE] = IMAGE_ID
    return ids


def decoder(block: Callable[[int], nn.Module], **options: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(block, **options).double()  # type: ignore[arg-type]


def spec(block: Callable[[int], nn.Module], tokens: int = TOKENS, **options: object) -> tg.ModelSpec:
    """A decoder with one task, ``"t"``, that reads text; its visual tokens are ids."""
    task = tg.Task(
        embedded,
        {"ids": image_ids(tokens=tokens)},
        visual=tg.VisualTokens.ids(input="ids", equal=IMAGE_ID),
        reads="text",
    )
    return tg.ModelSpec(decoder(block, **options), {"t": task})

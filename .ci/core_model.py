"""A pure-torch model of two tasks, which needs no extra: what .ci/core-install thins, saves, loads and runs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg

TEXT, IMAGE, WORDS, CODES, HIDDEN, HEADS = 5, 8, 20, 12, 16, 2


class Block(nn.Module):
    """One decoder block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, hidden]`` in and out."""
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Unified(nn.Module):
    """Image codes and words over one stack of blocks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words, self.codes = nn.Embedding(WORDS, HIDDEN), nn.Embedding(CODES, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.word_head, self.code_head = nn.Linear(HIDDEN, WORDS), nn.Linear(HIDDEN, CODES)


def understand(model: Unified, codes: Tensor, ids: Tensor) -> Tensor:
    """The loss of words that follow an image."""
    x = model.blocks(torch.cat([model.codes(codes), model.words(ids)], 1))
    return F.cross_entropy(model.word_head(x[:, IMAGE - 1 : -1]).flatten(0, 1), ids.flatten())


def generate(model: Unified, ids: Tensor, codes: Tensor) -> Tensor:
    """The loss of an image that follows words."""
    x = model.blocks(torch.cat([model.words(ids), model.codes(codes)], 1))
    return F.cross_entropy(model.code_head(x[:, TEXT - 1 : -1]).flatten(0, 1), codes.flatten())


def build(layers: int = 3) -> tg.ModelSpec:
    """The model with its tasks."""
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(WORDS, (2, TEXT)), "codes": torch.randint(CODES, (2, IMAGE))}
    return tg.ModelSpec(
        Unified(layers),
        {
            "understanding": tg.Task(understand, inputs, visual_inputs=("codes",), reads="text"),
            "generation": tg.Task(generate, inputs, visual_inputs=("codes",), reads="visual"),
        },
    )

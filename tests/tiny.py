"""A small pure-torch unified model for tests that need no real one: seconds to capture, with knobs for what is refused."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import tokgraph as tg

IMAGE_ID, VOCABULARY, CODES = 9, 24, 8
TEXT, IMAGE = 5, 6


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One decoder block; ``token_mixer``: a depthwise convolution over tokens, a running sum, or an operator without rule."""

    def __init__(self, hidden: int, heads: int, token_mixer: str | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.token_mixer = token_mixer
        if token_mixer == "conv":
            self.conv = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        if self.token_mixer == "conv":
            h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        elif self.token_mixer == "cumsum":
            h = h.cumsum(1)
        elif self.token_mixer == "unruled":
            h = torch.renorm(h, 2.0, 0, 1.0)
        return x + self.mlp(h)


class Unified(nn.Module):
    def __init__(self, layers: int = 3, hidden: int = 16, heads: int = 2, token_mixer: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.codes = nn.Embedding(CODES, hidden)
        self.patches = nn.Linear(4, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads, token_mixer if i == 1 else None) for i in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY)
        self.code_head = nn.Linear(hidden, CODES)

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def understand(model: Unified, ids: torch.Tensor, patches: torch.Tensor, labels: torch.Tensor):
    x = model.embed(ids)
    x = x.masked_scatter((ids == IMAGE_ID).unsqueeze(-1), model.patches(patches).flatten(0, 1))
    logits = model.head(model.backbone(x))
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten()), logits


def branching(model: Unified, ids: torch.Tensor, patches: torch.Tensor, labels: torch.Tensor):
    if patches.sum() > 0:
        return understand(model, ids, patches, labels)
    return understand(model, ids, -patches, labels)


def generate(model: Unified, ids: torch.Tensor, codes: torch.Tensor):
    x = torch.cat([model.embed(ids), model.codes(codes)], 1)
    logits = model.code_head(model.backbone(x)[:, ids.shape[1] - 1 : -1])
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten()), logits


def build(
    layers: int = 3,
    token_mixer: str | None = None,
    uneven: bool = False,
    branch: bool = False,
    batch: int = 2,
    dynamic: bool = False,
    dtype: str = "float32",
    outputs: str = "loss",
) -> tg.ModelSpec:
    torch.manual_seed(0)
    model = Unified(layers, token_mixer=token_mixer).to(getattr(torch, dtype))
    ids = torch.randint(10, VOCABULARY, (batch, TEXT + IMAGE))
    for row in range(batch):
        ids[row, 1 + row % 2 : 1 + row % 2 + IMAGE] = IMAGE_ID
    if uneven:
        ids[0, 1] = 11
    ahead = (ids == IMAGE_ID).flip(1).cumsum(1).flip(1) > 0  # the prompt: the image, and the text before it
    labels = ids.masked_fill(ahead, -100)
    patches = torch.rand(batch, IMAGE, 4, dtype=model.head.weight.dtype)
    sequence = {0: "batch", 1: "tokens"}
    return tg.ModelSpec(
        model,
        {
            "understanding": tg.Task(
                forward=branching if branch else understand,
                inputs={"ids": ids, "patches": patches, "labels": labels},
                dynamic={"ids": sequence, "labels": sequence, "patches": {0: "batch"}} if dynamic else None,
                visual=tg.VisualTokens.ids(input="ids", equal=IMAGE_ID),
                reads="text",
                outputs=outputs,
            ),
            "generation": tg.Task(
                forward=generate,
                inputs={
                    "ids": torch.randint(10, VOCABULARY, (batch, TEXT)),
                    "codes": torch.randint(0, CODES, (batch, IMAGE)),
                },
                dynamic={"ids": sequence, "codes": {0: "batch"}} if dynamic else None,
                visual_inputs=("codes",),
                reads="visual",
                outputs=outputs,
            ),
        },
    )


def missing_input() -> tg.ModelSpec:
    spec = build()
    task = spec.tasks["generation"]
    return tg.ModelSpec(
        spec.model, {"generation": tg.Task(generate, {"ids": task.inputs["ids"]}, visual_inputs=("ids",))}
    )


def wrong_type() -> int:
    return 3

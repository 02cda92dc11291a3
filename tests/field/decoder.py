"""A plain vision-language model in torch, small enough to capture in a part of a second, whose parts tests exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg

IMAGE_ID, VOCABULARY, HIDDEN, HEADS, FEATURES, IGNORED = 1, 40, 16, 4, 6, -100
TASK = "understanding"
DYNAMIC = {"ids": {0: "batch", 1: "tokens"}, "patches": {0: "batch"}, "labels": {0: "batch", 1: "tokens"}}
Hidden = Tensor | None


def heads(x: Tensor) -> Tensor:
    """``[batch, tokens, hidden]`` as ``[batch, tokens, heads, head]``."""
    return x.unflatten(-1, (HEADS, -1))


def causal(tokens: int, hidden: Hidden = None) -> Tensor:
    """``[batch or 1, tokens, tokens]`` bool: who sees whom, where rows that are hidden are no keys of those that are not."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None]
    return mask if hidden is None else mask & (~hidden[:, None, :] | hidden[:, :, None])


def plain(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    """Fused attention over ``[batch, heads, tokens, head]``."""
    q, k, v = (heads(x).transpose(1, 2) for x in (q, k, v))
    mask = causal(q.shape[2], hidden).unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm decoder layer.

    Args:
        attend: queries, keys and values, each ``[batch, tokens, hidden]``, and the hidden rows, to rows.
        step: what is done to the normalised rows before the feed-forward net.
    """

    def __init__(
        self, attend: Callable[..., Tensor] = plain, step: Callable[[nn.Module, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.feed = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        self.attend, self.step = attend, step

    def forward(self, x: Tensor, hidden: Hidden = None) -> Tensor:
        x = x + self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        h = self.norm2(x)
        return x + self.feed(h if self.step is None else self.step(self, h))


class Model(nn.Module):
    """Patches take the places of image ids; decoder; head."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed, self.patch = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(FEATURES, HIDDEN)
        self.layers, self.norm = nn.ModuleList(blocks), nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def enter(self, ids: Tensor, patches: Tensor) -> Tensor:
        return self.embed(ids).masked_scatter((ids == IMAGE_ID).unsqueeze(-1), self.patch(patches))

    def read(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def forward(self, ids: Tensor, patches: Tensor, span: range = range(0), hidden: Hidden = None) -> Tensor:
        """Logits; in the blocks of ``span`` the rows ``hidden`` are hidden from the others and do not change (by hand)."""
        x = self.enter(ids, patches)
        for number, layer in enumerate(self.layers):
            if number in span and hidden is not None:
                x = torch.where(hidden.unsqueeze(-1), x, layer(x, hidden))
            else:
                x = layer(x)
        return self.read(x)


def model(make: Callable[[], nn.Module] = Block, layers: int = 3, cls: type[Model] = Model) -> Model:
    torch.manual_seed(0)
    return cls([make() for _ in range(layers)]).double()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten())


def loss(model: Model, ids: Tensor, patches: Tensor, labels: Tensor, **by_hand: Any) -> Tensor:
    return cross_entropy(model(ids, patches, **by_hand), labels)


def batch(at: Sequence[int] = (2, 3), tokens: int = 12, image: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """One image a sample that starts at a place of its own; labels behind it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(at), tokens), generator=generator)
    for row, start in zip(ids, at, strict=True):
        row[start : start + image] = IMAGE_ID
    prompt = (ids == IMAGE_ID).flip(1).cumsum(1).flip(1) > 0
    patches = torch.randn(len(at), image, FEATURES, generator=generator, dtype=torch.float64)
    return {"ids": ids, "patches": patches, "labels": ids.masked_fill(prompt, IGNORED)}


def spec(
    model: nn.Module, inputs: dict[str, Tensor], forward: Callable[..., Any] = loss, dynamic: Any = False, **task: Any
) -> tg.ModelSpec:
    dynamic = DYNAMIC if dynamic is True else dynamic or None
    task = {"visual": tg.VisualTokens.ids(input="ids", equal=IMAGE_ID), "reads": "text", **task}
    return tg.ModelSpec(model, {TASK: tg.Task(forward=forward, inputs=inputs, dynamic=dynamic, **task)})


def dropped(ids: Tensor) -> Tensor:
    """``[batch, tokens]`` bool: every second visual token, as ``uniform`` drops at a ratio of 0.5."""
    visual = ids == IMAGE_ID
    return visual & (visual.cumsum(1) % 2 == 0)


def worst(mine: Tensor, reference: Tensor, model: nn.Module) -> float:
    """The largest difference of two losses and their gradients, relative to the largest gradient of the parameter."""
    parameters = list(model.parameters())
    found = [torch.autograd.grad(x, parameters, allow_unused=True) for x in (mine, reference)]
    errors = [float((mine - reference).detach().abs() / reference.detach().abs())]
    for a, b in zip(*found, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        errors.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)))
    return max(errors)

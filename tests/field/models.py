"""A small vision-language model whose features take the places of image ids, its batches, and the comparison with eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg

IMAGE, VOCABULARY, FEATURES, IGNORED = 99, 100, 6, -100
PATCHES = 4


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attend(self.norm1(x)))
        return x + self.dropout(self.feed(self.norm2(x)))


class Adapted(nn.Module):
    """A product of two small matrices beside a frozen layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, 2, bias=False, dtype=inner.weight.dtype)
        self.up = nn.Linear(2, inner.out_features, bias=False, dtype=inner.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


class VLM(nn.Module):
    """``forward(ids, patches) -> logits``; parts are attributes or methods for subclasses to replace."""

    def __init__(
        self,
        layers: int = 2,
        hidden: int = 16,
        heads: int = 2,
        dropout: float = 0.0,
        tower: nn.Module | None = None,
        block: Callable[[int, int, float], nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.tower = nn.Linear(FEATURES, hidden) if tower is None else tower
        self.projector = nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList(block(hidden, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def embed(self, ids: Tensor, patches: Tensor | None) -> Tensor:
        x = self.embedding(ids)
        if patches is None:
            return x
        return x.masked_scatter((ids == IMAGE).unsqueeze(-1), self.projector(self.tower(patches)).to(x.dtype))

    def hidden(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        x = self.embed(ids, patches)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(ids, patches))


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED, **options)


def understanding(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(ids, patches), labels)


def batch(
    samples: int = 2, before: int = 2, after: int = 4, seed: int = 0, patches: int = PATCHES
) -> dict[str, Tensor]:
    """Text, an image, and text whose second half is labelled."""
    g = torch.Generator().manual_seed(seed)
    first, last = (torch.randint(1, 90, (samples, n), generator=g) for n in (before, after))
    ids = torch.cat([first, torch.full((samples, patches), IMAGE), last], 1)
    labels = ids.clone()
    labels[:, : before + patches + after // 2] = IGNORED
    return {"ids": ids, "patches": torch.randn(samples, patches, FEATURES, generator=g), "labels": labels}


OPEN = {"ids": {0: "batch", 1: "tokens"}, "patches": {0: "batch"}, "labels": {0: "batch", 1: "tokens"}}


def task(
    forward: Callable[..., Any] = understanding, inputs: Mapping[str, Any] | None = None, **fields: Any
) -> tg.Task:
    """An understanding task, its sizes fixed unless ``dynamic`` is given."""
    fields.setdefault("reads", "text")
    fields.setdefault("visual", tg.VisualTokens.ids(input="ids", equal=IMAGE))
    return tg.Task(forward=forward, inputs=batch() if inputs is None else inputs, **fields)


def spec(model: nn.Module, forward: Callable[..., Any] = understanding, **fields: Any) -> tg.ModelSpec:
    return tg.ModelSpec(model, {"u": task(forward, **fields)})


def seeded(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return make()


def loss_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result["loss"] if isinstance(result, Mapping) else result[0]


def run(
    model: nn.Module, call: Callable[[], Any], seed: int = 0
) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """The loss, every gradient and every buffer after a call; gradients of before stay, buffers are put back."""
    before = {name: x.clone() for name, x in model.named_buffers()}
    kept = {p: p.grad for p in model.parameters()}
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(seed)
    loss = loss_of(call())
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    with torch.no_grad():
        for name, x in model.named_buffers():
            if not torch.equal(x, before[name]):
                x.copy_(before[name])
    for p, grad in kept.items():
        p.grad = grad
    return loss.detach(), gradients, buffers


def assert_same(model: nn.Module, eager: Callable[[], Any], call: Callable[[], Any], tolerance: float = 2e-5) -> None:
    """A call of a task gives the loss, the gradient of every parameter and the buffers that eager gives."""
    loss, gradients, buffers = run(model, eager)
    other_loss, other_gradients, other_buffers = run(model, call)
    torch.testing.assert_close(other_loss, loss, rtol=tolerance, atol=0, equal_nan=True, check_dtype=True)
    largest = max((float(g.abs().max()) for g in gradients.values() if g is not None), default=0.0)
    # A gradient that is zero in exact arithmetic (a key's bias under softmax) is the rounding of larger ones.
    floor = largest * max(1e-3, tolerance / 2)
    for name, g in gradients.items():
        mine = other_gradients[name]
        if g is None or mine is None:
            for one in (g, mine):
                assert one is None or not one.any(), f"only one of both has a gradient of {name}"
            continue
        torch.testing.assert_close(
            mine,
            g,
            rtol=0,
            atol=tolerance * max(float(g.abs().max()), floor),
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, x in buffers.items():
        torch.testing.assert_close(
            other_buffers[name], x, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )

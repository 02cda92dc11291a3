"""Decoders whose layers no chain of single values connects, each with its drops by hand: a loop that is plain to read.

A model is a list of layers and what its loop does around them. In the blocks of ``span`` rows that are ``dropped`` do not
change; where they are hidden, too, other rows do not see them. What a loss reads beside the decoder has kept rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.field import decoder as m
from tests.field.decoder import HIDDEN, Block

State = Any


class Looped(m.Model):
    """A loop over layers whose parts subclasses exchange; the state is a tensor, or a tuple of them."""

    def begin(self, x: Tensor) -> State:
        return x

    def each(self, number: int, layer: nn.Module, x: State, hidden: Tensor | None) -> State:
        return layer(x, hidden)

    def beside(self, number: int, x: State, kept: Tensor | None) -> Tensor | float:
        """A term of the loss that is read off between layers."""
        return 0.0

    def end(self, x: State) -> Tensor:
        return self.read(x)

    def loss(
        self,
        ids: Tensor,
        patches: Tensor,
        labels: Tensor,
        span: range = range(0),
        dropped: Tensor | None = None,
        hide: bool = True,
    ) -> Tensor:
        self.inputs = ids, patches, labels
        x, more = self.begin(self.enter(ids, patches)), 0.0
        for number, layer in enumerate(self.layers):
            here = dropped if number in span else None
            after = self.each(number, layer, x, here if hide else None)
            x = after if here is None else unchanged(here, x, after)
            more = more + self.beside(number, x, None if here is None else ~here)
        found = m.cross_entropy(self.end(x), labels) + more
        for module in self.modules():
            for name in {"inputs", "first", "probabilities", "kv", "sum"} & set(vars(module)):
                delattr(module, name)
        return found


def unchanged(dropped: Tensor, before: State, after: State) -> State:
    if isinstance(after, tuple):
        return tuple(unchanged(dropped, a, b) for a, b in zip(before, after, strict=True))
    return torch.where(dropped[(..., *[None] * (after.dim() - 2))], before, after)


# ------------------------------------------------------------------ features that come in again


class Again(Looped):
    """Features are added after each of the first layers (DeepStack)."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.again = nn.ModuleList(nn.Linear(m.FEATURES, HIDDEN) for _ in range(2))

    def features(self, number: int, like: Tensor) -> Tensor:
        ids, patches, _ = self.inputs
        mask = (ids == m.IMAGE_ID).unsqueeze(-1)
        return torch.zeros_like(like).masked_scatter(mask, self.again[number](patches))

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        x = layer(x, hidden)
        return x + self.features(number, x) if number < len(self.again) else x


class AgainByIndex(Again):
    """The same, written as a sum of the image's rows that takes their places."""

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        x = layer(x, hidden)
        if number < len(self.again):
            ids, patches, _ = self.inputs
            mask, x = ids == m.IMAGE_ID, x.clone()
            x[mask, :] = x[mask, :] + self.again[number](patches).flatten(0, 1)
        return x


class Taking(Block):
    """A layer that is given what is added to its input."""

    def forward(self, x: Tensor, hidden: Tensor | None = None, more: Tensor | float = 0.0) -> Tensor:
        return super().forward(x + more, hidden)


class AgainInside(Again):
    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x, hidden, self.features(number, x) if number < len(self.again) else 0.0)


class EmbeddingsEach(Looped):
    """Every layer has embeddings of the tokens of its own."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.each_layer = nn.ModuleList(nn.Embedding(m.VOCABULARY, HIDDEN) for _ in blocks)

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x, hidden, self.each_layer[number](self.inputs[0]))


class FirstToAll(Looped):
    """What enters the first layer is added behind every layer."""

    def begin(self, x: Tensor) -> Tensor:
        self.first = x
        return x

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x, hidden) + 0.1 * self.first


class FirstBeforeAll(FirstToAll):
    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(0.9 * x + 0.1 * self.first, hidden)


class InTurn(Looped):
    """The first layers are called again and again, in turn."""

    different = 2

    def each(self, number: int, layer: nn.Module, x: State, hidden: Tensor | None) -> State:
        return self.layers[number % self.different](x, hidden)


class OneAgain(InTurn):
    different = 1


class HyperInTurn(InTurn):
    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, x, x

    def end(self, x: tuple[Tensor, ...]) -> Tensor:
        return self.read(sum(x))


class HyperAgain(HyperInTurn):
    different = 1


# ------------------------------------------------------------------ losses beside the decoder


class Experts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 3)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = x + self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        h = self.norm2(x)
        self.probabilities = self.gate(h).softmax(-1)
        return x + sum(self.probabilities[..., i, None] * f(h) for i, f in enumerate(self.experts))


class Balanced(Looped):
    """The auxiliary loss of routers: means over the rows of each layer."""

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor:
        p = self.layers[number].probabilities
        p = p if kept is None else p[kept][None]
        chosen = (p > 0.35).to(p)
        return 0.1 * (chosen.flatten(0, 1).mean(0) * p.flatten(0, 1).mean(0)).sum() + p.logsumexp(-1).square().mean()


class EarlyExit(Looped):
    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        return 0.3 * m.cross_entropy(self.read(x), self.inputs[2]) if number == 1 else 0.0


class SummedExits(Looped):
    """Logits are sums over those of all layers."""

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> float:
        self.sum = (self.sum if number else 0.0) + self.read(x)
        return 0.0

    def end(self, x: Tensor) -> Tensor:
        return self.sum


# ------------------------------------------------------------------ other residuals


class PostNorm(Block):
    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.out(self.attend(*self.qkv(x).chunk(3, -1), hidden)))
        return self.norm2(x + self.feed(x))


class Scaled(Block):
    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = 0.9 * x + self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        return 0.8 * x + 0.5 * self.feed(self.norm2(x))


class Multiplied(Block):
    """Every layer's result is multiplied by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.7))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return super().forward(x, hidden) * self.factor


class Gated(Block):
    """Additions as ``addcmul``, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((HIDDEN,), 0.6))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = torch.addcmul(x, self.scale, self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden)))
        more = self.feed(self.norm2(x))
        x = x.clone()
        x += more
        return x


# ------------------------------------------------------------------ states of several values


class Reversible(Block):
    def forward(self, x: tuple[Tensor, Tensor], hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = x
        a = a + self.out(self.attend(*self.qkv(self.norm1(b)).chunk(3, -1), hidden))
        return a, b + self.feed(self.norm2(a))


class TwoStreams(Looped):
    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def end(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return self.read(x[0] + x[1])


class Hyper(Block):
    """Hyper-connections: a layer reads a mix of the streams, and mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.read, self.write = (nn.Parameter(torch.rand(s)) for s in ((3, 3), (3,), (3,)))

    def forward(self, x: tuple[Tensor, ...], hidden: Tensor | None = None) -> tuple[Tensor, ...]:
        h = sum(self.read[i] * stream for i, stream in enumerate(x))
        made = self.out(self.attend(*self.qkv(self.norm1(h)).chunk(3, -1), hidden))
        made = made + self.feed(self.norm2(h + made))
        return tuple(sum(self.mix[i, j] * x[j] for j in range(3)) + self.write[i] * made for i in range(3))


class HyperGated(Hyper):
    """The mix that a layer reads is weighed by amounts that the streams tell, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Linear(HIDDEN, 1)

    def forward(self, x: tuple[Tensor, ...], hidden: Tensor | None = None) -> tuple[Tensor, ...]:
        h = sum(stream * self.amount(self.norm2(stream)).sigmoid() for stream in x)
        made = self.out(self.attend(*self.qkv(self.norm1(h)).chunk(3, -1), hidden))
        return tuple(sum(self.mix[i, j] * x[j] for j in range(3)) + self.write[i] * made for i in range(3))


class HyperConnected(TwoStreams):
    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, x, x

    def end(self, x: tuple[Tensor, ...]) -> Tensor:
        return self.read(sum(x))


class Keeping(Block):
    """Keys and values may be those of an earlier layer."""

    def forward(self, x: Tensor, hidden: Tensor | None = None, kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, *own = self.qkv(self.norm1(x)).chunk(3, -1)
        self.kv = own if kv is None else kv
        x = x + self.out(self.attend(q, *self.kv, hidden))
        return x + self.feed(self.norm2(x))


class SharedKeys(Looped):
    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x, hidden, self.layers[1].kv if number > 1 else None)


# ------------------------------------------------------------------ layers of another kind


class Looking(nn.Module):
    """A layer in which tokens look at image features instead of at one another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.q, self.kv, self.feed = (
            nn.Linear(HIDDEN, HIDDEN),
            nn.Linear(m.FEATURES, 2 * HIDDEN),
            nn.Linear(HIDDEN, HIDDEN),
        )

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        q, k, v = (m.heads(y).transpose(1, 2) for y in (self.q(self.norm1(x)), *self.kv(features).chunk(2, -1)))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.feed(self.norm2(x))


class LookingLayers(Looped):
    """Layers that look at the image among the others."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.layers[2] = Looking()

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x, self.inputs[1]) if isinstance(layer, Looking) else layer(x, hidden)


class Gate(Block):
    """A router that chooses nothing, before the layer or behind it."""

    def __init__(self, behind: bool = False) -> None:
        super().__init__()
        self.gate, self.behind = nn.Linear(HIDDEN, 3), behind

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        after = super().forward(x, hidden)
        self.probabilities = self.gate(after if self.behind else x).softmax(-1)
        return after


class DenseFirst(Balanced):
    """The first layer has no experts."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.layers[0] = Block()

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        return super().beside(number, x, kept) if number else 0.0


class ExpertsLast(Balanced):
    """Only the last layer has experts: the loss of its router reads what is inside of it."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__([*(Block() for _ in blocks[1:]), blocks[-1]])

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        return super().beside(number, x, kept) if number == len(self.layers) - 1 else 0.0


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], type[Looped]]] = {
    "features again": (Block, Again),
    "features again, by index": (Block, AgainByIndex),
    "features again, inside": (Taking, AgainInside),
    "embeddings for each layer": (Taking, EmbeddingsEach),
    "first to all": (Block, FirstToAll),
    "first before all": (Block, FirstBeforeAll),
    "experts": (Experts, Balanced),
    "experts behind a dense layer": (Experts, DenseFirst),
    "experts in the last layer": (Experts, ExpertsLast),
    "a router before each layer": (Gate, Balanced),
    "a router behind each layer": (partial(Gate, behind=True), Balanced),
    "early exit": (Block, EarlyExit),
    "summed exits": (Block, SummedExits),
    "post-norm": (PostNorm, Looped),
    "scaled": (Scaled, Looped),
    "multiplied": (Multiplied, Looped),
    "gated": (Gated, Looped),
    "two streams": (Reversible, TwoStreams),
    "hyper-connections": (Hyper, HyperConnected),
    "hyper-connections by gates": (HyperGated, HyperConnected),
    "shared keys": (Keeping, SharedKeys),
    "layers that look": (Block, LookingLayers),
}


LOOPS: dict[str, tuple[type[Block], type[InTurn]]] = {
    "one layer": (Block, OneAgain),
    "two layers in turn": (Block, InTurn),
    "one layer of several streams": (Hyper, HyperAgain),
    "two layers of several streams": (Hyper, HyperInTurn),
}
"""Layers that are called several times."""


def loss(model: Looped, ids: Tensor, patches: Tensor, labels: Tensor, **by_hand: Any) -> Tensor:
    return model.loss(ids, patches, labels, **by_hand)


def model(structure: str, layers: int = 4) -> Looped:
    block, cls = STRUCTURES[structure]
    return m.model(block, layers, cls)

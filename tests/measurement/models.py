"""A small pure-torch decoder whose attention is given, and the attention weights that it must have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.harness import Captured

HIDDEN, HEADS, IMAGE_ID, VOCABULARY = 16, 4, 9, 24
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    def __init__(self, attend: Attend, key_heads: int) -> None:
        super().__init__()
        self.attend, self.key_heads = attend, key_heads
        width = HIDDEN // HEADS
        self.q = nn.Linear(HIDDEN, HIDDEN)
        self.kv = nn.Linear(HIDDEN, 2 * key_heads * width)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``[batch, heads, tokens, width]``; the weights are made large, so attention is not uniform."""
        k, v = self.kv(x).chunk(2, -1)
        heads = (y.unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for y in (4 * self.q(x), 4 * k, v))
        return tuple(heads)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(*self.operands(x)).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Decoder(nn.Module):
    def __init__(self, attend: Attend, key_heads: int = HEADS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(attend, key_heads) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def shifted_loss(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    """Labels move, logits stay: row ``i`` predicts token ``i + 1``."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(model.head(model.hidden(ids)).flatten(0, 1), targets.flatten())


def batch(rows: int = 2, tokens: int = 12, image: int = 5, padding: int = 2) -> dict[str, Tensor]:
    """Text, an image at another place in each row, text, a labelled answer of three tokens, padding in odd rows."""
    ids = torch.randint(10, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    labels = torch.full_like(ids, -100)
    for row in range(rows):
        ids[row, 1 + row % 2 : 1 + row % 2 + image] = IMAGE_ID
        end = tokens - padding * (row % 2)
        labels[row, end - 3 : end] = ids[row, end - 3 : end]
    return {"ids": ids, "labels": labels}


def spec(
    attend: Attend,
    forward: Callable[..., Any] = shifted_loss,
    key_heads: int = HEADS,
    dtype: torch.dtype = torch.float64,
    dynamic: bool = True,
    **fields: Any,
) -> tg.ModelSpec:
    """The decoder with one understanding task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(attend, key_heads).to(dtype)
    rows = {0: "batch", 1: "tokens"}
    given = {
        "inputs": batch(),
        "dynamic": {"ids": rows, "labels": rows} if dynamic else None,
        "visual": tg.VisualTokens.ids(input="ids", equal=IMAGE_ID),
        "reads": "text",
    }
    return tg.ModelSpec(model, {"t": tg.Task(forward, **(given | fields))})


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@cache
def captured(attend: Attend = causal, forward: Callable[..., Any] = shifted_loss, **fields: Any) -> Captured:
    """The decoder, captured once a set of arguments."""
    return Captured.of(spec(attend, forward, **fields))


def declaring(found: Captured, segments: Callable[..., Any] | None) -> tg.TaskGraph:
    """The task graph as if the task had declared these segments: capture does not look at them."""
    graph = found.program["t"]
    return replace(graph, task=replace(graph.task, segments=segments))


def weights_by_hand(
    model: Decoder, ids: Tensor, bias: Tensor | float = 0.0, scale: float = math.sqrt(HEADS / HIDDEN)
) -> list[Tensor]:
    """Attention weights ``[batch, heads, tokens, tokens]`` of each layer, in the plain formula.

    Args:
        model: the decoder.
        ids: ``[batch, tokens]``.
        bias: added to the scores.
        scale: multiplies them.
    """
    found = []
    x = model.embed(ids)
    for layer in model.layers:
        q, k, _ = layer.operands(x)
        k = k.repeat_interleave(HEADS // layer.key_heads, 1)
        found.append(((q @ k.transpose(-1, -2)) * scale + bias).softmax(-1).detach())
        x = layer(x)
    return found


def allocation_by_hand(weights: list[Tensor], queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """Equation 2 in loops: ``[layers, heads, queries, keys]``."""
    layers = []
    for layer in weights:
        mean = torch.zeros(layer.shape[1], len(queries), len(keys), dtype=torch.float64)
        for i, query in enumerate(queries):
            places = query.nonzero().tolist()
            for j, key in enumerate(keys):
                for sample, row in places:
                    mean[:, i, j] += layer[sample, :, row, key[sample]].double().sum(-1) / len(places)
        layers.append(mean)
    return torch.stack(layers)

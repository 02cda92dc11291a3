"""Building blocks of the unified designs: a small decoder in plain PyTorch, masks, losses and sequences of text and image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg

from .family import Example

HIDDEN, HEADS, LAYERS = 32, 4, 4
TEXT, IMAGE, CODES, IGNORED = 40, 41, 24, -100
"""Text ids are ``2 .. 39``; 41 stands for image features; ids of image codes begin at 42."""
FIRST_CODE = IMAGE + 1
VOCABULARY = FIRST_CODE + CODES
ROWS, PATCH, BATCH = 6, 5, 2
"""Image rows of a sample, numbers in a patch, samples."""


def ffn(hidden: int = HIDDEN) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embeddings on ``[batch, heads, tokens, head]``."""
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-b, a], -1) * rope[1]


def rope_of(x: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the rows of ``x``, ``[tokens, head]``."""
    rates = 100.0 ** -torch.arange(0, 1, 2 / head, dtype=x.dtype)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * rates
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def heads_of(x: Tensor, count: int) -> Tensor:
    """``[batch, tokens, hidden]`` as ``[batch, heads, tokens, head]``."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with rotary embeddings; fewer heads for keys and values, and norms of queries and keys, if wanted."""

    def __init__(self, kv_heads: int = HEADS, qk_norm: bool = False) -> None:
        super().__init__()
        head = HIDDEN // HEADS
        self.kv_heads = kv_heads
        self.q, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, kv_heads * head), nn.Linear(HIDDEN, kv_heads * head)
        self.q_norm, self.k_norm = (nn.RMSNorm(head) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q = rotated(self.q_norm(heads_of(self.q(x), HEADS)), rope)
        k = rotated(self.k_norm(heads_of(self.k(x), self.kv_heads)), rope)
        v = heads_of(self.v(x), self.kv_heads)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.kv_heads != HEADS)
        return self.out(found.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self, attention: Callable[[], nn.Module] = Attention, norm: Callable[[int], nn.Module] = nn.RMSNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(HIDDEN), norm(HIDDEN)
        self.attention, self.ffn = attention(), ffn()

    def forward(self, x: Tensor, mask: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, rope)
        return x + self.ffn(self.norm2(x))


class Backbone(nn.Module):
    """Embeddings, layers, a norm and a head over the whole vocabulary."""

    def __init__(self, layer: Callable[[], nn.Module] = Layer, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocabulary, HIDDEN), nn.RMSNorm(HIDDEN)
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, vocabulary, bias=False)

    def forward(self, x: Tensor, mask: Tensor, *beside: Tensor) -> Tensor:
        """Normalised rows of the last layer.

        Args:
            x: ``[batch, tokens, hidden]``.
            mask: ``[batch or 1, 1, tokens, tokens]`` bool, who sees whom.
            beside: what layers are given as well.
        """
        return self.norm(self.through(x, mask, range(len(self.layers)), *beside))

    def through(self, x: Tensor, mask: Tensor, layers: range, *beside: Tensor) -> Tensor:
        """Rows behind some of the layers."""
        rope = rope_of(x, HIDDEN // HEADS)
        for number in layers:
            x = self.layers[number](x, mask, rope, *beside)
        return x


class Encoder(nn.Module):
    """A small vision tower: patches ``[batch, rows, PATCH]`` to features of the decoder's width."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.layer, self.connect = nn.Linear(PATCH, HIDDEN), Layer(), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.patch(patches)
        everything = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
        return self.connect(self.layer(x, everything, rope_of(x, HIDDEN // HEADS)))


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time in ``[0, 1]``, ``[batch]``, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * 2.0 ** torch.arange(4, dtype=time.dtype)
        return self.net(torch.cat([angles.sin(), angles.cos()], -1))


# ------------------------------------------------------------------ masks and losses


def causal(ids: Tensor) -> Tensor:
    """``[1, 1, tokens, tokens]``: every row sees itself and what is before it."""
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]


def mixed(image: Tensor) -> Tensor:
    """``[batch, 1, tokens, tokens]``: causal, and in full among the rows of the image (``[batch, tokens]`` bool)."""
    return causal(image) | (image[:, None, :, None] & image[:, None, None, :])


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """The usual idiom: each row predicts the label behind it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def placed(like: Tensor, image: Tensor, features: Tensor) -> Tensor:
    """``like``, with features ``[batch, rows, ...]`` on the rows of the image."""
    return like.masked_scatter(image.unsqueeze(-1), features.to(like))


def mean_on(image: Tensor, errors: Tensor) -> Tensor:
    """The mean of errors ``[batch, tokens, ...]`` over the rows of the image."""
    weights = image.unsqueeze(-1).to(errors)
    return (errors * weights).sum() / (weights.sum() * errors.shape[-1])


# ------------------------------------------------------------------ batches


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + seed)


def sequence(seed: int, before: int, after: int, codes: bool = False) -> Tensor:
    """Ids of text with an image in it, ``[batch, tokens]``; where it stands differs from sample to sample and seed to seed."""
    generator, total = generator_of(seed), before + after
    ids = torch.randint(2, TEXT, (BATCH, total + ROWS), generator=generator)
    for row in range(BATCH):
        start = max(1, before - (row + seed) % 3) if after else before
        if codes:
            ids[row, start : start + ROWS] = torch.randint(FIRST_CODE, VOCABULARY - 1, (ROWS,), generator=generator)
        else:
            ids[row, start : start + ROWS] = IMAGE
    return ids


def labels_of(ids: Tensor, of_image: bool) -> Tensor:
    """Labels of the image, or of the text behind it."""
    image = ids >= IMAGE
    behind = (image.cumsum(1) == ROWS) & ~image
    return torch.where(image if of_image else behind, ids, IGNORED)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, generator=generator_of(1000 + seed))


def times(seed: int) -> Tensor:
    return torch.rand(BATCH, generator=generator_of(2000 + seed))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in training mode whose norms and biases are not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def example(
    make: Callable[[], nn.Module],
    batch: Callable[[str, int], dict[str, Tensor]],
    layers: str = "backbone.layers",
    **tasks: dict[str, object],
) -> Example:
    """An example from what its tasks are beside their inputs; each task is a method of the model.

    Without ``visual`` the visual tokens are ids from that of the image on. Open are the number of samples, and the length of
    a sequence wherever an input has a value for each of its tokens.
    """
    model = built(make)
    everything = tg.VisualTokens.ids(input="ids", low=IMAGE, high=VOCABULARY - 1)
    made = {}
    for name, task in tasks.items():
        more = task if "visual" in task or "visual_inputs" in task else {"visual": everything, **task}
        inputs = batch(name, 0)
        made[name] = tg.Task(forward=calling(name), inputs=inputs, dynamic=open_sizes(inputs), **more)  # type: ignore[arg-type]
    return Example(model, made, batch, {name: tuple(f"{layers}.{i}" for i in range(LAYERS)) for name in tasks})


def open_sizes(inputs: dict[str, Tensor]) -> dict[str, dict[int, str]]:
    """What a user would leave open."""
    tokens = inputs["ids"].shape
    return {
        name: {0: "batch", 1: "tokens"} if x.shape == tokens else {0: "batch"}
        for name, x in inputs.items()
        if len(x) == BATCH
    }


def calling(method: str) -> Callable[..., Tensor]:
    """A task's forward that is a method of its model."""

    def forward(model: nn.Module, **inputs: Tensor) -> Tensor:
        return getattr(model, method)(**inputs)

    return forward

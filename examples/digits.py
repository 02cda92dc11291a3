"""A small, complete unified vision-language model on real handwritten digits, in plain PyTorch.

One decoder-only backbone, one embedding table and one output head serve both tasks:

- *understanding*: ``<bos> look [16 patches] which digit ?`` -> ``seven odd large <end>``. The patches of an 8x8 image
  are continuous: a small encoder turns them into features, which take the places of the ``<image>`` tokens.
- *generation*: ``<bos> draw seven :`` -> 16 image tokens. The patches are discrete: a codebook turns each into one of
  64 codes, whose ids follow those of the words.

``python examples/digits.py`` thins both tasks alike with tokgraph, trains them jointly for some seconds on a CPU, reads
held-out digits and draws new ones. The images are those of ``sklearn.datasets.load_digits``: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tokgraph as tg

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OTHERS = ("<bos>", "<end>", "<image>", "look", "which", "digit", "?", "draw", ":", "odd", "even", "small", "large")
WORDS = OTHERS + DIGITS
CODES = 64
CODE_OFFSET = len(WORDS)  # smaller ids are words, ids from here on are image codes
PATCHES, PATCH = 16, 2  # an 8x8 image is a 4x4 grid of 2x2 patches, in reading order
HELD_OUT = 360
IGNORE = -100  # a label that the loss skips


def encode(*texts: str) -> Tensor:
    """Return the ids ``[texts, words]`` of texts of equal length, their words separated by spaces."""
    return torch.tensor([[WORDS.index(word) for word in text.split()] for text in texts])


QUESTION = encode("<bos> look " + "<image> " * PATCHES + "which digit ?")
ANSWERS = encode(*(f"{x} {('even', 'odd')[i % 2]} {('small', 'large')[i // 5]} <end>" for i, x in enumerate(DIGITS)))
REQUESTS = encode(*(f"<bos> draw {digit} :" for digit in DIGITS))

Inputs = dict[str, Tensor]
TaskCall = Callable[..., Mapping[str, Tensor]]


# The data: real images, a codebook fitted to them, and the two token streams.


@cache
def load(split: str = "train") -> tuple[Tensor, Tensor]:
    """Return the images ``[n, 8, 8]`` (0 to 1) of a split, ``"train"`` or ``"held-out"``, and their digits ``[n]``."""
    data = load_digits()
    rows = slice(None, -HELD_OUT) if split == "train" else slice(-HELD_OUT, None)
    return torch.from_numpy(data.images[rows] / 16).float(), torch.from_numpy(data.target[rows]).long()


def patchify(images: Tensor) -> Tensor:
    """Cut images ``[batch, 8, 8]`` into patches ``[batch, 16, 4]``, in reading order."""
    grid = images.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))  # [batch, 4, 2, 4, 2]
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor) -> Tensor:
    """Put patches ``[batch, 16, 4]`` together to images ``[batch, 8, 8]``: the inverse of `patchify`."""
    grid = patches.unflatten(2, (PATCH, PATCH)).unflatten(1, (4, 4))  # [batch, 4, 4, 2, 2]
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)


@cache
def codebook() -> Tensor:
    """Return the typical patches ``[codes, 4]`` that k-means finds in the training images."""
    patches = patchify(load()[0]).flatten(0, 1).double().numpy()
    centres = torch.from_numpy(KMeans(CODES, n_init=1, random_state=0).fit(patches).cluster_centers_)
    return centres.round(decimals=4).float()  # rounded: the threads of k-means may add up in any order


def quantise(images: Tensor) -> Tensor:
    """Return the code nearest to each patch, ``[batch, 8, 8]`` -> ``[batch, 16]`` (0 to 63)."""
    return (patchify(images).unsqueeze(2) - codebook()).square().sum(-1).argmin(-1)


def understanding_batch(images: Tensor, digits: Tensor) -> Inputs:
    """Return the inputs of `understanding_loss`: an image, a question and the answer to learn.

    Args:
        images: ``[batch, 8, 8]``, 0 to 1.
        digits: ``[batch]``, int64.

    Returns:
        ``input_ids`` ``[batch, tokens]``; ``pixel_values`` ``[batch, 8, 8]``; ``visual_mask`` ``[batch, tokens]``, true
        at the 16 image tokens; ``labels`` ``[batch, tokens]``, the answer's ids at the answer and -100 elsewhere.
    """
    question, answers = QUESTION.expand(len(digits), -1), ANSWERS[digits]
    input_ids = torch.cat([question, answers], dim=1)
    labels = torch.cat([torch.full_like(question, IGNORE), answers], dim=1)
    visual_mask = input_ids == WORDS.index("<image>")
    return {"input_ids": input_ids, "pixel_values": images, "visual_mask": visual_mask, "labels": labels}


def generation_batch(codes: Tensor, digits: Tensor) -> Inputs:
    """Return the inputs of `generation_loss`: what to draw and the image tokens to learn.

    Args:
        codes: ``[batch, 16]``, int64, 0 to 63.
        digits: ``[batch]``, int64.

    Returns:
        ``input_ids`` ``[batch, tokens]``, words and image codes in one id space; ``labels`` ``[batch, tokens]``, the
        same ids at the image tokens and -100 at the words.
    """
    requests, image_ids = REQUESTS[digits], codes + CODE_OFFSET
    labels = torch.cat([torch.full_like(requests, IGNORE), image_ids], dim=1)
    return {"input_ids": torch.cat([requests, image_ids], dim=1), "labels": labels}


# The model: an ordinary decoder. No line of it knows about tokgraph.


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions ``[tokens, head]`` to queries or keys ``[batch, heads, tokens, head]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``[batch, tokens, hidden]`` to the same shape; cos and sin are ``[tokens, head]``."""
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU, token by token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, 3 * hidden, bias=False)
        self.up = nn.Linear(hidden, 3 * hidden, bias=False)
        self.down = nn.Linear(3 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, tokens, hidden]`` to the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(hidden, eps=1e-6), Attention(hidden, heads)
        self.feed_forward_norm, self.feed_forward = nn.RMSNorm(hidden, eps=1e-6), FeedForward(hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map the residual stream ``[batch, tokens, hidden]`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class DigitsVLM(nn.Module):
    """The unified model: words, patch features and image codes in one stream, through one backbone, to one head."""

    inverse_frequency: Tensor

    def __init__(self, layers: int = 6, hidden: int = 64, heads: int = 4) -> None:
        super().__init__()
        if hidden % (2 * heads):
            raise ValueError(f"hidden={hidden} is no multiple of 2 * heads={2 * heads}; rotary positions need pairs")
        half = hidden // heads // 2
        self.embed = nn.Embedding(CODE_OFFSET + CODES, hidden)
        nn.init.normal_(self.embed.weight, std=0.02)  # on the scale of the patch features: learns faster than 1
        self.patch_encoder = nn.Sequential(nn.Linear(PATCH**2, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, CODE_OFFSET + CODES, bias=False)
        self.register_buffer("inverse_frequency", 1000.0 ** -(torch.arange(half) / half), persistent=False)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, visual_mask: Tensor | None = None
    ) -> Tensor:
        """Return a score for every word and image code to come next.

        Args:
            input_ids: ``[batch, tokens]``, words and image codes.
            pixel_values: ``[batch, 8, 8]``, 0 to 1, or None where no image is read.
            visual_mask: ``[batch, tokens]``, true at the 16 tokens of each row whose places the patches take.

        Returns:
            Logits ``[batch, tokens, words + codes]``.
        """
        x = self.embed(input_ids)
        if pixel_values is not None and visual_mask is not None:
            features = self.patch_encoder(patchify(pixel_values).to(x.dtype))  # [batch, 16, hidden]
            x = x.masked_scatter(visual_mask.unsqueeze(-1), features.to(x.dtype))
        positions = torch.arange(input_ids.shape[1], device=x.device, dtype=x.dtype)
        angles = torch.outer(positions, self.inverse_frequency).repeat(1, 2)  # [tokens, head]
        cos, sin = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy (nats) of each token's logits against the label of the *next* token.

    Args:
        logits: ``[batch, tokens, words + codes]``.
        labels: ``[batch, tokens]``, -100 where there is nothing to learn.
    """
    following = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]  # nothing follows the last token
    return F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORE)


def understanding_loss(
    model: DigitsVLM, input_ids: Tensor, pixel_values: Tensor, visual_mask: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Return the ``loss`` (scalar) and ``logits`` ``[batch, tokens, words + codes]`` of an `understanding_batch`."""
    logits = model(input_ids, pixel_values, visual_mask)
    return {"loss": next_token_loss(logits, labels), "logits": logits}


def generation_loss(model: DigitsVLM, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the ``loss`` (scalar) and ``logits`` ``[batch, tokens, words + codes]`` of a `generation_batch`."""
    logits = model(input_ids)
    return {"loss": next_token_loss(logits, labels), "logits": logits}


def build(
    layers: int = 6, hidden: int = 64, heads: int = 4, batch: int = 8, seed: int = 0, dtype: str = "float32"
) -> tg.ModelSpec:
    """Return the model, randomly initialised, and its two tasks.

    Args:
        layers: decoder blocks.
        hidden: width of the residual stream.
        heads: attention heads.
        batch: rows of the example inputs; the tasks take any number.
        seed: seeds the weights; torch's global random state is left as it was.
        dtype: name of the torch type of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsVLM(layers, hidden, heads).to(getattr(torch, dtype))
    images, digits = (part[:batch] for part in load())
    tokens = {0: "batch", 1: "tokens"}
    return tg.ModelSpec(
        model=model,
        tasks={
            "understanding": tg.Task(
                forward=understanding_loss,
                inputs=understanding_batch(images, digits),
                dynamic={"input_ids": tokens, "pixel_values": {0: "batch"}, "visual_mask": tokens, "labels": tokens},
                visual=tg.VisualTokens.mask(input="visual_mask"),
                reads="text",
                outputs="loss",
            ),
            "generation": tg.Task(
                forward=generation_loss,
                inputs=generation_batch(quantise(images), digits),
                dynamic={"input_ids": tokens, "labels": tokens},
                visual=tg.VisualTokens.ids(input="input_ids", low=CODE_OFFSET, high=CODE_OFFSET + CODES - 1),
                reads="visual",
                outputs="loss",
            ),
        },
    )


# Training and use. `tasks` maps each task's name to a callable: the plain model's or the accelerated ones.


def train(
    tasks: Mapping[str, TaskCall], parameters: Iterable[nn.Parameter], steps: int = 300, batch: int = 32, seed: int = 0
) -> dict[str, list[float]]:
    """Train both tasks jointly with one optimizer and return the loss at every step, by task.

    Args:
        tasks: ``"understanding"`` and ``"generation"``: keyword inputs -> a mapping with ``loss``.
        parameters: the model's parameters, which both tasks share.
        steps: optimizer steps; each shows one minibatch to both tasks.
        batch: images in a minibatch.
        seed: seeds the choice of minibatches.
    """
    parameters = list(parameters)
    images, digits = load()
    codes = quantise(images)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    history: dict[str, list[float]] = {"understanding": [], "generation": []}
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        losses = {
            "understanding": tasks["understanding"](**understanding_batch(images[rows], digits[rows]))["loss"],
            "generation": tasks["generation"](**generation_batch(codes[rows], digits[rows]))["loss"],
        }
        optimizer.zero_grad()
        (losses["understanding"] + losses["generation"]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for name, loss in losses.items():
            history[name].append(loss.item())
    return history


@torch.no_grad()
def evaluate(tasks: Mapping[str, TaskCall]) -> tuple[float, float]:
    """Return the share of held-out images whose whole answer is right, and the held-out generation loss (nats)."""
    images, digits = load("held-out")
    # A token's logits say what comes next. The rows are counted from the end, for rows of image tokens, which the text
    # does not read, may be missing before them.
    logits = tasks["understanding"](**understanding_batch(images, digits))["logits"][:, -ANSWERS.shape[1] - 1 : -1]
    right = (logits.argmax(-1) == ANSWERS[digits]).all(dim=1)
    generation = tasks["generation"](**generation_batch(quantise(images), digits))
    return right.double().mean().item(), generation["loss"].item()


@torch.no_grad()
def draw(generation: TaskCall, digits: Tensor, seed: int = 0) -> Tensor:
    """Sample an image for each digit, one image token after the other: ``[batch]`` -> ``[batch, 8, 8]``, 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.zeros(len(digits), PATCHES, dtype=torch.long)  # those still to be drawn are seen by no token before
    for patch in range(PATCHES):
        logits = generation(**generation_batch(codes, digits))["logits"][:, patch - PATCHES - 1, CODE_OFFSET:]
        codes[:, patch] = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return unpatchify(codebook()[codes])


def main() -> None:
    """Thin both tasks alike, train them jointly, read the held-out digits and draw some."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: 300)")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # tensors this small gain little from more, and lose much where the cores are busy
    spec = build()
    accelerated = tg.optimize(spec, policy="shared", span=(1, 5), keep=0.5)
    print(f"sharing index {accelerated.report['sharing_index']:.3f}")
    history = train(accelerated, spec.model.parameters(), steps)
    for step in range(0, steps, 50):
        print(f"step {step:4}", *(f"{name} loss {losses[step]:.3f}" for name, losses in history.items()), sep="  ")
    accuracy, loss = evaluate(accelerated)
    print(f"held-out: {accuracy:.1%} of the answers right, generation loss {loss:.3f} (uniform: {math.log(CODES):.3f})")
    for rows in zip(*draw(accelerated["generation"], torch.arange(10)), strict=True):
        print("  ".join("".join(" .:-=+*%#@"[round(9 * pixel)] for pixel in row.tolist()) for row in rows))


if __name__ == "__main__":
    main()

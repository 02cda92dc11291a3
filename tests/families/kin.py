"""What families of `transformers` share: sizes, weights that are not the initial ones, batches, the usual task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.families.family import Example

IMAGE, START, END, VOCABULARY, BATCH, IGNORED = 110, 108, 109, 120, 2, -100
HIDDEN, LAYERS = 32, 3
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
PIXELS = (BATCH, 3, 32, 32)
PATCHES = 16  # of one image of that size in patches of that size
TOKENS = {0: "batch", 1: "tokens"}


BATCHED = "experts as batched products (`set_experts_implementation`); grouped ones have no form in ONNX"


def build(
    cls: Any, config: Any, attention: str = "sdpa", dtype: torch.dtype = torch.float32, experts: str | None = None
) -> Any:
    """A model in eval mode, whose weights are moved away from their initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = cls._from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    if experts is not None:
        model.set_experts_implementation(experts)
    return model if dtype is torch.float32 else model.to(dtype)  # a cast drops the imaginary part of complex buffers


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token loss."""
    return F.cross_entropy(logits.flatten(0, 1).float(), F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten())


def listed(path: str, count: int = LAYERS) -> tuple[str, ...]:
    """The items of a list of layers."""
    return tuple(f"{path}.{i}" for i in range(count))


def ids_of(count: int, seed: int, before: Sequence[int] = (), after: Sequence[int] = (), image: int = IMAGE) -> Tensor:
    """Nine text ids with one image in each sample, at another position in each, and in each batch."""
    some = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 100, (BATCH, 9), generator=some)
    middle = torch.tensor([*before, *[image] * count, *after])
    at = [2 + (sample + seed) % 3 for sample in range(BATCH)]
    return torch.stack([torch.cat([row[:i], middle, row[i:]]) for row, i in zip(text, at, strict=True)])


def answers(ids: Tensor, last: int = 3) -> Tensor:
    """Labels of the last tokens only."""
    labels = ids.clone()
    labels[:, :-last] = IGNORED
    return labels


def understanding(
    model: nn.Module,
    layers: Sequence[str],
    *,
    count: int = PATCHES,
    pixels: Sequence[int] | None = PIXELS,
    name: str = "pixel_values",
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    image: int = IMAGE,
    fixed: Mapping[str, Any] | None = None,
    more: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    logits: Callable[..., Tensor] | None = None,
) -> Example:
    """The usual task: placeholders in `input_ids`, features from pixels, a loss over the answer.

    Args:
        model: the model.
        layers: paths of its decoder layers.
        count: image tokens of a sample.
        pixels: shape of what the tower is given; `None`: there is no tower.
        name: name of that input.
        before: ids in front of an image.
        after: ids behind it.
        image: the placeholder's id.
        fixed: arguments of the model that are the same for all batches.
        more: further inputs, made of the ids.
        dynamic: dimensions of further inputs that stay open.
        logits: `(model, **inputs) -> logits`; the model's own forward by default.
    """
    constant = dict(fixed or {})

    def batch(task: str, seed: int) -> dict[str, Tensor]:
        ids = ids_of(count, seed, before, after, image)
        inputs = {"input_ids": ids, "labels": answers(ids)}
        if pixels is not None:
            kind = next(model.parameters()).dtype
            inputs[name] = torch.randn(*pixels, generator=torch.Generator().manual_seed(seed + 50)).to(kind)
        return inputs | dict(more(ids) if more else {})

    def forward(model: Any, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
        if logits is not None:
            found = logits(model, **inputs, **constant)
        else:
            found = model(**inputs, **constant, use_cache=False).logits
        return {"loss": loss_of(found, labels), "logits": found}

    open_sizes: dict[str, Mapping[int, str]] = {"input_ids": TOKENS, "labels": TOKENS}
    if pixels is not None and pixels[0] == BATCH:
        open_sizes[name] = {0: "batch"}
    task = tg.Task(
        forward,
        batch("understanding", 0),
        dynamic=open_sizes | dict(dynamic or {}),
        visual=tg.VisualTokens.ids(input="input_ids", equal=image),
        reads="text",
    )
    return Example(model, {"understanding": task}, batch, {"understanding": tuple(layers)})


def from_features(model: Any, input_ids: Tensor, features: Tensor, **options: Any) -> Tensor:
    """Logits of a model whose features were made elsewhere: `[batch, image tokens, hidden]`, in the places of image tokens."""
    inner = model.model
    rows = model.get_input_embeddings()(input_ids)
    rows = rows.masked_scatter((input_ids == IMAGE).unsqueeze(-1), features)
    decoder = getattr(inner, "language_model", inner)
    logits: Tensor = model.lm_head(decoder(inputs_embeds=rows, use_cache=False, **options).last_hidden_state)
    return logits

"""Drops written by hand, as a careful user would: transformers' own Janus layers in a loop that leaves rows out.

Each span gathers its rows once and puts them back once, with a one-dimensional index where all samples keep the same rows,
and no mask where the model's own forward uses none. Rotary embeddings are gathered once a span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
Keep = Callable[[Tensor], Tensor]
"""``[batch, tokens]`` bool, the visual tokens -> ``[batch or 1, rows]`` int64, the positions that stay."""


@dataclass(frozen=True)
class Span:
    """Blocks ``start`` to ``stop - 1`` run on fewer rows; the others take their places again after them."""

    start: int
    stop: int
    keep: Keep


def uniform(ratio: float, count: int, same: bool) -> Keep:
    """Every ``1 / ratio``-th visual token, and all text; no value is waited for.

    Args:
        ratio: of the visual tokens that stay.
        count: visual tokens of each sample.
        same: whether all samples have their images at the same positions; the index then has one row.
    """
    kept = int(ratio * count + 0.5)

    def keep(visual: Tensor) -> Tensor:
        visual = visual[:1] if same else visual
        chosen = torch.arange(kept, device=visual.device) * count // max(kept, 1)
        stays = torch.zeros(count, dtype=torch.bool, device=visual.device).index_fill(0, chosen, True)
        alive = ~visual | stays[(visual.cumsum(1) - 1).clamp(min=0)]
        return first(alive, visual.shape[1] - count + kept)

    return keep


def random(ratio: float, count: int, same: bool) -> Keep:
    """Random-LTD (Yao et al., 2022, arXiv 2211.11586): other tokens at each layer and step, in their order."""
    kept = int(ratio * count + 0.5)

    def keep(visual: Tensor) -> Tensor:
        visual = visual[:1] if same else visual
        score = torch.rand(visual.shape, device=visual.device).masked_fill(~visual, 2.0)
        return score.topk(visual.shape[1] - count + kept, dim=1).indices.sort(dim=1).values

    return keep


def first(alive: Tensor, count: int) -> Tensor:
    """``[batch, count]``: the positions at which ``alive`` holds, ascending."""
    return (~alive).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Rows ``index`` of ``x``."""
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    shape = [index.shape[0], *([1] * (x.dim() - 1))]
    shape[dim] = index.shape[1]
    sizes = [*x.shape]
    sizes[0], sizes[dim] = index.shape
    return x.expand(index.shape[0], *x.shape[1:]).gather(dim, index.view(shape).expand(sizes))


def put(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """``x`` with its rows ``index`` replaced."""
    if index.shape[0] == 1:
        return x.index_copy(1, index[0], rows)
    return x.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), rows)


def decoder(model: nn.Module, x: Tensor, visual: Tensor, spans: Sequence[Span]) -> Tensor:
    """The language model of Janus over ``x`` ``[batch, tokens, hidden]``, on fewer rows in some spans."""
    language: Any = model.model.language_model
    positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    cos, sin = language.rotary_emb(x, position_ids=positions)
    at = {span.start: span for span in spans}
    number = 0
    while number < len(language.layers):
        span = at.get(number)
        if span is None:
            x = language.layers[number](x, position_embeddings=(cos, sin))
            number += 1
            continue
        index = span.keep(visual)
        rows, there = take(x, index), (take(cos, index), take(sin, index))
        for layer in language.layers[span.start : span.stop]:
            rows = layer(rows, position_embeddings=there)
        x = put(x, rows, index)
        number = span.stop
    return language.norm(x)


def understanding(
    model: nn.Module, spans: Sequence[Span], input_ids: Tensor, pixel_values: Tensor, labels: Tensor, **_: Tensor
) -> Tensor:
    """The loss of image and text in, text out; nothing may be padded."""
    visual = input_ids == model.config.image_token_id
    features = model.model.aligner(model.model.vision_model(pixel_values).last_hidden_state)
    x = model.get_input_embeddings()(input_ids).masked_scatter(visual.unsqueeze(-1), features)
    logits = model.lm_head(decoder(model, x, visual, spans))
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten())


def generation(model: nn.Module, spans: Sequence[Span], input_ids: Tensor, image_codes: Tensor) -> Tensor:
    """The loss of text in, image codes out."""
    text = model.get_input_embeddings()(input_ids)
    image = model.model.generation_aligner(model.model.generation_embeddings(image_codes))
    x = torch.cat([text, image], 1)
    visual = (torch.arange(x.shape[1], device=x.device) >= text.shape[1]).expand(x.shape[0], -1)
    hidden = decoder(model, x, visual, spans)[:, text.shape[1] - 1 : -1]
    logits = model.model.generation_head(hidden)
    return F.cross_entropy(logits.flatten(0, 1), image_codes.flatten())


LOSSES = {"understanding": understanding, "generation": generation}

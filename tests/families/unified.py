"""The unified models of `transformers`, and the other builders of `tests/zoo.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokgraph as tg
from tests import zoo
from tests.families.family import Example, Family
from tests.families.kin import listed

TEXT = (3, zoo.TEXT_VOCAB - 1)
CODES = (zoo.VOCAB, zoo.VOCAB + zoo.CODES - 1)
GLM = ((zoo.CODES + 3, zoo.CODES + zoo.TEXT_VOCAB - 1), (0, zoo.CODES - 1))
Range = tuple[int, int]


def _renamed(x: Tensor, ranges: tuple[Range, ...], seed: int) -> Tensor:
    """Ids and labels, moved on within their kind."""
    for low, high in ranges:
        x = torch.where((x >= low) & (x <= high), low + (x - low + 5 * seed) % (high - low + 1), x)
    return x


def _other(inputs: dict[str, Tensor], ranges: tuple[Range, ...], seed: int) -> dict[str, Tensor]:
    """Another batch of the same sizes: samples in another order where `seed` is odd, other words, codes and pixels."""
    found = {}
    for name, x in inputs.items():
        axis = 1 if name == "position_ids" else 0
        if x.is_floating_point():
            found[name] = torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + seed))
        elif name in ("position_ids", "token_type_ids"):
            found[name] = x.flip(axis) if seed % 2 else x
        else:
            kinds = ((0, zoo.CODES - 1),) if name == "image_ids" else ranges
            found[name] = _renamed(x.flip(axis) if seed % 2 else x, kinds, seed)
    return found


def example(
    make: Callable[..., zoo.ZooModel], path: str, ranges: tuple[Range, ...] = (TEXT, CODES), attention: Any = "sdpa"
) -> Example:
    """A model of the zoo."""
    made = make(attention)

    def task_of(task: zoo.ZooTask) -> tg.Task:
        kind, name, *bounds = task.visual
        visual = tg.VisualTokens.positions(slice(-task.visual_count, None))  # whole inputs stand last
        if kind == "ids":
            visual = tg.VisualTokens.ids(input=str(name), low=int(bounds[0]), high=int(bounds[1]))
        return tg.Task(task.forward, task.inputs, dynamic=task.dynamic, visual=visual, reads=task.reads)

    def batch(task: str, seed: int) -> dict[str, Tensor]:
        inputs = made.tasks[task].inputs
        return inputs if seed == 0 else _other(inputs, ranges, seed)

    layers = listed(path, zoo.LAYERS)
    return Example(made.model, {k: task_of(t) for k, t in made.tasks.items()}, batch, dict.fromkeys(made.tasks, layers))


def _family(name: str, source: str, make: Callable[..., zoo.ZooModel], path: str, **options: Any) -> Family:
    return Family(name, source, partial(example, make, path, **options))


LANGUAGE = "model.language_model.layers"
EAGER = "attention as matrix products and a softmax"
FAMILIES = [
    _family("Janus", "JanusForConditionalGeneration", zoo.janus, LANGUAGE),
    replace(
        _family("Janus, eager attention", "JanusForConditionalGeneration", zoo.janus, LANGUAGE, attention="eager"),
        notes=(EAGER,),
    ),
    _family("Chameleon", "ChameleonForConditionalGeneration", zoo.chameleon, "model.layers"),
    _family("Emu3", "Emu3ForConditionalGeneration", zoo.emu3, "model.text_model.layers"),
    _family("GLM-Image", "GlmImageForConditionalGeneration", zoo.glm_image, LANGUAGE, ranges=GLM),
    _family("InternVL", "InternVLForConditionalGeneration", zoo.internvl, LANGUAGE),
    _family("PaliGemma", "PaliGemmaForConditionalGeneration", zoo.paligemma, LANGUAGE),
    _family("Idefics3", "Idefics3ForConditionalGeneration", zoo.idefics3, "model.text_model.layers"),
    _family("SmolVLM", "SmolVLMForConditionalGeneration", zoo.smolvlm, "model.text_model.layers"),
    _family("Qwen2-VL", "Qwen2VLForConditionalGeneration", zoo.qwen2_vl, LANGUAGE),
    _family("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", zoo.qwen2_5_vl, LANGUAGE),
]

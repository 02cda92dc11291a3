"""Measured gradients of captured models, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests import tiny
from tests.harness import Captured
from tokgraph.ir.spec import split_outputs
from tokgraph.measurement.gradients import GradientSplit, measure_gradients

EXACT = 1e-10
TASKS = ("understanding", "generation")
ODD = [pytest.param(name, marks=pytest.mark.slow) for name in ("conv", "cumsum")]


@dataclass(frozen=True)
class Measured:
    """A captured model, and the gradients of its tasks in its own type."""

    captured: Captured
    splits: Mapping[str, GradientSplit]

    @classmethod
    def of(cls, captured: Captured) -> Measured:
        program, facts = captured.program, captured.facts
        return cls(captured, {task: measure_gradients(program[task], facts[task]) for task in program})


Measure = Callable[[str], Measured]


def loss_of(spec: tg.ModelSpec, task: str, inputs: Mapping[str, Any] | None = None) -> Tensor:
    return split_outputs(spec.tasks[task].forward(spec.model, **(inputs or spec.tasks[task].inputs)))[0]


def in_full(part: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A part's gradients under the names of the model: tied parameters have another, unused ones have none."""
    graph_names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in part}
    return {n: part.get(graph_names.get(id(p), n), torch.zeros_like(p)) for n, p in model.named_parameters()}


def add(part: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    part[name] = part[name] + gradient if name in part else gradient


def visual_tokens(spec: tg.ModelSpec, task: str) -> Tensor:
    """``[batch, tokens]`` bool, by the definition of each model's tasks."""
    inputs = spec.tasks[task].inputs
    if "image_codes" in inputs:  # Janus: the image comes after the text
        text, image = inputs["input_ids"], inputs["image_codes"]
        return torch.cat([torch.zeros_like(text), torch.ones_like(image)], 1).bool()
    if "codes" in inputs:
        text, image = inputs["ids"], inputs["codes"]
        return torch.cat([torch.zeros_like(text), torch.ones_like(image)], 1).bool()
    if "visual_mask" in inputs:
        return inputs["visual_mask"]
    if "ids" in inputs:
        return inputs["ids"] == tiny.IMAGE_ID
    if "pixel_values" in inputs:
        return inputs["input_ids"] == 255
    return inputs["input_ids"] >= 23  # digits: the ids of image codes follow those of the words


def disagreements(captured: Captured, task: str, split: GradientSplit) -> set[str]:
    """Parameters that pass visual tokens and get no gradient from them; it is an error the other way round."""
    shares = captured.facts[task].profile
    for name, part in split.visual.items():
        assert shares.get(name, 0) > 0 or not part.any(), f"{name} passes no visual token and gets a gradient from some"
    return {n for n, share in shares.items() if share > 0 and (n not in split.visual or not split.visual[n].any())}

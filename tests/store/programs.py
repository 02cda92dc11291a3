"""Programs that are saved: one of the plainest, and one with what models have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokgraph as tg
from tests import tiny

U, G = "understanding", "generation"
TASKS = (U, G)
THINNED = tg.Plan((tg.DropSite(U, 1, 2, 0.5), tg.DropSite(G, 1, 2, 0.5)), exact=True, policy="by hand")


class Rich(tiny.Unified):
    def __init__(self) -> None:
        super().__init__(layers=2)
        self.head.weight = self.embed.weight
        self.layers[0].mlp[0].weight.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("hidden_scale", torch.tensor(0.5), persistent=False)


def read(model: Rich, ids: Tensor, pictures: Mapping[str, Tensor], labels: Tensor, factor: float, names: Any) -> Any:
    loss, logits = tiny.understand(model, ids, pictures["patches"], labels)
    loss = loss * factor * model.scale * model.hidden_scale
    return {"loss": loss, "logits": logits, "more": (logits.amax(-1), [logits.argmax(-1), names["a"], None])}


def draw(model: Rich, ids: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return tiny.generate(model, ids, codes)


def rich_spec(dtype: str = "float64") -> tg.ModelSpec:
    base = tiny.build(layers=1, dtype=dtype, dynamic=True).tasks
    torch.manual_seed(1)
    model = Rich().to(getattr(torch, dtype))
    given = base[U].inputs
    inputs = {
        "ids": given["ids"],
        "pictures": {"patches": given["patches"]},
        "labels": given["labels"],
        "factor": 0.25,
        "names": {"a": "cat"},
    }
    return tg.ModelSpec(
        model,
        {
            U: tg.Task(read, inputs, visual=base[U].visual, reads="text", outputs="full"),
            G: tg.Task(draw, base[G].inputs, base[G].dynamic, visual_inputs=("codes",), reads="visual"),
        },
    )


class Saved:
    """A program, the folder it was saved in, and the program that was loaded from there."""

    def __init__(self, accelerated: tg.Accelerated, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.before = accelerated
        accelerated.save(folder, **options)
        self.after = tg.load_accelerated(folder)

    def inputs(self, task: str) -> dict[str, Any]:
        return dict(self.before.program[task].task.inputs)


def loss_of(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, Mapping) else result[0]


def same(actual: Any, expected: Any) -> None:
    """Equal but for the last bit (a trace may lay a tensor out otherwise), in the same structure."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        close = {torch.float64: 1e-13, torch.float32: 1e-6}.get(expected.dtype, 0.0)
        torch.testing.assert_close(actual, expected, rtol=close, atol=close)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected)
        for key in expected:
            same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            same(a, e)
    else:
        assert actual == expected

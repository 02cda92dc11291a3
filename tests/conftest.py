"""Captured models that tests share: captures take seconds, so each is made once a session, when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import nn

import tokgraph as tg
from tests.harness import Captured

torch.set_num_threads(1)  # tensors this small gain nothing from more
settings.register_profile("tokgraph", deadline=None, derandomize=True)  # the same examples everywhere, slow or not
settings.load_profile("tokgraph")

EXAMPLES = Path(__file__).parents[1] / "examples"
SOFTMAX = F.softmax


def unrounded_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None, **_: object) -> torch.Tensor:
    """The softmax in the type of ``x``: transformers' eager attention asks for float32, which hides errors below 1e-7."""
    return SOFTMAX(x, dim)


def unround_norms(model: nn.Module) -> nn.Module:
    """Let Llama's norms work in the type of the model; they cast to float32."""
    from tests.reference.janus import UnroundedRMSNorm

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__class__ = UnroundedRMSNorm
    return model


@pytest.fixture(scope="session")
def captured_janus() -> Callable[..., Captured]:
    """``(attn, dtype, batch) -> Captured``: the tiny Janus of the hand-written reference, with the forwards of the example."""
    transformers = pytest.importorskip("transformers")
    assert transformers
    from tests.reference import janus

    example = tg.load(EXAMPLES / "janus.py").tasks

    @cache
    def capture(attn: str = "sdpa", dtype: torch.dtype = torch.float64, batch: int = 3) -> Captured:
        model = janus.tiny_janus(dtype=dtype)
        model.set_attn_implementation({"text_config": attn})  # not the vision tower, which the reference runs as well
        inputs = {
            "understanding": janus.tiny_understanding_batch(batch, dtype),
            "generation": janus.tiny_generation_batch(batch),
        }
        tasks = {
            name: tg.Task(
                forward=task.forward,
                inputs=inputs[name],
                dynamic=task.dynamic,
                visual=task.visual,
                visual_inputs=task.visual_inputs,
                reads=task.reads,
            )
            for name, task in example.items()
        }
        rounding = mock.patch.object(F, "softmax", unrounded_softmax) if attn == "eager" else nullcontext()
        with rounding:
            return Captured.of(tg.ModelSpec(model, tasks))

    return capture


@pytest.fixture(scope="session")
def janus_example() -> Captured:
    """``examples/janus.py`` as it is, in float64, its norms unrounded."""
    pytest.importorskip("transformers")
    spec = tg.load(EXAMPLES / "janus.py", dtype="float64")
    unround_norms(spec.model)
    return Captured.of(spec)


@pytest.fixture(scope="session")
def digits_example() -> Captured:
    """``examples/digits.py`` in float64, with four blocks."""
    return Captured.of(tg.load(EXAMPLES / "digits.py", dtype="float64", layers=4, batch=4))


@pytest.fixture
def keeping_weights(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """A function that notes a shared model's weights; they are put back after the test."""
    noted: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []

    def note(model: nn.Module) -> nn.Module:
        noted.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
        return model

    yield note
    for model, state in noted:
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)

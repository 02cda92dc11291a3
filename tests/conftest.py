"""Captured models that tests share: captures take seconds, so each is made once a session, when first asked for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from hypothesis import settings
from torch import nn

import tokgraph as tg
from tests.harness import Captured, static
from tokgraph.cli import main

torch.set_num_threads(1)  # tensors this small gain nothing from more
gc.set_threshold(
    200_000, 20, 50
)  # traces make many objects and few circles, and to look for these takes an eighth of the time
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a module run in one process, and so do modules of one group: they share captures.

    Groups are long, and begin: the last process would otherwise go on alone.
    """
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def captured_janus() -> Callable[..., Captured]:
    """``(attn, dtype, batch, dynamic) -> Captured``: the tiny Janus of the hand-written reference, with the forwards of the
    example.
    """
    transformers = pytest.importorskip("transformers")
    assert transformers
    from tests.reference import janus

    example = tg.load(EXAMPLES / "janus.py").tasks

    @cache
    def capture(
        attn: str = "sdpa", dtype: torch.dtype = torch.float64, batch: int = 3, dynamic: bool = False
    ) -> Captured:
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
                dynamic=task.dynamic if dynamic else None,
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


def janus_spec() -> tg.ModelSpec:
    """``examples/janus.py`` in float64, its norms unrounded."""
    pytest.importorskip("transformers")
    spec = tg.load(EXAMPLES / "janus.py", dtype="float64")
    unround_norms(spec.model)
    return spec


def digits_spec() -> tg.ModelSpec:
    """``examples/digits.py`` in float64, with four blocks."""
    return tg.load(EXAMPLES / "digits.py", dtype="float64", layers=4, batch=4)


@pytest.fixture(scope="session")
def janus_example() -> Captured:
    """The Janus example; its sizes are numbers, which takes a third of the time of symbols."""
    return Captured.of(static(janus_spec()))


@pytest.fixture(scope="session")
def digits_example() -> Captured:
    """The digits example; its sizes are numbers."""
    return Captured.of(static(digits_spec()))


@pytest.fixture(scope="session")
def dynamic_janus() -> Captured:
    """The Janus example as it is: its sizes are symbols."""
    return Captured.of(janus_spec())


@pytest.fixture(scope="session")
def dynamic_digits() -> Captured:
    """The digits example as it is: its sizes are symbols."""
    return Captured.of(digits_spec())


CLI_MODULES = ("tokgraph.cli.inspect", "tokgraph.cli.plan", "tokgraph.stages", "tokgraph.comparison")


@pytest.fixture(scope="session")
def remembered() -> Callable[[str, Callable[..., Any]], Callable[..., Any]]:
    """``(key, function) -> function`` that is called once a session with the same arguments."""
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def remember(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            where = (key, *(a if isinstance(a, str) else id(a) for a in args), repr(sorted(options.items())))
            if where not in known:
                known[where] = (args, function(*args, **options))  # arguments live on, so their ids stay theirs
            return known[where][1]

        return call

    return remember


@pytest.fixture
def run(tmp_path, monkeypatch, remembered) -> Callable[..., Result]:
    """``tokgraph ARGUMENTS`` in a new folder; ``tests/tiny.py`` is loaded, captured and analysed once for each setting."""
    monkeypatch.chdir(tmp_path)
    common = sys.modules["tokgraph.cli.common"]
    fresh, tiny = common.load, remembered("load", common.load)  # type: ignore[attr-defined]
    monkeypatch.setattr(common, "load", lambda model, **o: (tiny if "/tiny.py" in model else fresh)(model, **o))
    for module, stage in product(map(sys.modules.__getitem__, CLI_MODULES), ("capture", "analyze")):
        monkeypatch.setattr(module, stage, remembered(stage, getattr(module, stage)))

    def invoke(*args: str) -> Result:
        result = CliRunner().invoke(main, list(args))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


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

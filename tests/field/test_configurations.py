"""Fields of objects that modules hold (configurations, namespaces): constants of the graph, looked at in each call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import LlamaConfig

import tokgraph as tg
from tests.field.models import VLM, assert_same, batch, seeded, spec, understanding


@dataclass
class Settings:
    tau: float = 2.0
    unread: int = 3
    step: int = 0


class Plain:
    """Without fields of its own until they are set."""

    def __init__(self) -> None:
        self.tau, self.unread, self.step = 2.0, 3, 0


class Configured(VLM):
    def __init__(self, config: Any) -> None:
        super().__init__(layers=2, hidden=8)
        self.config = config
        self.blocks[0].config = config

    def forward(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        return super().forward(ids, patches) * self.config.tau


class Counting(Configured):
    def forward(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        self.config.step += 1
        return super().forward(ids, patches) * self.config.step


class Remembering(Configured):
    """Sets a field before it reads it: no setting."""

    def forward(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        self.config.step = ids.shape[0]
        return super().forward(ids, patches) / self.config.step


CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "dataclass": Settings,
    "class": Plain,
    "namespace": lambda: SimpleNamespace(tau=2.0, step=0),
    "transformers": lambda: LlamaConfig(tau=2.0, unread=3),
}


QUICK: dict[str, Any] = {"class": (), "transformers": ()}
"""Looked at in the default run."""


def accelerated(model: type[Configured], config: Any) -> tg.Accelerated:
    return tg.optimize(spec(seeded(lambda: model(config))), "none", verify=False)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=QUICK.get(k, pytest.mark.slow)) for k in CONFIGURATIONS])
def test_a_field_that_the_forward_reads(kind: str) -> None:
    acc = accelerated(Configured, CONFIGURATIONS[kind]())
    acc["u"](**batch())
    acc.model.config.tau = 3.0
    with pytest.raises(tg.StaleError, match=r"config.tau was 2.0, it is 3.0"):
        acc["u"](**batch())
    acc.refresh()
    assert_same(acc.model, lambda: understanding(acc.model, **batch()), lambda: acc["u"](**batch()))


@pytest.mark.parametrize(
    "kind", ["dataclass", *(pytest.param(k, marks=pytest.mark.slow) for k in ("class", "transformers"))]
)
def test_a_field_that_it_does_not_read(kind: str) -> None:
    acc = accelerated(Configured, CONFIGURATIONS[kind]())
    acc.model.config.unread = 4
    assert_same(acc.model, lambda: understanding(acc.model, **batch()), lambda: acc["u"](**batch()))


def test_another_configuration() -> None:
    """An equal one is followed, another one is refused."""
    acc = accelerated(Configured, Settings())
    acc.model.config = Settings()
    acc["u"](**batch())
    acc.model.config = replace(acc.model.config, tau=5.0)
    with pytest.raises(tg.StaleError, match="config"):
        acc["u"](**batch())


def test_a_field_that_the_forward_counts_up_is_refused() -> None:
    config = Settings()
    with pytest.raises(tg.CaptureError, match=r"reads config.step, and sets it"):
        tg.capture(spec(seeded(lambda: Counting(config))))
    assert config == Settings()


def test_a_field_that_it_sets_first_is_no_setting() -> None:
    acc = accelerated(Remembering, Settings())
    acc.model.config.step = 7
    assert_same(acc.model, lambda: understanding(acc.model, **batch()), lambda: acc["u"](**batch()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_classes_are_left_as_they_were(kind: str) -> None:
    config = CONFIGURATIONS[kind]()
    before = dict(vars(type(config)))
    accelerated(Configured, config)
    assert dict(vars(type(config))) == before


def test_what_was_read_is_told() -> None:
    acc = accelerated(Configured, Settings())
    constants = acc.program["u"].conditions.constants
    assert constants["config"] == {"tau": 2.0}
    assert isinstance(acc.model, nn.Module)

"""A live program under changes between calls, in any order: every call gives what eager gives, or an error with a code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokgraph as tg
from tests.field.models import VLM, VOCABULARY, assert_same, batch, seeded, spec, understanding


class Adapted(nn.Module):
    """A linear layer with an adapter beside it that can be switched off, merged and swapped."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.enabled, self.active = base, True, ["a"]
        self.adapters = nn.ModuleDict({k: nn.Linear(base.in_features, base.out_features, bias=False) for k in "ab"})
        self.scaling = {"a": 0.5, "b": 0.25}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for key in self.active if self.enabled else ():
            y = y + self.adapters[key](x) * self.scaling[key]
        return y


class Model(VLM):
    def __init__(self) -> None:
        super().__init__(layers=2, hidden=8, dropout=0.1)
        self.head = Adapted(self.head)
        self.tau = 1.0
        self.register_buffer("shift", torch.zeros(VOCABULARY))

    def forward(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        return super().forward(ids, patches) * self.tau + self.shift


def convert(dtype: torch.dtype) -> Callable[[Model], Any]:
    return lambda model: model.to(dtype)


def another(module: str) -> Callable[[Model], Any]:
    def change(model: Model) -> None:
        old = model.get_submodule(module)
        parent, _, name = module.rpartition(".")
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None, dtype=old.weight.dtype)
        setattr(model.get_submodule(parent), name, new)

    return change


def parameter(name: str) -> Callable[[Model], Any]:
    def change(model: Model) -> None:
        path, _, leaf = name.rpartition(".")
        old = model.get_parameter(name)
        setattr(model.get_submodule(path), leaf, nn.Parameter(torch.randn_like(old), requires_grad=old.requires_grad))

    return change


CHANGES: dict[str, Callable[[Model], Any]] = {
    "train": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "one block in eval": lambda model: model.blocks[1].eval(),
    "load": lambda model: model.load_state_dict({k: x * 1.1 for k, x in model.state_dict().items()}),
    "load assigned": lambda model: model.load_state_dict(
        {k: x * 0.9 for k, x in model.state_dict().items()}, assign=True
    ),
    "another parameter": parameter("blocks.0.up.weight"),
    "another module": another("projector"),
    "freeze": lambda model: model.tower.requires_grad_(False),
    "train the tower": lambda model: model.tower.requires_grad_(True),
    "buffer in place": lambda model: model.shift.add_(0.1),
    "buffer rebound": lambda model: setattr(model, "shift", torch.randn_like(model.shift)),
    "setting": lambda model: setattr(model, "tau", model.tau + 0.5),
    "adapter off": lambda model: setattr(model.head, "enabled", False),
    "adapter on": lambda model: setattr(model.head, "enabled", True),
    "adapter swapped": lambda model: model.head.active.__setitem__(0, "b"),
    "adapter scaled": lambda model: model.head.scaling.update(a=2.0),
    "adapter merged": lambda model: model.head.base.weight.data.add_(model.head.adapters["a"].weight.data),
    "hook": lambda model: model.blocks[0].register_forward_hook(lambda module, args, output: output + 0.1),
    "double": convert(torch.float64),
    "float": convert(torch.float32),
    "optimizer step": lambda model: [p.data.mul_(1.01) for p in model.parameters()],
}
REGIONS = ("none", "bfloat16", "no_grad")


def check(acc: tg.Accelerated, seed: int, samples: int, region: str) -> None:
    model, b = acc.model, batch(samples, seed=seed)
    b["patches"] = b["patches"].to(model.head.base.weight.dtype)

    def within(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def inside() -> Tensor:
            with contextlib.ExitStack() as stack:
                if region == "bfloat16":
                    stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
                if region == "no_grad":
                    stack.enter_context(torch.no_grad())
                return call()

        return inside

    tolerance = 5e-2 if region == "bfloat16" else 2e-5
    assert_same(model, within(lambda: understanding(model, **b)), within(lambda: acc["u"](**b)), tolerance)


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=2),
            st.integers(0, 3),
            st.sampled_from([2, 2, 3]),
            st.sampled_from(REGIONS),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_every_call_is_right_or_refused(steps: list[tuple[list[str], int, int, str]]) -> None:
    acc = tg.optimize(spec(seeded(Model)), "none", verify=False)
    for names, seed, samples, region in steps:
        for name in names:
            with torch.no_grad():
                CHANGES[name](acc.model)
        try:
            check(acc, seed, samples, region)
        except tg.BatchError:
            assert samples != 2
        except tg.StaleError:
            acc.refresh()
            check(acc, seed, 2, region)

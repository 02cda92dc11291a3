"""What the numeric tests share: a captured model with its facts, and comparisons relative to a tensor's own magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

import tokgraph as tg
from tests import tiny

ZERO = 1e-4  # a smaller largest magnitude counts as this: gradients of key biases are zero but for rounding


@dataclass(frozen=True)
class Captured:
    """A captured model, its facts analysed once."""

    spec: tg.ModelSpec
    program: tg.Program
    facts: tg.Facts

    @classmethod
    def of(cls, spec: tg.ModelSpec) -> Captured:
        program = tg.capture(spec)
        return cls(spec, program, tg.analyze(program))

    @property
    def model(self) -> nn.Module:
        return self.spec.model

    def apply(self, plan: tg.Plan, *tasks: str) -> tg.Accelerated:
        """The plan on the named tasks only, all of them by default."""
        graphs = {task: self.program[task] for task in tasks or self.program}
        return tg.apply(tg.Program(self.spec, graphs), plan, facts=self.facts)


def static(spec: tg.ModelSpec) -> tg.ModelSpec:
    """The same model and tasks, with no dynamic dimension."""
    return tg.ModelSpec(spec.model, {name: replace(task, dynamic=None) for name, task in spec.tasks.items()})


@cache
def captured_tiny(layers: int, dynamic: bool = False) -> Captured:
    """The pure-torch model of ``tests/tiny.py``, captured once a session: leave its weights as they are.

    Its sizes are numbers, unless a test is about symbols: these take three times as long.
    """
    return Captured.of(tiny.build(layers=layers, dynamic=dynamic))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter, zero where ``loss`` does not depend on it."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(parameters.items(), found, strict=True)
    }


def assert_close(actual: Tensor, expected: Tensor, name: str, tolerance: float, zero: float = ZERO) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=zero)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same_gradients(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, zero: float = ZERO
) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], name, tolerance, zero)


def random_hash(sample: int, rank: int, seed: int) -> int:
    """Return the 32-bit hash that ``tokgraph::random_score`` documents, in plain numbers."""
    x = (sample * 0x9E3779B1 + rank + seed * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)

"""Every stage on every device: a model that is there when it is captured, and one that goes there afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokgraph as tg
from tests import tiny
from tests.devices import second
from tokgraph.ir.tensors import held

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


class Tabled(tiny.Unified):
    """With what stays behind when a model is moved: a table that export lifts, and calls that name the model's device."""

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1], device=x.device).unsqueeze(-1)
        x = x + 0.1 * (at + torch.ones(1, device=x.device, dtype=x.dtype))
        table = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=x.dtype).to(x.device)
        return super().backbone(x * table.repeat(x.shape[-1] // 4))


def build() -> tg.ModelSpec:
    spec = tiny.build(layers=3, dtype="float64")
    torch.manual_seed(0)
    return tg.ModelSpec(Tabled(3).double(), spec.tasks)


def inputs(task: tg.Task, device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in task.inputs.items()}


def results(
    program: Mapping[str, Any], spec: tg.ModelSpec, device: torch.device, model: nn.Module
) -> list[torch.Tensor]:
    """Losses and gradients of all tasks, on the CPU."""
    found = []
    for name, task in spec.tasks.items():
        loss = program[name](**inputs(task, device))[0]
        assert loss.device == device
        used = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, used, allow_unused=True, materialize_grads=True)
        found += [x.detach().cpu() for x in (loss, *grads)]
    return found


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.fixture(scope="module", autouse=True)
def elsewhere(device: torch.device) -> None:
    """All other tests run on the CPU: here it only stands for a device that cannot be made."""
    if device.type == "cpu" and second.missing() is None:
        pytest.skip("the second device is another one")


@pytest.fixture(scope="module")
def reference() -> dict[str, list[torch.Tensor]]:
    """What the CPU gives, by policy."""
    spec = build()
    found = {}
    for policy in ("exact", "shared"):
        found[policy] = results(tg.optimize(spec, policy, verify=False), spec, CPU, spec.model)
    return found


@pytest.mark.parametrize("policy", ["exact", "shared"])
def test_a_model_that_is_there(
    device: torch.device, policy: str, reference: dict[str, list[torch.Tensor]], tmp_path: Path
) -> None:
    """Captured, analysed, rewritten, verified, saved; loaded on the CPU, and moved back."""
    spec = build()
    spec.model.to(device)
    accelerated = tg.optimize(spec, policy)
    assert accelerated.verification is not None
    assert accelerated.verification.passed
    assert_same(results(accelerated, spec, device, spec.model), reference[policy])
    accelerated.save(tmp_path / "saved")
    loaded = tg.load_accelerated(tmp_path / "saved")
    assert_same(results(loaded, spec, CPU, loaded.model)[:1], reference[policy][:1])
    loaded.model.to(device)
    assert_same(results(loaded, spec, device, loaded.model)[:1], reference[policy][:1])
    assert tg.verify(loaded).passed


def test_a_model_that_goes_there(device: torch.device, reference: dict[str, list[torch.Tensor]]) -> None:
    """After ``optimize``; between ``capture`` and ``apply``; and back."""
    spec = build()
    facts = tg.analyze(tg.capture(spec))
    accelerated = tg.apply(facts, tg.make_plan(facts, "shared"))
    assert_same(results(accelerated, spec, CPU, spec.model), reference["shared"])
    spec.model.to(device)
    assert tg.verify(accelerated).passed
    assert_same(results(accelerated, spec, device, spec.model), reference["shared"])
    later = tg.apply(facts, tg.make_plan(facts, "shared"))
    assert_same(results(later, spec, device, spec.model), reference["shared"])
    spec.model.to(CPU)
    assert_same(results(accelerated, spec, CPU, spec.model), reference["shared"])


@pytest.mark.parametrize("policy", ["random-ltd", "fastv", "himix-hmgen-share-partial"])
def test_what_a_plan_adds_goes_there(device: torch.device, policy: str) -> None:
    """Own projections, steps, and selectors that draw or score."""
    options = {"fastv": {"k": 1}}.get(policy, {})
    spec = build()
    accelerated = tg.optimize(spec, policy, verify=False, **options)
    before = results(accelerated, spec, CPU, spec.model)
    for module in accelerated.values():
        module.step = 0
    spec.model.to(device)
    assert_same(results(accelerated, spec, device, spec.model), before)
    assert all(p.device == device for p in accelerated.own_parameters.values())
    draws = [module for module in accelerated.values() if held(module.graph_module, "tokgraph_step") is not None]
    assert all(module.step == 1 for module in draws)
    assert tg.verify(accelerated).passed


def test_batches(device: torch.device) -> None:
    """The example batch is copied to the model; the batch of a call is the caller's affair, and the error says so."""
    spec = build()
    there = {name: tg.Task(**{**vars(task), "inputs": inputs(task, device)}) for name, task in spec.tasks.items()}
    accelerated = tg.optimize(tg.ModelSpec(spec.model, there), "exact", verify=False)
    results(accelerated, spec, CPU, spec.model)
    if device != CPU:
        with pytest.raises(tg.BatchError, match=rf"input 'ids' is on {device}, and the model on cpu"):
            accelerated["understanding"](**there["understanding"].inputs)


def test_measures(device: torch.device) -> None:
    spec = build()
    spec.model.to(device)
    facts = tg.analyze(tg.capture(spec))
    mine = tg.measure(facts).tasks["understanding"].allocation.mass
    spec.model.to(CPU)
    torch.testing.assert_close(tg.measure(facts).tasks["understanding"].allocation.mass, mine)


def test_exports(device: torch.device, tmp_path: Path) -> None:
    """Files know no device; outputs and gradients are compared with those of the model where it is."""
    pytest.importorskip("onnxruntime")
    spec = tiny.build(layers=2)
    spec = tg.ModelSpec(Tabled(2), {"understanding": spec.tasks["understanding"]})
    spec.model.to(device)
    accelerated = tg.optimize(spec, "exact", verify=False)
    accelerated.export_onnx(tmp_path / "there", ["forward", "train-step"])
    spec.model.to(CPU)
    accelerated.export_onnx(tmp_path / "back", ["forward"])

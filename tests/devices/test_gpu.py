"""What only a GPU has: autocast on it, compiled graphs, CUDA graphs, ONNX Runtime's CUDA provider, profiles.

Each test has the CPU as its counterpart where there is one, so that it is known to be right but for the device.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tokgraph as tg
from tests import tiny
from tests.devices.test_anywhere import CPU, assert_same, build, inputs
from tokgraph.export.session import Session

pytestmark = pytest.mark.slow
PLACES = [CPU.type, pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param, 0) if request.param == "cuda" else CPU


def test_autocast(place: torch.device) -> None:
    """A program of the CPU in a region of the device that its model went to."""
    spec = tiny.build(layers=2)
    accelerated = tg.optimize(spec, "none", verify=False)
    spec.model.to(place)
    task = spec.tasks["generation"]
    batch = inputs(task, place)
    with torch.autocast(place.type, torch.bfloat16):
        mine, eager = accelerated["generation"](**batch)[0], task.forward(spec.model, **batch)[0]
    torch.testing.assert_close(mine, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(place: torch.device, mode: str) -> None:
    """``reduce-overhead`` records CUDA graphs, which a step that waits for the device, or reads from the CPU, breaks."""
    spec = build()
    spec.model.to(place)
    plain, accelerated = (tg.optimize(spec, "shared", verify=False)["understanding"] for _ in range(2))
    accelerated.compile(mode, backend="inductor" if place.type == "cuda" else "aot_eager")  # which needs no compiler
    batch = inputs(spec.tasks["understanding"], place)
    used = [p for p in spec.model.parameters() if p.requires_grad]

    def step(task: tg.TaskModule) -> list[torch.Tensor]:
        loss = task(**batch)[0]
        grads = torch.autograd.grad(loss, used, allow_unused=True, materialize_grads=True)
        return [x.detach().clone() for x in (loss, *grads)]

    for _ in range(4):  # the first run warms up, the second records
        assert_same(step(accelerated), step(plain))
        with torch.no_grad():
            for p in used:
                p.mul_(1.01)  # as an optimizer does: what was recorded reads what is there now


def test_onnx_runtime(place: torch.device, tmp_path: Path) -> None:
    """Loss and gradients of a training step by ONNX Runtime on the device, against PyTorch on the device."""
    pytest.importorskip("onnxruntime")
    spec = tiny.build(layers=2)
    spec = tg.ModelSpec(spec.model, {"understanding": spec.tasks["understanding"]})
    spec.model.to(place)
    accelerated = tg.optimize(spec, "exact", verify=False)
    accelerated.export_onnx(tmp_path / "out", "train-step")
    batch = inputs(spec.tasks["understanding"], CPU)
    session = Session(tmp_path / "out" / "understanding.train-step.onnx", place.type)
    found = session.run(session.feeds(batch))
    loss = accelerated["understanding"](**inputs(spec.tasks["understanding"], place))[0]
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach().cpu(), rtol=1e-4, atol=1e-5)
    for name, p in spec.model.named_parameters():
        if f"grad/{name}" in found:
            torch.testing.assert_close(found[f"grad/{name}"], p.grad.cpu(), rtol=1e-3, atol=1e-5)


def test_profile(place: torch.device, run) -> None:
    """A model file, and a saved program, on the device."""
    options = ("--device", place.type, "--runs", "1", "--warmup", "0", "--graph", "train-step", "--json")
    result = run("profile", tiny.__file__, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["device"] == place.type
    assert all(graph["seconds"]["median"] > 0 for graph in found["graphs"])

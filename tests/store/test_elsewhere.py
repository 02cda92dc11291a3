"""Saved programs in a process that does not have the model's code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests.harness import Captured, gradients
from tests.store.programs import loss_of

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

LOAD = """
import sys
for name in ("transformers", "tests"):
    sys.modules[name] = None
import torch
import tokgraph as tg
torch.set_num_threads(1)
program = tg.load_accelerated(sys.argv[1])
found = {}
for task in program:
    result = program[task](**program.program.spec.tasks[task].inputs)
    loss = result["loss"] if isinstance(result, dict) else result[0]
    named = [(name, p) for name, p in program.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    found[task] = (loss.detach(), {name: g for (name, _), g in zip(named, grads) if g is not None})
assert "transformers" not in {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
torch.save(found, sys.argv[2])
"""


def load_elsewhere(folder: Path, out: Path) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Load and differentiate in a process that cannot import the model's code."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(out)], capture_output=True, text=True, cwd=out.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[Tensor, dict[str, Tensor]]] = torch.load(out)
    return found


def check_elsewhere(program: tg.Accelerated, folder: Path, out: Path, model: nn.Module) -> None:
    program.save(folder)
    found = load_elsewhere(folder, out)
    for task, (loss, grads) in found.items():
        right = loss_of(program[task](**dict(program.program[task].task.inputs)))
        torch.testing.assert_close(loss, right.detach(), rtol=1e-12, atol=0)
        expected = gradients(model, right)
        assert len(grads) > 20
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_janus_without_transformers(janus_example: Captured, tmp_path: Path) -> None:
    plan = tg.make_plan(janus_example.program, "shared", facts=janus_example.facts, span=(1, 3), keep=0.5)
    check_elsewhere(janus_example.apply(plan), tmp_path / "program", tmp_path / "found.pt", janus_example.model)


@pytest.mark.slow
def test_digits_without_the_example(digits_example: Captured, tmp_path: Path) -> None:
    plan = tg.make_plan(digits_example.program, "shared", facts=digits_example.facts, span=(1, 3), keep=0.5)
    check_elsewhere(digits_example.apply(plan), tmp_path / "program", tmp_path / "found.pt", digits_example.model)

"""Training steps of the two examples under two policies: gradients as autograd's, and weights stored once at size."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import tokgraph as tg
from tests.export.conftest import run_file
from tests.export.test_onnx import assert_alike, loss_and_gradients, wider
from tests.harness import Captured

pytest.importorskip("onnx")
EXAMPLES = Path(__file__).parents[2] / "examples"


@cache
def captured(example: str) -> Captured:
    if example == "janus":
        pytest.importorskip("transformers")
        return Captured.of(tg.load(EXAMPLES / "janus.py"))
    return Captured.of(tg.load(EXAMPLES / "digits.py", layers=4, batch=4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "task", "policy"),
    [
        ("digits", "generation", "himix-hmgen-share-partial"),
        ("janus", "understanding", "himix-hmgen-share-partial"),
    ],
)
def test_training_steps_of_the_examples(example: str, task: str, policy: str, tmp_path: Path) -> None:
    held = captured(example)
    plan = tg.make_plan(held.program, policy, facts=held.facts)
    accelerated = held.apply(plan, task)
    files = accelerated.export_onnx(tmp_path, ("forward", "train-step"))["files"]
    for file in files.values():
        for check in file["checks"]:
            assert check["output_error"] <= 1e-5
            assert check["gradient_error"] <= 1e-4
    inputs = wider(dict(held.spec.tasks[task].inputs))
    module = accelerated[task]
    leaves = accelerated.program[task].flatten(inputs)
    expected = loss_and_gradients(
        module.task_graph.named_parameters(), lambda **_: module.graph_module(*leaves), inputs
    )
    assert_alike(run_file(tmp_path / f"{task}.train-step.onnx", inputs), expected, 1e-4)
    for name, ours in (("loss", expected["loss"]),):
        found = run_file(tmp_path / f"{task}.forward.onnx", inputs)[name]
        torch.testing.assert_close(found, ours, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_graphs_of_ten_million_parameters_take_no_more_disk_than_their_weights(tmp_path: Path) -> None:
    spec = tg.load(EXAMPLES / "digits.py", layers=3, hidden=560, heads=8, batch=2)
    raw = sum(x.numel() * x.element_size() for x in spec.model.state_dict().values())
    assert sum(p.numel() for p in spec.model.parameters()) > 10e6
    program = tg.capture(spec)
    facts = tg.analyze(program)
    accelerated = tg.apply(program, tg.make_plan(program, "shared", facts=facts), facts=facts)
    accelerated.export_onnx(tmp_path, "train-step")
    assert len(list(tmp_path.glob("*.train-step.onnx"))) == 2
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert raw <= total <= 1.05 * raw

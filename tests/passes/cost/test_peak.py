"""Peak memory of a training step, from the graph, against what PyTorch's profiler sees allocated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tokgraph as tg
from tests.harness import Captured
from tests.passes.tools import TASKS
from tokgraph.ir.spec import split_outputs
from tokgraph.passes.cost.peak import Peak, peak_memory

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it
EXAMPLES = ("digits_example", pytest.param("janus_example", marks=pytest.mark.slow))


def allocated(step: Callable[[], Any], model: torch.nn.Module, folder: Path) -> tuple[int, int]:
    """Bytes in use at most during forward and backward, and after them, beyond those before."""
    for again in (True, False):  # the first run makes what later runs find
        model.zero_grad(set_to_none=True)
        if again:
            split_outputs(step())[0].backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = split_outputs(step())[0]
        loss.backward()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    model.zero_grad(set_to_none=True)
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    now = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most, now


@pytest.mark.filterwarnings("ignore:.*profiler")
@pytest.mark.parametrize("policy", ["none", "shared"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", EXAMPLES)
def test_the_peak_is_what_a_run_allocates(
    model: str, task: str, policy: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    example: Captured = request.getfixturevalue(model)
    accelerated = tg.apply(example.facts, tg.make_plan(example.facts, policy))
    found = peak_memory(accelerated.program[task])
    inputs = example.spec.tasks[task].inputs
    most, after = allocated(lambda: accelerated[task](**inputs), example.model, tmp_path)
    assert found.bytes == pytest.approx(most, rel=0.02)
    assert found.gradients == pytest.approx(after, rel=1e-3, abs=64)


class Sines(nn.Module):
    """Two rows of 1,024 numbers through five sines, of which each keeps what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(2, 1024))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.start
        for _ in range(5):
            x = x.sin()
        return F.cross_entropy(x, torch.zeros_like(x[:, 0], dtype=torch.int64))


def peak_of(model: nn.Module, **inputs: Tensor) -> Peak:
    task = tg.Task(lambda model, **inputs: model(**inputs), inputs, visual=tg.VisualTokens.positions(slice(0, 1)))
    return peak_memory(tg.capture(tg.ModelSpec(model, {"task": task}))["task"])


def test_what_backward_reads_is_kept_and_no_more() -> None:
    """Five arguments and the logarithms are kept; then two values of that size beside them in the loss's backward pass."""
    row = 2 * 1024 * 4
    found = peak_of(Sines(), x=torch.ones(2, 1024))
    assert found.kept == pytest.approx(6 * row, rel=0.01)
    assert (found.phase, found.bytes) == ("backward", pytest.approx(8 * row, rel=0.01))
    assert found.gradients == row


def test_values_go_with_their_last_reader() -> None:
    """Without a gradient two of them are there at once."""
    row = 2 * 1024 * 4
    model = Sines()
    model.extra = nn.Parameter(torch.zeros(()))
    model.start.requires_grad_(False)
    found = peak_of(Wrapped(model), x=torch.ones(2, 1024))
    assert (found.phase, found.bytes) == ("forward", pytest.approx(2 * row, rel=0.01))


class Wrapped(nn.Module):
    """A loss that adds a parameter, so that there is something to train."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x) + self.model.extra
        return found

"""The roofline by hand, and what a report and a profile make of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import tokgraph as tg
from tests.harness import Captured
from tests.passes.tools import TASKS, calls, traced
from tokgraph.passes.cost.roofline import BOUNDS, roofline, seconds_by_bound
from tokgraph.profile.events import Event, RunProfile
from tokgraph.profile.promise import BETWEEN, kept_promise
from tokgraph.report.report import make_report

SLOW_MEMORY = tg.Rates("slow memory", {torch.float32: 1e18}, 1e6)
SLOW_MATRICES = tg.Rates("slow matrices", {torch.float32: 1e6}, 1e18)


def product(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).sin().sum()


def test_a_product_by_flops_and_by_bytes() -> None:
    graph = traced(product, torch.ones(8, 16), torch.ones(16, 4))
    by_flops, by_bytes = (
        {time.node: time for time in roofline(graph, rates)} for rates in (SLOW_MATRICES, SLOW_MEMORY)
    )
    matmul, sin = calls(graph, torch.ops.aten.matmul.default)[0].name, calls(graph, torch.ops.aten.sin.default)[0].name
    assert by_flops[matmul].forward == pytest.approx(2 * 8 * 16 * 4 / 1e6)
    assert by_bytes[matmul].forward == pytest.approx(4 * (8 * 16 + 16 * 4 + 8 * 4) / 1e6)
    assert by_bytes[sin].forward == pytest.approx(4 * 2 * 8 * 4 / 1e6)
    assert (by_flops[matmul].bound, by_bytes[matmul].bound, by_flops[sin].bound) == ("matmul", "memory", "memory")


def test_rates_of_other_types_are_those_nearest_in_width() -> None:
    rates = tg.Rates("two types", {torch.bfloat16: 4.0, torch.float32: 1.0}, 1.0)
    assert [rates.flops(t) for t in (torch.float32, torch.float16, torch.float64)] == [1.0, 4.0, 1.0]
    assert json.dumps(rates.to_data()).startswith('{"device": "two types", "matmul_flops_per_second": {"bfloat16": 4.0')


def test_rates_are_measured() -> None:
    rates = tg.measure_rates("cpu", [torch.float32, torch.float64])
    assert rates.copy > 0
    assert all(rate > 0 for rate in rates.matmul.values())
    for device, types in (("meta", [torch.float32]), ("cpu", [])):
        with pytest.raises(tg.AnalysisError):
            tg.measure_rates(device, types)


@pytest.mark.slow
def test_where_only_flops_count_the_roofline_promises_what_they_do(digits_example: Captured) -> None:
    report = make_report(tg.apply(digits_example.facts, tg.make_plan(digits_example.facts, "shared")), SLOW_MATRICES)
    for task in report["tasks"].values():
        promise = task["promise"]
        assert promise["roofline"] == pytest.approx(promise["flops"], rel=1e-3)
        assert set(promise["seconds"]["after"]) == set(BOUNDS)
        assert promise["seconds"]["before"]["rows"] == 0 < promise["seconds"]["after"]["rows"]
        assert task["peak_bytes"]["after"] < task["peak_bytes"]["before"]
    assert report["rates"]["device"] == "slow matrices"
    unmeasured = make_report(tg.apply(digits_example.facts, tg.Plan(())))
    assert unmeasured["rates"] is None
    assert unmeasured["tasks"]["generation"]["promise"] == {"flops": 1.0, "roofline": None, "seconds": None}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_takes_what_the_roofline_says_keeps_the_promise(digits_example: Captured, task: str) -> None:
    """And a wait of as long as all that was saved eats all of it."""
    captured = digits_example.program[task]
    thin = tg.apply(digits_example.facts, tg.make_plan(digits_example.facts, "shared")).program[task]
    times = [roofline(graph, SLOW_MATRICES) for graph in (captured, thin)]
    whole, left = (sum(seconds_by_bound(found).values()) for found in times)
    runs = [
        [RunProfile(whole, tuple(Event(t.node, _Place(t.node), 0.0, t.forward + t.backward) for t in found))]
        for found in times
    ]
    kept = kept_promise(captured, thin, True, SLOW_MATRICES, (runs[0], runs[1]), left / whole)
    assert kept["share"] == pytest.approx(1, rel=1e-3)
    assert all(abs(kept["by_bound"][bound]["excess"]) < 1e-6 * whole for bound in ("matmul", "memory"))
    assert kept["by_bound"][BETWEEN]["excess"] == pytest.approx(whole - left)


class _Place:
    """Where an event belongs, as far as a promise asks."""

    def __init__(self, node: str) -> None:
        self.node = node

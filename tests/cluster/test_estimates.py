"""An estimate of a program: parts sum to the whole, a plan leaves less, budgets scale."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokgraph as tg
from tests.field.models import VLM, seeded, spec
from tests.harness import captured_tiny
from tests.passes.tools import TASKS
from tokgraph.passes.cost.flops import count_flops
from tokgraph.passes.cost.peak import peak_memory
from tokgraph.passes.cost.roofline import roofline, seconds_by_bound
from tokgraph.passes.lower.kept import kept_bytes
from tokgraph.passes.lower.part_costs import part_costs

CLUSTER = tg.Cluster.parse("gpus=16,memory=1GB,flops=1TFLOPS,bandwidth=100GB/s,tokens=1B")
RATES = tg.Rates("cluster", {torch.float32: 1e12}, 1e11)


@cache
def planned(policy: str, **options: Any) -> tg.Accelerated:
    captured = captured_tiny(4)
    return captured.apply(tg.make_plan(captured.facts, policy, **options))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "policy", ["shared", *(pytest.param(name, marks=pytest.mark.slow) for name in ("himix", "random-ltd", "fastv"))]
)
def test_parts_sum_to_the_whole(policy: str, task: str) -> None:
    acc = planned(policy)
    for graph in (acc.facts.program[task], acc.program[task]):
        parts = part_costs(graph, RATES)
        assert [part.title for part in parts][:2] == ["before the blocks", "block 0"]
        assert len(parts) == 6
        kept, gradients = [part.kept for part in parts], [part.gradients for part in parts]
        assert sum(kept) == kept_bytes(graph, checkpoint=False)
        assert sum(part.kept_again for part in parts) == kept_bytes(graph, checkpoint=True)
        peak, flops = peak_memory(graph), count_flops(graph)
        assert sum(gradients) == peak.gradients
        assert sum(part.forward_flops for part in parts) == flops.forward
        assert sum(part.backward_flops for part in parts) == flops.backward
        forward = [sum(kept[:i]) + part.forward_peak for i, part in enumerate(parts)]
        backward = [sum(kept[:i]) + sum(gradients[i + 1 :]) + part.backward_peak for i, part in enumerate(parts)]
        assert max(*forward, *backward) == peak.bytes
        least = sum(seconds_by_bound(roofline(graph, RATES)).values())
        assert sum(part.forward + part.backward for part in parts) == pytest.approx(least)
        assert all(part.sent_back <= part.sent for part in parts)
        assert parts[-1].sent == 0


def test_a_plan_leaves_less() -> None:
    found = tg.estimate(planned("shared"), CLUSTER)
    assert {row["layout"] for row in found["layouts"]} == {"ddp", "fsdp", "hsdp", "pipeline"}
    for row in found["layouts"]:
        assert row["ratio"]["seconds"] <= 1
        assert row["after"]["seconds"]["compute"] < row["before"]["seconds"]["compute"]
        assert row["ratio"]["memory"] <= 1
    none = tg.estimate(planned("none"), CLUSTER)
    assert none["layouts"][0]["ratio"]["seconds"] == pytest.approx(1, rel=0.05)


def test_budgets_scale() -> None:
    acc = planned("shared")
    one, two = (tg.estimate(acc, replace(CLUSTER, tokens=n))["layouts"][0]["after"] for n in (1e9, 2e9))
    assert two["days"] == pytest.approx(2 * one["days"])
    assert one["gpu_hours"] == pytest.approx(one["days"] * 24 * 16)
    assert one["tokens_per_second"] * one["days"] * 86400 == pytest.approx(1e9)
    assert one["tokens_per_step"] == 16 * 22, "two samples of eleven"
    without = tg.estimate(acc, replace(CLUSTER, tokens=None))["layouts"][0]["after"]
    assert without["days"] is without["gpu_hours"] is None


def test_the_mix_weighs_tasks() -> None:
    acc = planned("shared")
    seconds = [
        tg.estimate(acc, CLUSTER, mix=mix)["layouts"][0]["after"]["seconds"]["compute"]
        for mix in ({"understanding": 1}, {"generation": 1}, None, {"understanding": 3, "generation": 1})
    ]
    assert seconds[2] == pytest.approx((seconds[0] + seconds[1]) / 2)
    assert seconds[3] == pytest.approx((3 * seconds[0] + seconds[1]) / 4)
    with pytest.raises(tg.PlanError, match="does not weigh the tasks"):
        tg.estimate(acc, CLUSTER, mix={"drawing": 1})


def test_what_fits() -> None:
    acc = planned("shared")
    all_of_it = tg.estimate(acc, CLUSTER)
    assert all(row["after"]["fits"] for row in all_of_it["layouts"])
    ddp, fsdp = (
        next(row for row in all_of_it["layouts"] if row["layout"] == name)["after"]["memory"]["total"]
        for name in ("ddp", "fsdp")
    )
    found = tg.estimate(acc, replace(CLUSTER, memory=(ddp + fsdp) / 2, stages=2))
    assert {"layout": "fsdp", "checkpoint": False} in found["fits"]["after"]
    assert {"layout": "ddp", "checkpoint": False} not in found["fits"]["after"]
    reserved = tg.estimate(acc, replace(CLUSTER, memory=2 * ddp, reserve=2 * ddp - 1))
    assert reserved["fits"] == {"before": [], "after": []}


@pytest.mark.slow
def test_own_projections_are_parameters() -> None:
    found = tg.estimate(planned("himix"), CLUSTER)["model"]
    added = sum(p.numel() for p in planned("himix").own_parameters.values())
    assert found["after"]["elements"] - found["before"]["elements"] == added
    assert found["after"]["optimizer_bytes"] - found["before"]["optimizer_bytes"] == 8 * added


def test_more_stages_than_parts() -> None:
    with pytest.raises(tg.PlanError, match="a model of 4 blocks is no pipeline of 8 stages"):
        tg.estimate(planned("shared"), replace(CLUSTER, stages=8))


class Towered(VLM):
    """Beside the tower a head that no task reads, and a tower that is frozen in half."""

    def __init__(self) -> None:
        super().__init__(2, tower=nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16)))
        self.tower[0].requires_grad_(False)
        self.unread = nn.Linear(16, 100)


@pytest.mark.slow
def test_what_is_precomputed_is_held() -> None:
    """The tower's parameters are there, and train, though no graph reads them; a program that was loaded says the same."""
    found = {}
    for towers in ((), ("tower",)):
        acc = tg.optimize(spec(seeded(Towered), precomputed=towers), "exact", verify=False)
        found[towers] = tg.estimate(acc, CLUSTER)["model"]["after"]
        unread = sum(p.numel() for p in acc.model.unread.parameters())
        elements = sum(p.numel() for p in acc.model.parameters())
        assert found[towers]["elements"] == elements
        assert found[towers]["trained_elements"] == elements - unread - (6 * 16 + 16)
    assert found[()] == found["tower",]


@pytest.mark.slow
def test_a_loaded_program(tmp_path: Path) -> None:
    acc = tg.optimize(spec(seeded(lambda: VLM(2))), "exact", verify=False)
    acc.save(tmp_path / "saved")
    loaded = tg.load_accelerated(tmp_path / "saved")
    mine, theirs = (tg.estimate(x, CLUSTER) for x in (acc, loaded))
    assert mine["layouts"] == theirs["layouts"]


@pytest.mark.slow
def test_nothing_trains() -> None:
    model = seeded(lambda: VLM(2)).requires_grad_(False)
    model.head.requires_grad_(True)
    found = tg.estimate(tg.optimize(spec(model), "none", verify=False), CLUSTER)
    assert found["model"]["after"]["gradient_bytes"] == model.head.weight.nbytes
    parts = found["tasks"]["u"]["after"]["parts"]
    assert [part["kept"] for part in parts[:-1]] == [0, 0, 0]
    assert found["layouts"][0]["after"]["seconds"]["communication"] > 0

"""Own projections: visual rows use copies of the query, key and value projections, which train beside the model's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, captured_tiny
from tokgraph.ir.plan import DropSite
from tokgraph.planning.check import check_plan
from tokgraph.report.report import make_report

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

U, G = "understanding", "generation"


@pytest.fixture(scope="module")
def four() -> Captured:
    return captured_tiny(4)


def own(task: str, start: int, end: int | None, keep: float, **more: object) -> DropSite:
    return DropSite(task, start, end, keep, projections="own", **more)  # type: ignore[arg-type]


SITES = {
    "nothing dropped": [own(G, 1, 3, 1.0)],
    "all hidden": [own(G, 1, 3, 0.0)],
    "half hidden": [own(U, 1, 3, 0.5)],
    "all frozen": [own(U, 0, None, 0.0, mode="freeze")],
    "half frozen": [own(G, 1, 3, 0.5, mode="freeze")],
    "gone for good": [own(U, 1, 3, 0.5, restore=False)],
    "inside a span": [DropSite(U, 0, 4, 0.5), own(U, 1, 3, 1.0)],
    "frozen inside hidden": [DropSite(U, 0, 4, 0.8), own(U, 1, 3, 0.3, mode="freeze")],
    "both tasks": [own(U, 1, 3, 0.5), own(G, 1, 3, 0.5)],
}


def perturb(accelerated: tg.Accelerated) -> None:
    """Make the copies differ from what they are copies of."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in accelerated.own_parameters.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", SITES)
def test_the_oracle_agrees(four: Captured, case: str, exact: bool) -> None:
    accelerated = four.apply(planned(four, SITES[case], exact))
    assert bool(accelerated.own_parameters) == (case != "all hidden")
    tg.verify(four.program, accelerated).raise_if_failed()
    perturb(accelerated)
    tg.verify(four.program, accelerated).raise_if_failed()


def planned(model: Captured, sites: list[DropSite], exact: bool = True) -> tg.Plan:
    return check_plan(tg.Plan(tuple(sites), exact), model.facts)


def test_the_oracle_notices_copies_that_are_not_used(four: Captured) -> None:
    """Shared projections do not pass for own ones: copies start equal, so only the gradients tell."""
    plan = planned(four, SITES["half hidden"])
    shared = replace(plan, sites=tuple(replace(s, projections="shared") for s in plan.sites))
    accelerated = four.apply(shared)
    accelerated.plan = plan
    result = tg.verify(four.program, accelerated)
    assert not result.passed
    assert "layers." in str(result.tasks[U].worst_parameter)


def test_visual_rows_alone_use_the_copies(four: Captured) -> None:
    """By hand: the fused projection of block 1, seen by a hook on what attention reads."""
    plan = planned(four, [own(G, 1, 2, 1.0)], exact=False)
    accelerated = four.apply(plan, G)
    perturb(accelerated)
    module = accelerated[G].graph_module
    seen = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target is torch.ops.tokgraph.merge_range.default:
                seen["merged"] = result
            if n.name == four.facts[G].blocks[1].start:
                seen["stream"] = result
            return result

    Watch(module).run(*accelerated[G].task_graph.flatten(four.spec.tasks[G].inputs))
    layer = four.model.layers[1]
    x = layer.norm1(seen["stream"])
    weight, bias = (
        accelerated.own_parameters[f"tokgraph_own.{G}.layers.1.attention.qkv.{n}"] for n in ("weight", "bias")
    )
    visual = torch.arange(tiny.TEXT + tiny.IMAGE).unsqueeze(0).expand(len(x), -1) >= tiny.TEXT
    expected = torch.where(visual.unsqueeze(-1), F.linear(x, weight, bias), layer.attention.qkv(x))
    torch.testing.assert_close(seen["merged"], expected)


def test_one_optimizer_trains_copies_and_model() -> None:
    spec = tiny.build(layers=4)
    model = Captured.of(spec)
    accelerated = model.apply(tg.make_plan(model.program, "himix", facts=model.facts))
    names = dict(accelerated.named_parameters())
    assert set(names) == set(dict(spec.model.named_parameters())) | set(accelerated.own_parameters)
    before = {name: p.detach().clone() for name, p in names.items()}
    optimizer = torch.optim.SGD(accelerated.parameters(), lr=0.1)
    sum(accelerated[name](**task.inputs)[0] for name, task in spec.tasks.items()).backward()
    optimizer.step()
    moved = {name for name, p in names.items() if not torch.equal(p, before[name])}
    assert set(accelerated.own_parameters) <= moved
    assert "layers.1.attention.qkv.weight" in moved


def test_checkpoints(four: Captured) -> None:
    """With the copies, and of the model alone: then the copies start as what they are copies of."""
    accelerated = four.apply(tg.make_plan(four.program, "himix", facts=four.facts))
    perturb(accelerated)
    state = {name: x.clone() for name, x in accelerated.state_dict().items()}
    copied = next(iter(accelerated.own_parameters))
    of = copied.removeprefix(f"tokgraph_own.{U}.")
    assert not torch.equal(state[copied], state[of])

    fresh = four.apply(tg.make_plan(four.program, "himix", facts=four.facts))
    fresh.load_state_dict(state)
    assert all(torch.equal(fresh.own_parameters[name], state[name]) for name in accelerated.own_parameters)
    fresh.load_state_dict(four.model.state_dict())
    assert torch.equal(fresh.own_parameters[copied], four.model.state_dict()[of])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict({**state, "stranger": state[of]})


@pytest.mark.slow
def test_separate_projections_and_frozen_queries(captured_janus) -> None:
    """Frozen rows ask nothing: keys and values get copies, queries do not."""
    model: Captured = captured_janus()
    accelerated = model.apply(tg.make_plan(model.program, "himix", facts=model.facts))
    kinds = {name.split(".")[-2] for name in accelerated.own_parameters}
    assert kinds == {"k_proj", "v_proj"}
    perturb(accelerated)
    tg.verify(model.program, accelerated).raise_if_failed()


@pytest.mark.slow
def test_eager_attention_has_the_same_projections(captured_janus) -> None:
    for task in (U, G):
        fused, eager = (captured_janus(attn).facts[task].blocks for attn in ("sdpa", "eager"))
        for a, b in zip(fused, eager, strict=True):
            assert [(p.weight, p.keys) for p in a.projections] == [(p.weight, p.keys) for p in b.projections]
            assert [p.weight.split(".")[-2] for p in a.projections if p.keys] == ["k_proj", "v_proj"]
            assert [p.weight.split(".")[-2] for p in a.projections if not p.keys] == ["q_proj"]


def test_the_report_counts_copies_as_divergence(four: Captured) -> None:
    """Both tasks get copies in block 1, alike in number, yet the projections are no longer shared."""
    plan = planned(four, [own(U, 1, 2, 1.0), own(G, 1, 2, 1.0)])
    report = make_report(four.apply(plan))
    qkv = 16 * 48 + 48
    whole = 4 * (2 * 16 + qkv + (16 * 16 + 16) + 2 * 16 + (16 * 32 + 32) + (32 * 16 + 16)) + 2 * 16
    assert report["new_parameters"] == 2 * qkv
    assert report["sharing_index"] == pytest.approx(1 - qkv / whole)
    assert report["coverage"] == 1.0


def test_copies_cost_nothing(four: Captured) -> None:
    """Every row is projected once, by one or the other."""
    plans = [
        tg.make_plan(four.program, "himix", facts=four.facts, projections=projections)
        for projections in ("own", "shared")
    ]
    mine, model = (make_report(four.apply(plan))["tasks"][U]["flops"]["after"] for plan in plans)
    assert mine == model


def test_projections_that_are_no_linear_layers_are_refused(four: Captured) -> None:
    blocks = [replace(b, projections=()) for b in four.facts[U].blocks]
    facts = tg.Facts({**four.facts, U: replace(four.facts[U], blocks=tuple(blocks))})
    with pytest.raises(tg.PlanError, match=r"block 1 \(layers.1\) computes queries, keys or values by something else"):
        check_plan(tg.Plan((own(U, 1, 3, 0.5),)), facts)


def test_unknown_projections_are_refused() -> None:
    with pytest.raises(tg.PlanError, match="projections='both' is not one of"):
        DropSite(U, 0, 1, projections="both")  # type: ignore[arg-type]

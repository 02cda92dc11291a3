"""Samples with different numbers of visual tokens: all lose as many as the one with the fewest, or each its own share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import Captured
from tokgraph.ir.evaluate import evaluate
from tokgraph.ir.plan import DropSite, Ragged
from tokgraph.planning.check import check_plan

U, G = "understanding", "generation"
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
PAD = 0


def spec(
    images: list[list[int]],
    padding: str = "right",
    tokens: int = 20,
    attend: Attend = F.scaled_dot_product_attention,
    dynamic: bool = False,
) -> tg.ModelSpec:
    """The tiny model on samples with images of the given lengths, text before, between and behind, padded to ``tokens``.

    ``attend``: attention of queries, keys, values and a boolean mask.
    """
    torch.manual_seed(0)
    model = tiny.Unified(layers=4)
    rows = []
    for number, lengths in enumerate(images):
        row = torch.randint(10, tiny.VOCABULARY, (1 + number % 2,)).tolist()
        for length in lengths:
            row += [tiny.IMAGE_ID] * length + torch.randint(10, tiny.VOCABULARY, (2,)).tolist()
        gap = [PAD] * (tokens - len(row))
        rows.append(row + gap if padding == "right" else gap + row)
    ids = torch.tensor(rows)
    ahead = (ids == tiny.IMAGE_ID).flip(1).cumsum(1).flip(1) > 0  # the prompt: images, and the text before the last
    text = ~ahead & (ids != PAD)
    sequence = {0: "batch", 1: "tokens"}
    task = tg.Task(
        forward=partial(masked, attend=attend),
        inputs={
            "ids": ids,
            "patches": torch.rand(len(rows), max(map(sum, images)), 4),
            "labels": ids.masked_fill(~text, -100),
        },
        dynamic={"ids": sequence, "labels": sequence, "patches": {0: "batch"}} if dynamic else None,
        visual=tg.VisualTokens.ids(input="ids", equal=tiny.IMAGE_ID),
        reads="text",
    )
    return tg.ModelSpec(model, {U: task})


def masked(
    model: tiny.Unified,
    ids: torch.Tensor,
    patches: torch.Tensor,
    labels: torch.Tensor,
    attend: Attend = F.scaled_dot_product_attention,
):
    """As ``tiny.understand``; padding is no key."""
    x = model.embed(ids)
    x = x.masked_scatter((ids == tiny.IMAGE_ID).unsqueeze(-1), model.patches(patches).flatten(0, 1))
    at = torch.arange(ids.shape[1], device=ids.device)
    seen = (at.unsqueeze(1) >= at) & ((ids != PAD).unsqueeze(1) | (at.unsqueeze(1) == at))
    for layer in model.layers:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in layer.attention.qkv(layer.norm1(x)).chunk(3, -1))
        mixed = attend(q, k, v, seen.unsqueeze(1))
        x = x + layer.attention.out(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.norm2(x))
    logits = model.head(model.norm(x))
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100), logits


def additive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Fused attention with a mask of numbers."""
    return F.scaled_dot_product_attention(q, k, v, torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf))


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention in single steps."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


IMAGES = [[9], [4, 3], [5, 6], [10]]  # 9, 7, 11 and 10 visual tokens


@pytest.fixture(scope="module", params=["right", pytest.param("left", marks=pytest.mark.slow)])
def ragged(request) -> Captured:
    return Captured.of(spec(IMAGES, request.param))


@pytest.fixture(scope="module")
def open_ragged() -> Captured:
    """The same with symbols for sizes, which other batches may have other values of."""
    return Captured.of(spec(IMAGES, dynamic=True))


def site(start: int, end: int | None, keep: float, selector: str = "uniform", **more: object) -> DropSite:
    return DropSite(U, start, end, keep, selector, **more)  # type: ignore[arg-type]


SITES = {
    **{selector: [site(1, 3, 0.4, selector)] for selector in ("uniform", "random", "norm", "attention", "similarity")},
    "all that the smallest has": [site(1, 3, 0.0)],
    "nothing": [site(1, 3, 1.0)],
    "for good": [site(1, None, 0.5, "attention", restore=False)],
    "all but what is read": [site(1, None, 0.0, restore=False)],
    "frozen": [site(0, None, 0.3, mode="freeze")],
    "nested": [site(0, 4, 0.8), site(1, 3, 0.4, "norm")],
    "stages": [site(b, None, k, "attention", restore=False) for b, k in ((1, 0.7), (2, 0.4), (3, 0.2))],
}


def planned(model: Captured, sites: list[DropSite], exact: bool = True) -> tg.Plan:
    return check_plan(tg.Plan(tuple(sites), exact), model.facts)


@pytest.mark.parametrize("case", SITES)
def test_the_oracle_agrees(ragged: Captured, case: str) -> None:
    """Pads on top of the exact pass; the rule that drops as many of each sample without it, where there is most to go wrong."""
    rules: list[tuple[Ragged, bool]] = [("pad", True), *([("min", False)] if case in ("for good", "nested") else [])]
    for rule, exact in rules:
        sites = [replace(s, ragged=rule) for s in SITES[case]]
        accelerated = ragged.apply(planned(ragged, sites, exact))
        tg.verify(ragged.program, accelerated).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("attend", [pytest.param(additive, marks=pytest.mark.slow), eager])
def test_the_oracle_agrees_on_other_attentions(attend: Attend) -> None:
    model = Captured.of(spec(IMAGES, attend=attend))
    assert {a.kind for b in model.facts[U].blocks for a in b.attention} == {"eager" if attend is eager else "sdpa"}
    for case in ("nested", "stages"):
        padded = [replace(s, ragged="pad") for s in SITES[case]]
        tg.verify(model.program, model.apply(planned(model, padded))).raise_if_failed()


@pytest.mark.slow
def test_a_batch_without_padding_in_it_and_an_image_at_the_very_start() -> None:
    """Rows that are all dropped, and see nothing that is left: no NaN reaches outputs or gradients."""
    whole = spec([[6], [12], [9]], tokens=16)
    ids = whole.tasks[U].inputs["ids"]
    ids[:, 0] = tiny.IMAGE_ID  # one more at the start of each
    labels = ids.masked_fill((ids == tiny.IMAGE_ID) | (ids == PAD), -100)
    patches = torch.rand(3, 13, 4)
    task = replace(whole.tasks[U], inputs={"ids": ids, "patches": patches, "labels": labels})
    model = Captured.of(tg.ModelSpec(whole.model, {U: task}))
    for keep in (0.0, 0.3):
        accelerated = model.apply(planned(model, [site(0, 3, keep, ragged="pad")]))
        tg.verify(model.program, accelerated).raise_if_failed()
        loss, _ = accelerated[U](**task.inputs)
        found = torch.autograd.grad(loss, list(whole.model.parameters()), allow_unused=True)
        assert all(g.isfinite().all() for g in found if g is not None)


def test_facts(ragged: Captured) -> None:
    flow = ragged.facts[U].visual
    assert (flow.count, flow.most, flow.mean, flow.ragged) == (7, 11, 9.25, True)
    assert ragged.facts[U].demand.free == 5  # seven, but for the last token of either image


def kept(model: Captured, accelerated: tg.Accelerated, ids: torch.Tensor) -> list[int]:
    """Visual tokens of each sample that a plan with one site keeps."""
    module = accelerated[U].graph_module
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target is torch.ops.tokgraph.keep_rows.default:
                found["index"] = result
            return result

    task = model.spec.tasks[U].inputs
    Watch(module).run(*accelerated[U].task_graph.flatten({**task, "ids": ids}))
    return (ids.gather(1, found["index"]) == tiny.IMAGE_ID).sum(1).tolist()


def test_each_sample_loses_as_many(ragged: Captured) -> None:
    """Seven tokens keep floor(0.4 * 7 + 0.5) = 3: every sample loses four."""
    ids = ragged.spec.tasks[U].inputs["ids"]
    for selector in ("uniform", "random", "norm", "attention", "similarity"):
        accelerated = ragged.apply(planned(ragged, [site(1, 3, 0.4, selector)]))
        assert kept(ragged, accelerated, ids) == [5, 3, 7, 6]


def pads(accelerated: tg.Accelerated, ids: torch.Tensor) -> list[list[int]]:
    """Positions of each sample that a plan with one site keeps as padding."""
    graph = accelerated[U].task_graph
    asked = replace(graph, task=replace(graph.task, inputs={**graph.task.inputs, "ids": ids}))
    targets = (torch.ops.tokgraph.keep_rows.default, torch.ops.tokgraph.lost_rows.default)
    index, lost = evaluate(asked, [next(n for n in graph.graph.nodes if n.target is t) for t in targets])
    return [[i for i in rows if lost[b, i]] for b, rows in enumerate(index.tolist())]


def test_padded_each_sample_loses_its_own_share(ragged: Captured) -> None:
    """Of 9, 7, 11 and 10, floor(0.4 n + 0.5) = 4, 3, 4, 4 stay; the smallest loses four, so that many rows go from all,
    and 5 - 4, 0, 7 - 4, 6 - 4 more are padding. The rows are as many as without padding.
    """
    ids = ragged.spec.tasks[U].inputs["ids"]
    for selector in ("uniform", "random", "norm", "attention", "similarity"):
        accelerated = ragged.apply(planned(ragged, [site(1, 3, 0.4, selector, ragged="pad")]))
        assert kept(ragged, accelerated, ids) == [5, 3, 7, 6]
        assert [len(p) for p in pads(accelerated, ids)] == [1, 0, 3, 2]
    costs = [
        tg.report.make_report(ragged.apply(planned(ragged, [site(1, 3, 0.4, ragged=rule)])))["tasks"][U]
        for rule in ("min", "pad")
    ]
    assert costs[0]["flops"]["after"] == costs[1]["flops"]["after"]
    assert [c["tokens_per_block"]["after"][2] for c in costs] == [9.25 - 4, 15 / 4]


def test_what_padding_holds_changes_nothing(ragged: Captured) -> None:
    """Other patches at the padding positions: the rows that count do not see them inside the span."""
    accelerated = ragged.apply(planned(ragged, [site(0, None, 0.4, restore=False, ragged="pad")]))
    inputs = dict(ragged.spec.tasks[U].inputs)
    ids, patches = inputs["ids"], inputs["patches"].clone()
    padding = pads(accelerated, ids)
    assert sum(map(len, padding)) > 3
    flat = patches.flatten(0, 1)  # patches go, in order, to the visual tokens of the whole batch
    order = (ids == tiny.IMAGE_ID).flatten().nonzero().flatten().tolist()
    for sample, positions in enumerate(padding):
        for position in positions:
            flat[order.index(sample * ids.shape[1] + position)] += 100
    first, other = (accelerated[U](**{**inputs, "patches": p})[0] for p in (inputs["patches"], flat.view_as(patches)))
    assert torch.equal(first, other)
    plain = ragged.program[U]
    losses = [
        plain.unflatten(plain.graph_module(*plain.flatten({**inputs, "patches": p})))[0]
        for p in (inputs["patches"], flat.view_as(patches))
    ]
    assert not torch.equal(*losses), "the model itself does see them"


@pytest.mark.slow
def test_padded_shapes_are_static(open_ragged: Captured) -> None:
    """A batch of other counts runs through the same shapes; one with a smaller image than any in the example does not."""
    accelerated = open_ragged.apply(planned(open_ragged, [site(1, 3, 0.4, ragged="pad")]))
    inputs = dict(open_ragged.spec.tasks[U].inputs)
    other = spec([[8], [5, 2], [11], [4, 4]]).tasks[U].inputs
    loss, _ = accelerated[U](**{**inputs, **{k: other[k] for k in ("ids", "labels")}})
    assert loss.isfinite()
    assert [len(p) for p in pads(accelerated, other["ids"])] == [1, 0, 3, 1]  # of 8, 7, 11, 8 stay 3, 3, 4, 3
    small = spec([[5], [7], [7], [7]]).tasks[U].inputs
    with pytest.raises(tg.BatchError, match="fewer than 4 of its rows go"):
        accelerated[U](**{**inputs, **{k: small[k] for k in ("ids", "labels")}})


def test_padding_is_chosen_by_name(ragged: Captured) -> None:
    plan = tg.make_plan(ragged.program, "fastv", facts=ragged.facts, k=1, ragged="pad")
    assert [s.ragged for s in plan.sites] == ["pad"]
    assert tg.Plan.from_json(plan.to_json()) == plan
    assert tg.make_plan(ragged.program, "fastv", facts=ragged.facts, k=1).sites[0].ragged == "min"
    with pytest.raises(tg.PlanError, match="ragged='most' is not one of 'min', 'pad'"):
        tg.make_plan(ragged.program, "fastv", facts=ragged.facts, k=1, ragged="most")  # type: ignore[arg-type]
    with pytest.raises(tg.PlanError, match="sites with ragged='min' and sites with ragged='pad'"):
        planned(ragged, [site(0, 4, 0.8), site(1, 3, 0.4, ragged="pad")])


@pytest.fixture(scope="module")
def both_tasks() -> Captured:
    """Understanding of samples with 4 to 12 visual tokens, generation of the same number in all."""
    model = spec([[8], [4], [4, 4], [12]])
    return Captured.of(tg.ModelSpec(model.model, {**model.tasks, G: tiny.build(layers=4, batch=4).tasks[G]}))


@pytest.mark.slow
def test_shared_pads(both_tasks: Captured) -> None:
    """As many of each sample would be another share of either task; the same share of each keeps the tasks alike."""
    model = both_tasks
    assert model.facts[U].visual.step == 4
    with pytest.raises(tg.PlanError, match="samples of task 'understanding' hold 4 to 12 visual tokens") as error:
        tg.make_plan(model.program, "shared", facts=model.facts)
    assert "--ragged pad" in str(error.value.help)
    accelerated = model.apply(tg.make_plan(model.program, "shared", facts=model.facts, ragged="pad"))
    tg.verify(model.program, accelerated).raise_if_failed()
    assert {s.ragged for s in accelerated.plan.sites} == {"pad"}
    report = tg.report.make_report(accelerated)
    assert report["sharing_index"] == 1.0
    assert report["tasks"][U]["tokens_per_block"]["after"][1:3] == [4.0, 4.0]  # half of 8, on average


@pytest.mark.slow
def test_the_planner_pads(both_tasks: Captured) -> None:
    model = both_tasks
    plan = tg.make_plan(model.program, "shared", facts=model.facts, ragged="pad", target_flops=0.86)
    assert {s.ragged for s in plan.sites} == {"pad"}
    assert tg.report.make_report(model.apply(plan))["flops_ratio"] == pytest.approx(0.86, rel=0.01)


def test_uniform_is_uniform_in_each_sample() -> None:
    """As the equal case, sample by sample."""
    counts, width, drop = [9, 7, 11, 10], 12, 4
    valid = torch.arange(width) < torch.tensor(counts).unsqueeze(1)
    stays = torch.ops.tokgraph.spread_score(valid, torch.tensor([drop]))
    for row, n in zip(stays.tolist(), counts, strict=True):
        keep = n - drop
        assert [r for r, s in enumerate(row) if s] == [j * n // keep for j in range(keep)]


@pytest.mark.slow
def test_other_batches_between_fewest_and_most(open_ragged: Captured) -> None:
    """A batch of other counts goes through the same program; one outside is refused."""
    accelerated = open_ragged.apply(planned(open_ragged, [site(1, 3, 0.4)]))
    inputs = dict(open_ragged.spec.tasks[U].inputs)
    other = spec([[8], [5, 2], [11], [4, 4]]).tasks[U].inputs
    loss, _ = accelerated[U](**{**inputs, **{k: other[k] for k in ("ids", "labels")}})
    assert loss.isfinite()
    for images in ([[12], [7], [7], [7]], [[3], [7], [7], [7]]):
        wrong = spec(images).tasks[U].inputs
        with pytest.raises(tg.BatchError, match="fewer than 4 or more than 11 such tokens"):
            accelerated[U](**{**inputs, **{k: wrong[k] for k in ("ids", "labels")}})


def test_gradients_reach_every_parameter_that_they_reached(ragged: Captured) -> None:
    accelerated = ragged.apply(planned(ragged, [site(1, 3, 0.4)]))
    loss, _ = accelerated[U](**ragged.spec.tasks[U].inputs)
    found = torch.autograd.grad(loss, list(ragged.model.layers.parameters()), allow_unused=True)
    assert all(g is not None for g in found)
    assert sum(float(g.abs().sum()) > 0 for g in found) > len(found) / 2


def test_shares_are_averages(ragged: Captured) -> None:
    accelerated = ragged.apply(planned(ragged, [site(1, 3, 0.4)]))
    report = tg.report.make_report(accelerated)["tasks"][U]
    assert report["tokens_per_block"]["before"] == [9.25] * 4
    assert report["tokens_per_block"]["after"][2] == 9.25 - 4


@pytest.mark.parametrize("what", ["projections", "selector"])
def test_what_needs_equal_numbers_is_refused(ragged: Captured, what: str, monkeypatch) -> None:
    from tokgraph.planning import selectors

    monkeypatch.setattr(selectors, "_SELECTORS", selectors.selectors())
    tg.register_selector("spread", causal=False)(lambda rows: rows.var(-1))
    bad = site(1, 3, 0.5, projections="own") if what == "projections" else site(1, 3, 0.5, "spread")
    with pytest.raises(tg.PlanError, match=r"different numbers of visual tokens \(7 to 11\)"):
        planned(ragged, [bad])


def test_a_sample_without_an_image_is_refused() -> None:
    with pytest.raises(tg.AnalysisError, match="sample 1 of the example batch holds no visual token"):
        Captured.of(spec([[9], [], [5, 6], [10]]))

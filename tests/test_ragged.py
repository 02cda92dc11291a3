"""Samples with different numbers of visual tokens: each loses as many rows as the one with the fewest."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import Captured
from tokgraph.plan import DropSite

U, G = "understanding", "generation"
PAD = 0


def spec(images: list[list[int]], padding: str = "right", tokens: int = 20) -> tg.ModelSpec:
    """The tiny model on samples with images of the given lengths, text before, between and behind, padded to ``tokens``."""
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
    text = (ids != tiny.IMAGE_ID) & (ids != PAD)
    sequence = {0: "batch", 1: "tokens"}
    task = tg.Task(
        forward=masked,
        inputs={
            "ids": ids,
            "patches": torch.rand(len(rows), max(map(sum, images)), 4),
            "labels": ids.masked_fill(~text, -100),
        },
        dynamic={"ids": sequence, "labels": sequence, "patches": {0: "batch"}},
        visual=tg.VisualTokens.ids(input="ids", equal=tiny.IMAGE_ID),
        reads="text",
    )
    return tg.ModelSpec(model, {U: task})


def masked(model: tiny.Unified, ids: torch.Tensor, patches: torch.Tensor, labels: torch.Tensor):
    """As ``tiny.understand``; padding is no key."""
    x = model.embed(ids)
    x = x.masked_scatter((ids == tiny.IMAGE_ID).unsqueeze(-1), model.patches(patches).flatten(0, 1))
    at = torch.arange(ids.shape[1], device=ids.device)
    seen = (at.unsqueeze(1) >= at) & ((ids != PAD).unsqueeze(1) | (at.unsqueeze(1) == at))
    for layer in model.layers:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in layer.attention.qkv(layer.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1))
        x = x + layer.attention.out(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.norm2(x))
    logits = model.head(model.norm(x))
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100), logits


IMAGES = [[9], [4, 3], [5, 6], [10]]  # 9, 7, 11 and 10 visual tokens


@pytest.fixture(scope="module", params=["right", pytest.param("left", marks=pytest.mark.slow)])
def ragged(request) -> Captured:
    return Captured.of(spec(IMAGES, request.param))


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
    return tg.planning.check_plan(tg.Plan(tuple(sites), exact), model.facts)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", SITES)
def test_the_oracle_agrees(ragged: Captured, case: str, exact: bool) -> None:
    accelerated = ragged.apply(planned(ragged, SITES[case], exact))
    tg.verify(ragged.program, accelerated).raise_if_failed()


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


def test_uniform_is_uniform_in_each_sample() -> None:
    """As the equal case, sample by sample."""
    counts, width, drop = [9, 7, 11, 10], 12, 4
    valid = torch.arange(width) < torch.tensor(counts).unsqueeze(1)
    stays = torch.ops.tokgraph.spread_score(valid, drop)
    for row, n in zip(stays.tolist(), counts, strict=True):
        keep = n - drop
        assert [r for r, s in enumerate(row) if s] == [j * n // keep for j in range(keep)]


def test_other_batches_between_fewest_and_most(ragged: Captured) -> None:
    """A batch of other counts goes through the same program; one outside is refused."""
    accelerated = ragged.apply(planned(ragged, [site(1, 3, 0.4)]))
    inputs = dict(ragged.spec.tasks[U].inputs)
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
    report = tg.report.make_report(ragged.program, accelerated)["tasks"][U]
    assert report["tokens_per_block"]["before"] == [9.25] * 4
    assert report["tokens_per_block"]["after"][2] == 9.25 - 4


@pytest.mark.parametrize("what", ["projections", "selector"])
def test_what_needs_equal_numbers_is_refused(ragged: Captured, what: str, monkeypatch) -> None:
    from tokgraph import selectors

    monkeypatch.setattr(selectors, "_SELECTORS", selectors.selectors())
    tg.register_selector("spread", causal=False)(lambda rows: rows.var(-1))
    bad = site(1, 3, 0.5, projections="own") if what == "projections" else site(1, 3, 0.5, "spread")
    with pytest.raises(tg.PlanError, match=r"different numbers of visual tokens \(7 to 11\)"):
        planned(ragged, [bad])


def test_a_sample_without_an_image_is_refused() -> None:
    with pytest.raises(tg.AnalysisError, match="sample 1 of the example batch holds no visual token"):
        Captured.of(spec([[9], [], [5, 6], [10]]))

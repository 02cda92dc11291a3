"""Index building: what a site keeps, against the oracle's plain loops; what a loss reads, against the definition."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import tokgraph as tg
from tests.passes import models
from tests.passes.models import IMAGE_ID, Decoder
from tests.passes.tools import TASKS, Captured, calls, captured, listing, node, site
from tokgraph.errors import PlanError
from tokgraph.ir.evaluate import evaluate
from tokgraph.passes.analysis.demand import demanded
from tokgraph.passes.analysis.visual import visual_mask
from tokgraph.passes.emitter import VISUAL_ROWS, Emitter
from tokgraph.passes.rewrite.index import IndexBuilder
from tokgraph.verification.oracle import demanded_rows, drop_mask

tokgraph = torch.ops.tokgraph


def kept(found: Captured, *sites: tg.DropSite) -> list[Tensor]:
    """For each site, the positions that stay in the space around it."""
    seeded = found.seeded(*sites)
    return evaluate(seeded, calls(seeded, tokgraph.keep_rows.default))


def mask_of(found: Captured) -> Tensor:
    return visual_mask(found.graph, found.facts.visual, node(found.graph, found.facts.entry))


def as_mask(rows: Tensor, tokens: int) -> Tensor:
    return torch.zeros(len(rows), tokens, dtype=torch.bool).scatter(1, rows, True)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("selector", ["uniform", "random", "norm"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 0.75, 1.0])
def test_what_a_site_keeps(task: str, selector: str, keep: float) -> None:
    found = captured(task)
    chosen = site(0, 1, keep, selector, seed=3)
    (rows,) = kept(found, chosen)
    visual = mask_of(found)
    (stream,) = evaluate(found.graph, [node(found.graph, found.facts.entry)])
    nothing = torch.zeros_like(visual)
    dropped = drop_mask(chosen, visual, nothing, nothing, stream)
    assert torch.equal(as_mask(rows, visual.shape[1]), ~dropped)
    assert torch.equal(rows, rows.sort(1).values)
    assert rows.shape[1] == visual.shape[1] - 6 + chosen.kept(6)


def test_uniform_ranks_by_hand() -> None:
    """Of six visual tokens four stay: ranks 0, 1, 3, 4 (floor of j * 6 / 4)."""
    (rows,) = kept(captured("understanding"), site(0, 1, 4 / 6))
    first, second = ([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7])  # where the images are
    expected = [[0, *(i[r] for r in (0, 1, 3, 4)), *range(i[-1] + 1, 11)] for i in (first, second)]
    expected[1].insert(1, 1)
    assert rows.tolist() == expected


def test_seeds_choose_and_repeat() -> None:
    found = captured("generation")

    def chosen(seed: int) -> list[list[int]]:
        return kept(found, site(0, 1, 0.5, "random", seed=seed))[0].tolist()

    assert chosen(1) == chosen(1)
    assert len({str(chosen(seed)) for seed in range(8)}) > 4
    rows = chosen(1)
    assert rows[0] != rows[1], "samples draw their own"


def test_nested_indices_are_relative() -> None:
    """Composed, they are the positions that the oracle leaves."""
    found = captured("understanding")
    outer, inner = site(0, 2, 4 / 6), site(1, 2, 1 / 6, "random", seed=1)
    a, b = kept(found, outer, inner)
    visual = mask_of(found)
    nothing = torch.zeros_like(visual)
    gone = drop_mask(outer, visual, nothing, nothing, visual.unsqueeze(-1))
    gone_too = gone | drop_mask(inner, visual, gone, nothing, visual.unsqueeze(-1))
    assert torch.equal(as_mask(a, 11), ~gone)
    assert torch.equal(as_mask(a.gather(1, b), 11), ~gone_too)


def test_an_inner_site_that_wants_more_than_is_left() -> None:
    found = captured("understanding")
    a, b = kept(found, site(0, 2, 2 / 6), site(1, 2, 5 / 6))
    assert a.shape == b.shape == (2, 7)
    assert torch.equal(b, torch.arange(7).expand(2, -1))


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_demanded_rows_never_go_for_good(keep: float) -> None:
    found = captured("understanding")
    (rows,) = kept(found, site(0, 1, keep, "norm", restore=False))
    visual = mask_of(found)
    assert (as_mask(rows, 11) | ~demanded(visual, "text")).all()
    assert rows.shape[1] == 5 + max(round(keep * 6), 1)


def test_counts_are_noted_on_every_index() -> None:
    """The visual rows among those kept, for models whose values cannot be known."""
    seeded = captured("understanding").seeded(site(0, 2, 4 / 6), site(1, 2, 1 / 6), exact=True)
    assert [n.meta[VISUAL_ROWS] for n in calls(seeded, tokgraph.keep_rows.default)] == [4, 1]
    assert sorted(n.meta[VISUAL_ROWS] for n in calls(seeded, tokgraph.rows.default)) == [1, 4, 6]


# ------------------------------------------------------------------ demand


@pytest.mark.parametrize("reads", ["text", "visual", "all"])
def test_demanded_rows_by_definition(reads: str) -> None:
    generator = torch.Generator().manual_seed(0)
    visual = torch.rand(5, 9, generator=generator) > 0.5
    assert torch.equal(demanded(visual, reads), demanded_rows(visual, reads))
    if reads != "all":
        assert torch.equal(tokgraph.demand_mask(visual, reads), demanded_rows(visual, reads))


def test_demand_by_hand() -> None:
    visual = torch.tensor([[0, 1, 1, 0, 0, 1]], dtype=torch.bool)
    assert demanded(visual, "text").int().tolist() == [[1, 0, 1, 1, 1, 0]]
    assert demanded(visual, "visual").int().tolist() == [[1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("dynamic", [False, True])
def test_demand_of_longer_texts(dynamic: bool) -> None:
    """With a dynamic token axis what stays the same is the number of rows left out: text may grow."""
    found = captured("understanding", dynamic=dynamic)
    seeded = found.seeded(exact=True)
    (rows,) = (n for n in calls(seeded, tokgraph.rows.default))
    assert isinstance(rows.args[1], torch.fx.Node if dynamic else int)
    assert rows.args[2] is False
    (index,) = evaluate(seeded, [rows])
    assert torch.equal(as_mask(index, 11), demanded(mask_of(found), "text"))


@pytest.mark.parametrize(("sizes", "batch"), [((5, 6), 2), ((9, 6), 3)])
def test_a_dynamic_graph_takes_other_sizes(sizes: tuple[int, int], batch: int) -> None:
    """More text and more samples than the example batch, against the captured graph."""
    text, image = sizes
    found = captured("understanding", dynamic=True)
    ids = torch.randint(10, 24, (batch, text + image), generator=torch.Generator().manual_seed(1))
    ids[:, 2 : 2 + image] = 9
    inputs = {
        "ids": ids,
        "patches": torch.rand(batch, image, 4, dtype=torch.float64),
        "labels": ids.masked_fill(ids == 9, -100),
    }
    plain, exact = tg.apply(found.program, tg.Plan(), facts=found.facts_of), found.apply(exact=True)
    (loss, logits), (lean, rows) = plain["understanding"](**inputs), exact["understanding"].with_rows(**inputs)
    torch.testing.assert_close(lean[0], loss, rtol=1e-12, atol=1e-12)
    (index,) = rows.values()
    assert index.shape == (batch, text + 1)
    chosen = logits[torch.arange(batch)[:, None], index]
    torch.testing.assert_close(lean[1], chosen, rtol=1e-12, atol=1e-12)


def codes(model: Decoder, ids: Tensor) -> Tensor:
    return model.loss(model.tokens(ids), ids)


def with_ids(ids: Tensor, reads: str = "text") -> Captured:
    task = tg.Task(codes, {"ids": ids}, visual=tg.VisualTokens.ids(input="ids", equal=IMAGE_ID), reads=reads)  # type: ignore[arg-type]
    return Captured.of(tg.ModelSpec(models.decoder(models.PreNorm), {"t": task}), "t")


UNEVEN = torch.tensor([[1, 9, 9, 9, 9, 2, 3, 4], [1, 9, 9, 2, 9, 9, 3, 4]])
"""As many image tokens in one image as in two: one or two of them predict text."""


def test_samples_with_different_demand_can_be_restored_but_not_thinned_for_good() -> None:
    found = with_ids(UNEVEN)
    assert not found.facts.demand.even
    assert tg.verify(found.program, found.apply(site(0, 1, 0.25), exact=True)).passed
    with pytest.raises(PlanError, match="different numbers of them") as caught:
        found.seeded(site(0, 1, 0.25, restore=False))
    assert "restore=True" in str(caught.value.help)


def test_rows_beyond_a_sample_s_demand_fill_the_index_up() -> None:
    found = with_ids(UNEVEN)
    seeded = found.seeded(exact=True)
    (index,) = evaluate(seeded, calls(seeded, tokgraph.rows.default))
    assert index.shape == (2, 6)  # the second sample has six demanded rows, the first five and one more
    assert (as_mask(index, 8) | ~demanded(UNEVEN == IMAGE_ID, "text")).all()


# ------------------------------------------------------------------ masks


def emitted(found: Captured) -> str:
    """The nodes that say where visual tokens are."""
    graph = found.graph.copy()
    IndexBuilder(Emitter(graph.graph, "test"), found.facts).visual  # noqa: B018
    return listing(graph, lambda n: n.meta.get("made_by") == "test" or n.op == "placeholder")


def test_the_mask_of_one_id() -> None:
    assert_expected_inline(
        emitted(captured("understanding", dynamic=True)),
        """\
%ids = input  # int64[batch, tokens]
%patches = input  # float64[batch, 6, 4]
%labels = input  # int64[batch, tokens]
%eq_scalar = eq.Scalar(%ids, 9)  # bool[batch, tokens] by test
""",
    )


def test_the_mask_of_a_range_after_a_text() -> None:
    assert_expected_inline(
        emitted(captured("generation", dynamic=True)),
        """\
%ids = input  # int64[batch, tokens]
%codes = input  # int64[batch, 6]
%range_mask = range_mask(%cat, %sym_size_int.2, %add)  # bool[batch, tokens + 6] by test
""",
    )


def positioned(where: slice) -> Captured:
    task = tg.Task(codes, {"ids": models.image_ids()}, visual=tg.VisualTokens.positions(where), reads="text")
    return Captured.of(tg.ModelSpec(models.decoder(models.PreNorm, depth=1), {"t": task}), "t")


@pytest.mark.parametrize("where", [slice(2, 5), slice(-3, -1), slice(5, None), slice(None, 2)])
def test_the_mask_of_positions(where: slice) -> None:
    found = positioned(where)
    graph = found.graph.copy()
    mask = IndexBuilder(Emitter(graph.graph, "test"), found.facts).visual
    expected = torch.zeros(2, models.TOKENS, dtype=torch.bool)
    expected[:, where] = True
    assert torch.equal(evaluate(graph, [mask])[0], expected)


def test_the_mask_of_several_ids() -> None:
    visual = tg.VisualTokens.ids(input="ids", low=8, high=9)
    ids = torch.tensor([[1, 8, 9, 2], [8, 9, 1, 2]])
    found = Captured.of(
        tg.ModelSpec(models.decoder(models.PreNorm, depth=1), {"t": tg.Task(codes, {"ids": ids}, visual=visual)}), "t"
    )
    graph = found.graph.copy()
    mask = IndexBuilder(Emitter(graph.graph, "test"), found.facts).visual
    assert torch.equal(evaluate(graph, [mask])[0], ids >= 8)


def test_a_batch_with_another_number_of_visual_tokens_is_refused() -> None:
    found = captured("understanding")
    accelerated = found.apply(site(0, 1))
    inputs = dict(found.graph.task.inputs)
    inputs["ids"] = inputs["ids"].clone()
    inputs["ids"][0, -1] = 9
    with pytest.raises(tg.BatchError):
        accelerated["understanding"](**inputs)

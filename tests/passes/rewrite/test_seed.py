"""Seeds: what they write, what they refuse, and that a seeded graph already computes the answer."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests.passes import models
from tests.passes.models import IMAGE_ID, Decoder
from tests.passes.tools import TASKS, Captured, Run, assert_well_formed, calls, captured, changes, listing, site
from tokgraph.errors import IllegalRewriteError, PlanError
from tokgraph.ir.node import module_path
from tokgraph.passes import PassDelta, Pipeline
from tokgraph.passes.analysis.loss_rows import loss_rows
from tokgraph.passes.rewrite import ExplicitCausalMask, PushDown, SeedSites
from tokgraph.passes.rewrite.index import check_disjoint_or_nested
from tokgraph.passes.rewrite.realise import seeds

aten = torch.ops.aten


def written(found: Captured, *sites: tg.DropSite, exact: bool = False) -> str:
    """What seeding changes in a graph whose masks are explicit already."""
    masks, seed = seeds(found.facts, found.sites(*sites), exact)
    before = Pipeline([masks]).run_task(found.graph, found.facts)
    return changes(before, Pipeline([seed]).run_task(before, found.facts))


def test_explicit_causal_mask() -> None:
    found = captured(dynamic=True)
    after = Pipeline([ExplicitCausalMask("understanding", (0,))]).run_task(found.graph, found.facts)
    assert_expected_inline(
        changes(found.graph, after),
        """\
+%ones = ones([%sym_size_int.2, %sym_size_int.2], dtype=torch.bool, device=cpu)  # bool[tokens, tokens] layers.0.attention by explicit-causal-mask
+%tril = tril(%ones)  # bool[tokens, tokens] layers.0.attention by explicit-causal-mask
-%scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %transpose.2, %transpose.3, None, 0.0, True)  # float64[batch, 2, tokens, 8] layers.0.attention
+%scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %transpose.2, %transpose.3, %tril, 0.0, False)  # float64[batch, 2, tokens, 8] layers.0.attention
""",
    )


def test_hide() -> None:
    """Keys, values and mask columns are selected; the block's end keeps the rows that were dropped."""
    assert_expected_inline(
        written(captured(dynamic=True), site(0, 1)),
        """\
+%eq_scalar = eq.Scalar(%ids, 9)  # bool[batch, tokens] by seed-sites
+%rows = rows(%eq_scalar, 6, True)  # int64[batch, 6] by seed-sites
+%uniform_score = uniform_score(%rows, 3)  # float32[batch, 6] by seed-sites
+%keep_rows = keep_rows(%rows, %uniform_score, 3, %sym_size_int.2)  # int64[batch, tokens - 3] by seed-sites
+%unsqueeze.2 = unsqueeze(%tril, 0)  # bool[1, tokens, tokens] layers.0.attention by seed-sites
+%unsqueeze.3 = unsqueeze(%unsqueeze.2, 0)  # bool[1, 1, tokens, tokens] layers.0.attention by seed-sites
+%expand = expand(%unsqueeze.3, [%sym_size_int, -1, -1, -1])  # bool[batch, 1, tokens, tokens] layers.0.attention by seed-sites
+%select = select(%expand, %keep_rows, 3, 0)  # bool[batch, 1, tokens, tokens - 3] layers.0.attention by seed-sites
+%select.2 = select(%transpose.2, %keep_rows, 2, 0)  # float64[batch, 2, tokens - 3, 8] layers.0.attention by seed-sites
-%scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %transpose.2, %transpose.3, %tril, 0.0, False)  # float64[batch, 2, tokens, 8] layers.0.attention
+%select.3 = select(%transpose.3, %keep_rows, 2, 0)  # float64[batch, 2, tokens - 3, 8] layers.0.attention by seed-sites
+%scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %select.2, %select.3, %select, 0.0, False)  # float64[batch, 2, tokens, 8] layers.0.attention
-%layer_norm.3 = layer_norm(%add.2, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[batch, tokens, 16] layers.1.norm1
+%drop = drop(%add.2, %keep_rows)  # float64[batch, tokens - 3, 16] layers.0 by seed-sites
+%restore = restore(%masked_scatter, %drop, %keep_rows)  # float64[batch, tokens, 16] layers.0 by seed-sites
+%layer_norm.3 = layer_norm(%restore, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[batch, tokens, 16] layers.1.norm1
-%add.3 = add.Tensor(%add.2, %linear.7)  # float64[batch, tokens, 16] layers.1
+%add.3 = add.Tensor(%restore, %linear.7)  # float64[batch, tokens, 16] layers.1
""",
    )


def test_freeze() -> None:
    """Attention sees everything; only the block's end differs."""
    assert_expected_inline(
        written(captured(dynamic=True), site(0, 1, mode="freeze")),
        """\
+%eq_scalar = eq.Scalar(%ids, 9)  # bool[batch, tokens] by seed-sites
+%rows = rows(%eq_scalar, 6, True)  # int64[batch, 6] by seed-sites
+%uniform_score = uniform_score(%rows, 3)  # float32[batch, 6] by seed-sites
+%keep_rows = keep_rows(%rows, %uniform_score, 3, %sym_size_int.2)  # int64[batch, tokens - 3] by seed-sites
-%layer_norm.3 = layer_norm(%add.2, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[batch, tokens, 16] layers.1.norm1
+%drop = drop(%add.2, %keep_rows)  # float64[batch, tokens - 3, 16] layers.0 by seed-sites
+%restore = restore(%masked_scatter, %drop, %keep_rows)  # float64[batch, tokens, 16] layers.0 by seed-sites
+%layer_norm.3 = layer_norm(%restore, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[batch, tokens, 16] layers.1.norm1
-%add.3 = add.Tensor(%add.2, %linear.7)  # float64[batch, tokens, 16] layers.1
+%add.3 = add.Tensor(%restore, %linear.7)  # float64[batch, tokens, 16] layers.1
""",
    )


def test_nested() -> None:
    """The inner index is relative to the rows that the outer one left, and so is its restore."""
    seeded = written(captured(dynamic=True), site(0, 2, 0.5, mode="freeze"), site(1, 2, 0.25, mode="freeze"))
    assert_expected_inline(
        seeded,
        """\
+%eq_scalar = eq.Scalar(%ids, 9)  # bool[batch, tokens] by seed-sites
+%rows = rows(%eq_scalar, 6, True)  # int64[batch, 6] by seed-sites
+%uniform_score = uniform_score(%rows, 3)  # float32[batch, 6] by seed-sites
+%keep_rows = keep_rows(%rows, %uniform_score, 3, %sym_size_int.2)  # int64[batch, tokens - 3] by seed-sites
+%select = select(%eq_scalar, %keep_rows, 1, 0)  # bool[batch, tokens - 3] by seed-sites
+%sym_size_int.3 = sym_size.int(%select, 1)  # tokens - 3
+%rows.2 = rows(%select, 3, True)  # int64[batch, 3] by seed-sites
+%uniform_score.2 = uniform_score(%rows.2, 2)  # float32[batch, 3] by seed-sites
+%keep_rows.2 = keep_rows(%rows.2, %uniform_score.2, 2, %sym_size_int.3)  # int64[batch, tokens - 4] by seed-sites
-%layer_norm.3 = layer_norm(%add.2, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[batch, tokens, 16] layers.1.norm1
+%drop = drop(%add.2, %keep_rows)  # float64[batch, tokens - 3, 16] layers.0 by seed-sites
+%restore = restore(%masked_scatter, %drop, %keep_rows)  # float64[batch, tokens, 16] layers.0 by seed-sites
+%drop.2 = drop(%restore, %keep_rows)  # float64[batch, tokens - 3, 16] layers.0 by seed-sites
+%layer_norm.3 = layer_norm(%restore, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[batch, tokens, 16] layers.1.norm1
-%add.3 = add.Tensor(%add.2, %linear.7)  # float64[batch, tokens, 16] layers.1
+%add.3 = add.Tensor(%restore, %linear.7)  # float64[batch, tokens, 16] layers.1
-%layer_norm.5 = layer_norm(%add.4, [16], @norm.weight, @norm.bias, 1e-05, False)  # float64[batch, tokens, 16] norm
+%drop.3 = drop(%add.4, %keep_rows)  # float64[batch, tokens - 3, 16] layers.1 by seed-sites
+%drop.4 = drop(%drop.3, %keep_rows.2)  # float64[batch, tokens - 4, 16] layers.1 by seed-sites
+%restore.2 = restore(%drop.2, %drop.4, %keep_rows.2)  # float64[batch, tokens - 3, 16] layers.1 by seed-sites
+%restore.3 = restore(%restore, %restore.2, %keep_rows)  # float64[batch, tokens, 16] layers.1 by seed-sites
+%layer_norm.5 = layer_norm(%restore.3, [16], @norm.weight, @norm.bias, 1e-05, False)  # float64[batch, tokens, 16] norm
""",
    )


def test_gone_for_good() -> None:
    """No restore: later keys are hidden as well, and labels and logits follow the rows that are left."""
    found = captured(dynamic=True)
    assert_expected_inline(
        written(found, site(1, 2, 0.5, restore=False)),
        """\
+%eq_scalar = eq.Scalar(%ids, 9)  # bool[batch, tokens] by seed-sites
+%demand_mask = demand_mask(%eq_scalar, text)  # bool[batch, tokens] by seed-sites
+%logical_not = logical_not(%demand_mask)  # bool[batch, tokens] by seed-sites
+%logical_and = logical_and(%eq_scalar, %logical_not)  # bool[batch, tokens] by seed-sites
+%rows = rows(%logical_and, 5, True)  # int64[batch, 5] by seed-sites
+%uniform_score = uniform_score(%rows, 2)  # float32[batch, 5] by seed-sites
+%keep_rows = keep_rows(%rows, %uniform_score, 2, %sym_size_int.2)  # int64[batch, tokens - 3] by seed-sites
+%unsqueeze.2 = unsqueeze(%tril, 0)  # bool[1, tokens, tokens] layers.1.attention by seed-sites
+%unsqueeze.3 = unsqueeze(%unsqueeze.2, 0)  # bool[1, 1, tokens, tokens] layers.1.attention by seed-sites
+%expand = expand(%unsqueeze.3, [%sym_size_int, -1, -1, -1])  # bool[batch, 1, tokens, tokens] layers.1.attention by seed-sites
+%select = select(%expand, %keep_rows, 3, 0)  # bool[batch, 1, tokens, tokens - 3] layers.1.attention by seed-sites
+%select.2 = select(%transpose.6, %keep_rows, 2, 0)  # float64[batch, 2, tokens - 3, 8] layers.1.attention by seed-sites
-%scaled_dot_product_attention.2 = scaled_dot_product_attention(%transpose.5, %transpose.6, %transpose.7, %tril, 0.0, False)  # float64[batch, 2, tokens, 8] layers.1.attention
+%select.3 = select(%transpose.7, %keep_rows, 2, 0)  # float64[batch, 2, tokens - 3, 8] layers.1.attention by seed-sites
+%scaled_dot_product_attention.2 = scaled_dot_product_attention(%transpose.5, %select.2, %select.3, %select, 0.0, False)  # float64[batch, 2, tokens, 8] layers.1.attention
-%layer_norm.5 = layer_norm(%add.4, [16], @norm.weight, @norm.bias, 1e-05, False)  # float64[batch, tokens, 16] norm
+%drop = drop(%add.4, %keep_rows)  # float64[batch, tokens - 3, 16] layers.1 by seed-sites
+%restore = restore(%add.2, %drop, %keep_rows)  # float64[batch, tokens, 16] layers.1 by seed-sites
+%layer_norm.5 = layer_norm(%restore, [16], @norm.weight, @norm.bias, 1e-05, False)  # float64[batch, tokens, 16] norm
+%select.4 = select(%linear.10, %keep_rows, 1, 0)  # float64[batch, tokens - 3, 24] head by seed-sites
-%mul.2 = %sym_size_int * %sym_size_int.2  # batch*tokens
-%view.10 = reshape(%linear.10, [%mul.2, 24])  # float64[batch*tokens, 24]
+%view.10 = reshape(%select.4, [-1, 24])  # float64[batch*(tokens - 3), 24]
-%_unsafe_view = reshape(%clone, [%mul.2])  # int64[batch*tokens]
+%select_targets = select_targets(%clone, %keep_rows, -100)  # int64[batch, tokens - 3] by seed-sites
+%_unsafe_view = reshape(%select_targets, [-1])  # int64[batch*(tokens - 3)]
-return [%cross_entropy_loss, %linear.10]
+return [%cross_entropy_loss, %select.4, %keep_rows]
""",
    )


def test_exact_readers_of_labels() -> None:
    """Logits and labels at the demanded rows; the loss takes them without knowing, and the rows are an output."""
    assert_expected_inline(
        written(captured(dynamic=True), exact=True),
        """\
+%eq_scalar = eq.Scalar(%ids, 9)  # bool[batch, tokens] by seed-sites
+%demand_mask = demand_mask(%eq_scalar, text)  # bool[batch, tokens] by seed-sites
+%sub = %sym_size_int.2 - 5  # tokens - 5
+%rows = rows(%demand_mask, %sub, False)  # int64[batch, tokens - 5] by seed-sites
+%select = select(%linear.10, %rows, 1, 0)  # float64[batch, tokens - 5, 24] head by seed-sites
-%mul.2 = %sym_size_int * %sym_size_int.2  # batch*tokens
-%view.10 = reshape(%linear.10, [%mul.2, 24])  # float64[batch*tokens, 24]
+%view.10 = reshape(%select, [-1, 24])  # float64[batch*(tokens - 5), 24]
-%_unsafe_view = reshape(%clone, [%mul.2])  # int64[batch*tokens]
+%select_targets = select_targets(%clone, %rows, -100)  # int64[batch, tokens - 5] by seed-sites
+%_unsafe_view = reshape(%select_targets, [-1])  # int64[batch*(tokens - 5)]
-return [%cross_entropy_loss, %linear.10]
+return [%cross_entropy_loss, %select, %rows]
""",
    )


def test_exact_readers_of_a_slice() -> None:
    """A slice of the token axis becomes a selection, all of whose rows are demanded here."""
    assert_expected_inline(
        written(captured("generation", dynamic=True), exact=True),
        """\
+%add.6 = %add + -1  # tokens + 5
+%range_mask = range_mask(%cat, %sym_size_int.2, %add)  # bool[batch, tokens + 6] by seed-sites
-%slice = slice.Tensor(%layer_norm.5, 1, %sub, -1)  # float64[batch, 6, 16]
-%linear.9 = linear(%slice, @code_head.weight, @code_head.bias)  # float64[batch, 6, 8] code_head
+%range_rows = range_rows(%range_mask, %sub, %add.6)  # int64[batch, 6] by seed-sites
+%select = select(%layer_norm.5, %range_rows, 1, 0)  # float64[batch, 6, 16] norm by seed-sites
+%linear.9 = linear(%select, @code_head.weight, @code_head.bias)  # float64[batch, 6, 8] code_head
""",
    )


def test_hide_from_eager_attention() -> None:
    """The scores that softmax normalises and the values are selected; the weights in between become narrower."""
    found = Captured.of(models.spec(models.Eager, depth=1), "t")
    assert_expected_inline(
        written(found, site(0, 1)),
        """\
+%eq_scalar = eq.Scalar(%ids, 9)  # bool[2, 8] tokens by seed-sites
+%rows = rows(%eq_scalar, 3, True)  # int64[2, 3] tokens by seed-sites
+%uniform_score = uniform_score(%rows, 2)  # float32[2, 3] tokens by seed-sites
+%keep_rows = keep_rows(%rows, %uniform_score, 2, 8)  # int64[2, 7] tokens by seed-sites
+%select = select(%unsqueeze.3, %keep_rows, 2, 0)  # float64[2, 1, 7, 4] stages.stage_0.0.attention by seed-sites
-%softmax = softmax.int(%masked_fill, -1)  # float64[2, 1, 8, 8] stages.stage_0.0.attention
-%clone = clone(%softmax)  # float64[2, 1, 8, 8] stages.stage_0.0.attention
-%matmul.2 = matmul(%clone, %unsqueeze.3)  # float64[2, 1, 8, 4] stages.stage_0.0.attention
+%select.2 = select(%masked_fill, %keep_rows, 3, 0)  # float64[2, 1, 8, 7] stages.stage_0.0.attention by seed-sites
+%softmax = softmax.int(%select.2, -1)  # float64[2, 1, 8, 7] stages.stage_0.0.attention
+%clone = clone(%softmax)  # float64[2, 1, 8, 7] stages.stage_0.0.attention
+%matmul.2 = matmul(%clone, %select)  # float64[2, 1, 8, 4] stages.stage_0.0.attention
+%drop = drop(%add.2, %keep_rows)  # float64[2, 7, 4] stages.stage_0.0 by seed-sites
+%restore = restore(%embedding, %drop, %keep_rows)  # float64[2, 8, 4] stages.stage_0.0 by seed-sites
-%layer_norm.3 = layer_norm(%add.2, [4], @norm.weight, @norm.bias, 1e-05, False)  # float64[2, 8, 4] norm
+%layer_norm.3 = layer_norm(%restore, [4], @norm.weight, @norm.bias, 1e-05, False)  # float64[2, 8, 4] norm
""",
    )


# ------------------------------------------------------------------ the pass contract


SITES = {
    "hide": (site(0, 1),),
    "hide all": (site(0, 2, 0.0),),
    "hide random": (site(0, 1, 0.34, "random", seed=5),),
    "freeze": (site(0, 2, 0.25, mode="freeze"),),
    "nested": (site(0, 2, 0.5), site(1, 2, 0.25)),
    "freeze in hide": (site(0, 2, 0.5), site(1, 2, 0.25, mode="freeze")),
    "nothing but demand": (),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", SITES)
def test_a_seeded_graph_computes_what_the_sunk_one_does(name: str, task: str, exact: bool) -> None:
    found = captured(task)
    seeded, sunk = found.seeded(*SITES[name], exact=exact), found.rewritten(*SITES[name], exact=exact)
    assert_well_formed(seeded, found.graph)
    Run.of(seeded).assert_equals(Run.of(sunk))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_keep_everything_is_the_identity(task: str, dynamic: bool) -> None:
    found = captured(task, dynamic=dynamic)
    for sites in ((site(0, 2, 1.0),), (site(0, 1, 1.0, mode="freeze"), site(1, 2, 1.0, "random"))):
        Run.of(found.seeded(*sites)).assert_equals(Run.of(found.graph))


def test_labels_follow_rows_that_are_gone() -> None:
    found = captured("understanding")
    seeded, sunk = found.seeded(site(0, 1, 0.0, restore=False)), found.rewritten(site(0, 1, 0.0, restore=False))
    Run.of(seeded).assert_equals(Run.of(sunk))
    (leaf, rows), *_ = seeded.compact_outputs.items()
    loss, logits, index = seeded.graph_module(*seeded.flatten(seeded.example()))
    assert (leaf, rows) == (1, 2)
    assert logits.shape[1] == index.shape[1] == 6  # five text tokens and the visual token that predicts text
    ids = seeded.example()["ids"]
    last = (ids == 9).int().cumsum(1).argmax(1)
    text = [[i for i, v in enumerate(row.tolist()) if v != 9] for row in ids]
    assert index.tolist() == [sorted([*t, p]) for t, p in zip(text, last.tolist(), strict=True)]
    assert torch.isfinite(loss)


@pytest.mark.parametrize("exact", [False, True])
def test_no_site_changes_nothing(exact: bool) -> None:
    """A task with full outputs demands every row, so exact has nothing to write either."""
    found = captured("understanding", outputs="full")
    copy = found.graph.copy()
    result = SeedSites("understanding", (), exact)(copy.graph_module, found.facts)
    assert not result.modified
    assert changes(found.graph, copy) == ""
    assert copy.compact_outputs == {}


def test_attentions_with_masks_stay_as_they_are() -> None:
    found = captured()
    once = Pipeline([ExplicitCausalMask("understanding", (0, 1))]).run_task(found.graph, found.facts).copy()
    before = once.copy()
    result = ExplicitCausalMask("understanding", (0, 1))(once.graph_module, found.facts)
    assert not result.modified
    assert changes(before, once) == ""
    Run.of(once).assert_equals(Run.of(found.graph))


def test_new_nodes_belong_to_the_block_they_serve() -> None:
    found = captured()
    seeded = found.seeded(site(0, 2, 0.5))
    keys = [n for n in calls(seeded, torch.ops.tokgraph.select.default) if n.args[2] == 2]
    assert [module_path(n) for n in keys] == ["layers.0.attention"] * 2 + ["layers.1.attention"] * 2
    restores = calls(seeded, torch.ops.tokgraph.restore.default)
    assert [module_path(n) for n in restores] == ["layers.0", "layers.1"]
    assert {n.meta["made_by"] for n in (*keys, *restores)} == {"seed-sites"}


def test_the_observer_sees_what_passes_did() -> None:
    found = captured()
    deltas: list[PassDelta] = []
    masks, seed = seeds(found.facts, found.sites(site(0, 1)), exact=False)
    passes = [masks, seed, PushDown(), PushDown()]
    graph = Pipeline(passes, lambda delta, _: deltas.append(delta)).run_task(found.graph, found.facts)
    assert [(d.task, d.name, d.modified) for d in deltas] == [
        ("understanding", "explicit-causal-mask", True),
        ("understanding", "seed-sites", True),
        ("understanding", "push-down", True),
        ("understanding", "push-down", False),
    ]
    for before, after in zip(deltas, deltas[1:], strict=False):
        assert before.nodes_after == after.nodes_before
    assert deltas[0].nodes_before == len(found.graph.graph.nodes)
    assert deltas[-1].nodes_after == len(graph.graph.nodes)
    assert deltas[1].nodes_after - deltas[1].nodes_before == 12  # seeds are a few nodes a block


# ------------------------------------------------------------------ refusals


def test_spans_that_overlap_are_refused() -> None:
    found = captured(layers=3)
    with pytest.raises(IllegalRewriteError, match=r"spans \[0, 2\) and \[1, 3\) overlap"):
        found.seeded(site(0, 2), site(1, 3))
    with pytest.raises(IllegalRewriteError, match=r"spans \[1, 3\) and \[2, 4\) overlap") as caught:
        check_disjoint_or_nested((tg.DropSite("t", 0, 1), tg.DropSite("t", 1, 3), tg.DropSite("t", 2, 4)))
    assert caught.value.help


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 1), (1, 2)],
        [(0, 4), (1, 2)],
        [(0, 4), (0, 2)],
        [(0, 4), (2, 4)],
        [(0, 2), (0, 2)],
        [(0, 4), (1, 2), (2, 4)],
    ],
)
def test_spans_that_are_nested_or_apart(spans: list[tuple[int, int]]) -> None:
    check_disjoint_or_nested(tuple(tg.DropSite("t", a, b) for a, b in spans))


def test_a_site_for_good_reaches_the_end() -> None:
    """Its rows never come back, so a later span lies inside it, and one that began before cannot end after it began."""
    found = captured("understanding", layers=3)
    found.seeded(site(0, 1, restore=False), site(1, 2))
    with pytest.raises(IllegalRewriteError, match="a site without restore reaches the last block"):
        found.seeded(site(0, 2), site(1, 2, restore=False))


def test_hide_inside_freeze_is_refused() -> None:
    with pytest.raises(PlanError, match="block 1 has a 'hide' site inside a 'freeze' site"):
        captured().seeded(site(0, 2, mode="freeze"), site(1, 2, 0.25))


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.75])
def test_for_good_inside_a_span_that_comes_back_is_refused(keep: float) -> None:
    """The span around may have taken the demanded rows that must stay: it ended in a negative number of rows."""
    with pytest.raises(PlanError, match="does not restore, and lies in a site"):
        captured().rewritten(site(0, 2, keep), site(1, None, 0.5, restore=False))
    captured().rewritten(site(0, 2, 1.0), site(1, None, 0.5, restore=False))  # the one around drops nothing


def test_rows_cannot_go_for_good_where_all_are_demanded() -> None:
    found = captured(outputs="full")
    with pytest.raises(PlanError, match="every row of its outputs is demanded") as caught:
        found.seeded(site(0, 1, restore=False))
    assert "restore=True" in str(caught.value.help)


# ------------------------------------------------------------------ losses


def shifted_by_slices(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The next-token loss as transformers wrote it for years."""
    x = model.tokens(ids)
    for stage in model.stages.values():
        x = stage(x)
    logits = model.head(model.norm(x))
    labels = ids.masked_fill(ids == IMAGE_ID, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


def classes_first(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits transposed to ``[batch, classes, tokens]``."""
    loss, logits = shifted_by_slices(model, ids)
    labels = F.pad(ids.masked_fill(ids == IMAGE_ID, -100), (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels) + 0 * loss, logits


def summed(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A loss that is no cross entropy."""
    _, logits = shifted_by_slices(model, ids)
    labels = F.pad(ids, (0, 1))[:, 1:]
    weights = (labels != IMAGE_ID).double() * torch.arange(ids.shape[1] - 1, -1, -1).sign()
    rows = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -(rows * weights).sum() / weights.sum(), logits


def weighted(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Class weights, smoothing, another ignored label, a sum instead of a mean."""
    _, logits = shifted_by_slices(model, ids)
    labels = F.pad(ids.masked_fill(ids == IMAGE_ID, 0), (0, 1))[:, 1:]
    weight = torch.arange(12.0, dtype=logits.dtype)
    options = {"weight": weight, "label_smoothing": 0.1, "ignore_index": 0, "reduction": "sum"}
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options), logits  # type: ignore[arg-type]


def with_loss(forward: object, outputs: str = "loss") -> Captured:
    task = tg.Task(
        forward,  # type: ignore[arg-type]
        {"ids": models.image_ids()},
        visual=tg.VisualTokens.ids(input="ids", equal=IMAGE_ID),
        reads="text",
        outputs=outputs,  # type: ignore[arg-type]
    )
    return Captured.of(tg.ModelSpec(models.decoder(models.PreNorm), {"t": task}), "t")


@pytest.mark.parametrize(
    "forward",
    [
        shifted_by_slices,
        pytest.param(classes_first, marks=pytest.mark.slow),
        pytest.param(summed, marks=pytest.mark.slow),
        weighted,
    ],
)
def test_every_way_to_write_a_loss(forward: object) -> None:
    """Exact, hidden and gone for good: the same numbers as the captured graph or the seeded one."""
    found = with_loss(forward)
    plain, exact = Run.of(found.graph), Run.of(found.rewritten(exact=True))
    torch.testing.assert_close(exact.outputs[0], plain.outputs[0], rtol=1e-12, atol=1e-12)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(exact.gradients[name], gradient, rtol=1e-12, atol=1e-12)
    for sites in ((site(0, 1),), (site(0, 1, 0.34, restore=False),)):
        for lean in (False, True):
            Run.of(found.seeded(*sites, exact=lean)).assert_equals(Run.of(found.rewritten(*sites, exact=lean)))
            assert tg.verify(found.program, found.apply(*sites, exact=lean)).passed


def test_a_loss_over_slices_is_narrowed() -> None:
    """The slice that drops the last row, and what comes after it, hold demanded rows only."""
    sunk = with_loss(shifted_by_slices).rewritten(exact=True)
    (loss,) = calls(sunk, aten.cross_entropy_loss.default)
    logits = loss.args[0]
    assert isinstance(logits, torch.fx.Node)
    demanded = 5  # of 7 rows: text, and the visual row before text
    assert tuple(logits.meta["val"].shape) == (2 * demanded, 12)


@pytest.mark.slow
def test_what_counts_as_a_loss_over_rows() -> None:
    for forward, axis in ((shifted_by_slices, 1), (classes_first, 2), (weighted, 1)):
        graph = with_loss(forward).graph
        found = [rows for n in graph.graph.nodes if (rows := loss_rows(n)) is not None]
        assert axis in {rows.axis for rows in found}, forward
    graph = with_loss(summed).graph
    assert not any(loss_rows(n) for n in graph.graph.nodes)


def test_full_outputs_keep_their_shape() -> None:
    found = with_loss(shifted_by_slices, outputs="full")
    accelerated = found.apply(site(0, 1), exact=True)
    _, logits = accelerated["t"](ids=models.image_ids())
    assert logits.shape == (2, models.TOKENS, 12)
    assert accelerated.program["t"].compact_outputs == {}
    assert tg.verify(found.program, accelerated).passed


def test_seeds_never_touch_other_blocks() -> None:
    """A span's seeds leave the lines of other blocks alone, but for the stream they read."""
    found = captured(layers=3)

    def lines(graph: tg.TaskGraph) -> list[str]:
        text = listing(graph, lambda n: module_path(n).startswith("layers.0") and "made_by" not in n.meta)
        return text.splitlines()

    assert lines(found.seeded(site(1, 2))) == lines(found.graph)

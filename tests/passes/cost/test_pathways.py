"""Pathway profiles, sharing index and coverage against hand calculations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests.passes import models
from tests.passes.tools import TASKS, Captured, captured, site
from tokgraph.ir.facts import TaskFacts
from tokgraph.passes.cost.pathways import Pathways, coverage, pathways, row_spaces, sharing_index

IMAGE = 6  # visual tokens of a sample of the tiny model


def profile(found: Captured, *sites: tg.DropSite, exact: bool = True) -> dict[str, float]:
    """Visual tokens that each parameter transforms."""
    shares = pathways(found.rewritten(*sites, exact=exact), found.facts).profile
    return {name: round(share * IMAGE, 9) for name, share in shares.items()}


def of_block(shares: dict[str, float], block: int) -> dict[str, float]:
    prefix = f"layers.{block}."
    return {name.removeprefix(prefix): share for name, share in shares.items() if name.startswith(prefix)}


BEFORE_ATTENTION = {"norm1.weight", "norm1.bias", "attention.qkv.weight", "attention.qkv.bias"}
EXPECTED_LAST = {"understanding": 1, "generation": 5}
"""Demanded visual rows: the last one (it predicts text), or all but the last (they predict the next image token)."""


@pytest.mark.parametrize("task", TASKS)
def test_what_exact_leaves(task: str) -> None:
    """All visual tokens in every block; in the last one, only demanded rows after the keys and values."""
    shares = profile(captured(task))
    assert set(of_block(shares, 0).values()) == {IMAGE}
    for name, share in of_block(shares, 1).items():
        assert share == (IMAGE if name in BEFORE_ATTENTION else EXPECTED_LAST[task]), name


def test_what_makes_and_reads_visual_rows() -> None:
    """Each task's own entrance counts; the table of text ids does not, although placeholders are looked up in it."""
    shares = profile(captured("understanding"))
    assert (shares["patches.weight"], shares["embed.weight"]) == (IMAGE, 0)
    assert "codes.weight" not in shares
    shares = profile(captured("generation"))
    assert (shares["codes.weight"], shares["embed.weight"]) == (IMAGE, 0)
    assert "patches.weight" not in shares


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_hidden_span(task: str, keep: float) -> None:
    found = captured(task)
    shares = profile(found, site(0, 1, keep))
    assert set(of_block(shares, 0).values()) == {keep * IMAGE}
    assert of_block(shares, 1) == of_block(profile(found), 1)


def test_frozen_rows_still_pass_keys_and_values() -> None:
    shares = of_block(profile(captured("understanding"), site(0, 1, 0.0, mode="freeze")), 0)
    for name, share in shares.items():
        assert share == (IMAGE if name in BEFORE_ATTENTION else 0), name


def test_rows_that_are_gone_stay_away() -> None:
    shares = profile(captured("understanding"), site(0, 1, 0.5, restore=False))
    assert set(of_block(shares, 0).values()) == {3}
    assert of_block(shares, 1)["attention.qkv.weight"] == 3


def test_nested_sites() -> None:
    shares = profile(captured("understanding", layers=3), site(0, 2, 4 / 6), site(1, 2, 1 / 6))
    assert set(of_block(shares, 0).values()) == {4}
    assert set(of_block(shares, 1).values()) == {1}


def test_exact_changes_no_profile() -> None:
    """Work that no demanded output reads does not count, before or after."""
    found = captured("understanding")
    assert dict(pathways(found.rewritten(exact=True), found.facts).profile) == dict(found.facts.profile)


@pytest.mark.parametrize("task", TASKS)
def test_tokens_per_block(task: str) -> None:
    found = captured(task, layers=3)
    whole = pathways(found.rewritten(exact=True), found.facts)
    thinned = pathways(found.rewritten(site(1, 2, 0.5), exact=True), found.facts)
    assert whole.tokens_per_block == (IMAGE, IMAGE, EXPECTED_LAST[task])
    assert thinned.tokens_per_block == (IMAGE, 3, EXPECTED_LAST[task])


def test_a_selector_that_reads_values_counts_what_it_chose() -> None:
    """Random and norm keep other rows, and as many."""
    for selector in ("uniform", "random", "norm"):
        shares = profile(captured("understanding"), site(0, 1, 0.5, selector))
        assert set(of_block(shares, 0).values()) == {3}, selector


def on_meta(task: str) -> Captured:
    spec = captured(task).program.spec
    return Captured.of(tg.ModelSpec(models_on_meta(spec.model), spec.tasks), task)


def models_on_meta(model: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(model).to("meta")


@pytest.mark.parametrize("selector", ["uniform", "norm"])
def test_a_model_without_storage_has_the_same_profile(selector: str) -> None:
    """What a norm selector keeps cannot be known there, how many rows it keeps can."""
    real, meta = captured("understanding"), on_meta("understanding")
    sites = (site(0, 1, 0.5, selector),)
    assert profile(real, *sites) == profile(meta, *sites)


def test_row_spaces_name_the_indices() -> None:
    found = captured("understanding", layers=3)
    graph = found.rewritten(site(0, 2, 0.5), site(1, 2, 0.25))
    spaces = row_spaces(graph.graph, found.facts)
    nodes = {n.name: n for n in graph.graph.nodes}
    depth = [len(spaces[nodes[b.end], 1]) for b in found.facts.blocks]
    assert depth == [1, 2, 0]
    outer, inner = spaces[nodes[found.facts.blocks[1].end], 1]
    assert spaces[nodes[found.facts.blocks[0].end], 1] == (outer,)
    assert inner is not outer


# ------------------------------------------------------------------ sharing index and coverage


SIZES = {"a": 3, "b": 1, "text": 10, "only": 6}
BEFORE = {
    "understanding": {"a": 1.0, "b": 0.5, "text": 0.0, "only": 1.0},
    "generation": {"a": 1.0, "b": 1.0, "text": 0.0},
}


@pytest.mark.parametrize(
    ("understanding", "generation", "expected"),
    [
        ({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 1.0}, 1.0),
        ({"a": 0.5, "b": 0.25}, {"a": 0.5, "b": 0.5}, 1.0),  # both thinned alike
        ({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, 1.0),  # both gone: nothing diverges
        ({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}, 0.0),  # fully divergent
        ({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}, (3 * 0.5 + 1 * 1.0) / 4),
        ({"a": 0.25, "b": 0.5}, {"a": 0.5, "b": 0.0}, (3 * 0.5 + 1 * 0.0) / 4),
        ({"b": 0.5}, {"a": 1.0, "b": 1.0}, (3 * 0.0 + 1 * 1.0) / 4),  # "a" is no longer in one of the graphs
    ],
)
def test_the_sharing_index(understanding: dict[str, float], generation: dict[str, float], expected: float) -> None:
    """Over ``a`` and ``b``: ``text`` passes no visual token, ``only`` is used by one task."""
    after = {"understanding": understanding, "generation": generation}
    assert sharing_index(BEFORE, after, SIZES) == pytest.approx(expected, abs=1e-15)


def test_a_parameter_that_is_visual_in_one_task_only() -> None:
    """It cannot be thinned in the other, whose ratio counts as 1."""
    before = {"u": {"p": 0.5}, "g": {"p": 0.0}}
    assert sharing_index(before, {"u": {"p": 0.1}, "g": {"p": 0.0}}, {"p": 7}) == pytest.approx(0.2)
    assert sharing_index(before, {"u": {"p": 0.5}, "g": {"p": 0.0}}, {"p": 7}) == 1.0


def test_without_shared_parameters_nothing_diverges() -> None:
    assert sharing_index({"u": {"a": 1.0}, "g": {"b": 1.0}}, {"u": {}, "g": {}}, {"a": 1, "b": 1}) == 1.0
    assert coverage({"u": {"a": 0.0}}, {"u": {}}, {"a": 1}) == 1.0


def test_the_coverage() -> None:
    """Ratios 0.5 and 1 of a, 1 and 0 of b, 0.25 of ``only``; sizes 3, 3, 1, 1, 6."""
    after = {"understanding": {"a": 0.5, "b": 0.5, "only": 0.25}, "generation": {"a": 1.0, "b": 0.0}}
    expected = (3 * 0.5 + 1 * 1.0 + 6 * 0.25 + 3 * 1.0 + 1 * 0.0) / (3 + 1 + 6 + 3 + 1)
    assert coverage(BEFORE, after, SIZES) == pytest.approx(expected, abs=1e-15)
    assert coverage(BEFORE, BEFORE, SIZES) == 1.0


# ------------------------------------------------------------------ parameters in disguise


class Tied(models.Decoder):
    """The head is the transposed embedding table, cast by hand."""

    def loss(self, x: Tensor, ids: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        labels = F.pad(ids.masked_fill(ids == models.IMAGE_ID, -100), (0, 1), value=-100)[:, 1:]
        return F.cross_entropy((x @ (self.tokens.weight * 2).t()).flatten(0, 1), labels.flatten())


def facts_and_pathways(spec: tg.ModelSpec) -> tuple[TaskFacts, Pathways]:
    program = tg.capture(spec)
    facts = tg.analyze(program)["t"]
    return facts, pathways(program["t"], facts)


def test_a_parameter_used_through_other_parameters() -> None:
    """``weight * 2`` and its transpose are made of the parameter alone; what they multiply decides."""
    torch.manual_seed(0)
    model = Tied(models.PreNorm, depth=1).double()
    task = tg.Task(
        models.embedded,
        {"ids": models.image_ids()},
        visual=tg.VisualTokens.ids(input="ids", equal=models.IMAGE_ID),
        reads="text",
    )
    facts, whole = facts_and_pathways(tg.ModelSpec(model, {"t": task}))
    assert whole.profile["tokens.weight"] == 1.0
    assert facts.profile["tokens.weight"] == 1.0  # all ids are looked up in it, whatever the head reads
    assert facts.profile["stages.stage_0.0.mlp.0.weight"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "block", [models.PreNorm, models.Eager, models.Parallel, models.NormAfter, models.SelfAndCross]
)
def test_every_parameter_of_a_block_passes_all_visual_tokens(block: type[torch.nn.Module]) -> None:
    """In the captured graph, whatever the attention."""
    _, whole = facts_and_pathways(models.spec(block))
    first = {name: share for name, share in whole.profile.items() if name.startswith("stages.")}
    assert len(first) >= 18
    assert set(first.values()) == {1.0}, {name for name, share in first.items() if share != 1.0}

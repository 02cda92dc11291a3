"""Facts as plain data: what ``inspect --json`` prints and ``facts.json`` holds."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan
from typing import Any

import pytest

import tokgraph as tg
from tests.harness import Captured, captured_tiny
from tokgraph.measurement.measurements import measure
from tokgraph.report.published_flops import Shape, fastv, himix, himix_rows
from tokgraph.report.summary import summarise, with_nodes

pytestmark = pytest.mark.xdist_group("janus")  # one process captures the examples

AMOUNTS = (
    "forward_flops", "backward_flops", "forward_read", "forward_written", "backward_read", "backward_written", "saved",
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(dynamic_digits: Captured) -> tg.Measurements:
    found = measure(dynamic_digits.facts)
    cosines = (replace(found.cosines[0], visual=nan), *found.cosines[1:])
    return replace(found, cosines=cosines)


@pytest.fixture(scope="module")
def summary(dynamic_digits: Captured, measured: tg.Measurements) -> dict[str, Any]:
    sizes = [{"batch": 8, "tokens": 40}]
    return summarise(dynamic_digits.facts, measured, sizes=sizes, convention="fastv")


def test_it_is_json_without_nan(summary: dict[str, Any], dynamic_digits: Captured) -> None:
    """What was not there to measure is ``null``."""
    for data in (summary, with_nodes(summary, dynamic_digits.facts)):
        assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert summary["gradient_cosines"][0]["visual"] is None
    assert isinstance(summary["gradient_cosines"][1]["visual"], float)


def test_it_names_its_schema_and_tasks(summary: dict[str, Any]) -> None:
    assert summary["schema"] == 2
    assert list(summary["tasks"]) == ["understanding", "generation"]
    shared = summary["shared_parameters"]
    assert "blocks.0.attention.qkv.weight" in shared["names"]
    assert shared["elements"] > 0


def test_cost_is_that_of_the_example_and_of_the_sizes_asked(summary: dict[str, Any], dynamic_digits: Captured) -> None:
    for name, task in summary["tasks"].items():
        cost = dynamic_digits.facts[name].cost
        example, asked = task["cost"]["at"]
        assert example["total"] == dict(zip(AMOUNTS, cost.at().total().amounts(), strict=True))
        assert asked["total"] == dict(zip(AMOUNTS, cost.at(batch=8, tokens=40).total().amounts(), strict=True))
        assert asked["sizes"] == {"batch": 8, "tokens": 40, "visual": 16}
        assert (
            example["sizes"]
            == task["cost"]["sizes"]
            == {"batch": 4, "tokens": 25, "visual": 16} | ({"tokens": 20} if name == "generation" else {})
        )
        assert list(example["by_region"]) == ["encoder", "input", *(f"block {i}" for i in range(4)), "head"]
        assert list(example["by_kind"]) == ["visual", "text", "other"]
        for parts in ("by_region", "by_kind", "by_module"):
            assert sum(w["saved"] for w in example[parts].values()) == example["total"]["saved"]
        assert task["cost"]["uncounted"] == []
        assert task["cost"]["assumed"] == list(cost.sizes.assumed)
        symbolic = task["cost"]["symbolic"]["forward_flops"]
        assert all(
            symbol in symbolic for symbol in (task["cost"]["symbols"]["batch"], task["cost"]["symbols"]["tokens"])
        )


def test_what_is_assumed_is_said(summary: dict[str, Any]) -> None:
    """A mask says which tokens are visual, so no shape says how many images there are; generation has no encoder."""
    assert {name: task["cost"]["assumed"] for name, task in summary["tasks"].items()} == {
        "understanding": [
            "the encoder grows with the number of visual tokens: an image for every 16 visual tokens of a sample"
        ],
        "generation": [],
    }


def test_a_published_formula_reads_the_graph(summary: dict[str, Any]) -> None:
    """64 hidden, 192 in the feed-forward part, 4 layers; the formula counts one sequence."""
    for tokens, found in zip((25, 40), summary["tasks"]["understanding"]["cost"]["at"], strict=True):
        shape = Shape(layers=4, hidden=64, intermediate=192, tokens=tokens, visual=16)
        assert found["convention"]["name"] == "fastv"
        assert found["convention"]["of"] == {
            "layers": 4,
            "hidden": 64,
            "intermediate": 192,
            "tokens": tokens,
            "visual": 16,
        }
        assert found["convention"]["forward_flops"] == fastv(shape, rows_per_layer=[tokens] * 4)


def test_without_measures_and_published_flops(dynamic_digits: Captured) -> None:
    found = summarise(dynamic_digits.facts)
    assert found["gradient_cosines"] is None
    for task in found["tasks"].values():
        assert task["measured"] is None
        (example,) = task["cost"]["at"]
        assert "convention" not in example


def test_measures(summary: dict[str, Any]) -> None:
    for task in summary["tasks"].values():
        allocation, redundancy = task["measured"]["allocation"], task["measured"]["redundancy"]
        assert len(allocation["mass"]) == len(redundancy["cosine"]) == len(redundancy["effective_rank"]) == 4
        assert len(allocation["mass"][0][0]) == len(allocation["queries"]) == len(allocation["rows"])
        for head in allocation["mass"][0]:
            assert [sum(query) for query in head] == pytest.approx([1] * len(head))
        assert set(task["measured"]["gradients"]["head.weight"]) == {"visual", "text"}


def test_pathways_by_group(summary: dict[str, Any], dynamic_digits: Captured) -> None:
    """Every parameter that a task uses is in one group; means are weighted by size, norms are those of the whole group."""
    groups = {entry["group"]: entry for entry in summary["pathways"]}
    assert [name for name in groups if name.startswith("block")] == [f"block {i}" for i in range(4)]
    elements = {name: p.numel() for name, p in dynamic_digits.model.named_parameters()}
    used = {name for task in dynamic_digits.facts.values() for name in task.profile}
    assert sum(entry["elements"] for entry in groups.values()) == sum(elements[name] for name in used)
    mine = [name for name in used if name.startswith("blocks.3.")]
    for task, facts in dynamic_digits.facts.items():
        mean = sum(elements[name] * facts.profile.get(name, 0) for name in mine) / groups["block 3"]["elements"]
        assert groups["block 3"]["profile"][task] == pytest.approx(mean)
        norms = summary["tasks"][task]["measured"]["gradients"]
        visual, text = (sum(norms[n][k] ** 2 for n in mine if n in norms) ** 0.5 for k in ("visual", "text"))
        assert groups["block 3"]["visual_gradient"][task] == pytest.approx(visual / (visual + text))
        assert 0 < mean <= 1
        assert (mean < 1) == (task == "understanding")  # one image row of its last block is read, all of the other's
    for entry in groups.values():
        for task, share in entry["profile"].items():
            assert share > 0 or not entry["visual_gradient"][task]


def test_attention_to_the_image_side_by_side(summary: dict[str, Any]) -> None:
    assert [(a["task"], a["query"]) for a in summary["image_attention"]] == [
        ("understanding", "output"),
        ("generation", "image"),
    ]
    assert all(len(a["mass"]) == 4 for a in summary["image_attention"])


@pytest.mark.slow
def test_cost_after_a_plan() -> None:
    """Beside the cost before it, for all sizes; the published formula counts the rows that are left."""
    tiny = captured_tiny(4, dynamic=True)
    sites = tuple(tg.DropSite(task, 1, 3, 0.5) for task in tiny.facts)
    accelerated = tiny.apply(tg.Plan(sites, exact=False))
    sizes = [{"batch": 8}, {"batch": 3, "tokens": 40}]
    facts = tiny.facts
    found = summarise(facts, sizes=sizes, convention="fastv", accelerated=accelerated)
    after = tg.costs(accelerated.program, facts)
    for name, task in found["tasks"].items():
        for asked, at in zip(({}, *sizes), task["cost"]["at"], strict=True):
            assert at["after"] == after[name].at(**asked).rollups() | {"convention": at["after"]["convention"]}
            assert at["after"]["total"]["forward_flops"] < at["total"]["forward_flops"]
            flops = [
                [by["by_region"][f"block {block}"]["forward_flops"] for block in range(4)] for by in (at, at["after"])
            ]
            assert [a < b for b, a in zip(*flops, strict=True)] == [False, True, True, False]
            shape = Shape(**at["convention"]["of"])
            rows = [shape.text + visual for visual in (6, 3, 3, 6)]
            assert at["after"]["convention"]["forward_flops"] == fastv(shape, rows_per_layer=rows)


@pytest.mark.slow
def test_keys_of_frozen_rows_count_in_a_published_formula() -> None:
    """``himix``: all rows are keys, text rows alone are computed."""
    tiny = captured_tiny(4, dynamic=True)
    sites = tuple(tg.DropSite(task, 0, None, 0.0, mode="freeze") for task in tiny.facts)
    accelerated = tiny.apply(tg.Plan(sites, exact=False))
    facts = tiny.facts
    found = summarise(facts, convention="himix", accelerated=accelerated)
    for task in found["tasks"].values():
        (at,) = task["cost"]["at"]
        rows = himix_rows(Shape(**at["convention"]["of"]))
        expected = himix(Shape(**at["convention"]["of"]), rows_per_layer=rows.rows, keys_per_layer=rows.keys)
        assert at["after"]["convention"]["forward_flops"] == expected < at["convention"]["forward_flops"]


def test_the_file_holds_every_node_and_profile(summary: dict[str, Any], dynamic_digits: Captured) -> None:
    full = with_nodes(summary, dynamic_digits.facts)
    for name, task in full["tasks"].items():
        nodes = task["nodes"]
        for amount in AMOUNTS:
            assert sum(n[amount] for n in nodes) == task["cost"]["at"][0]["total"][amount]
        calls = {n.name for n in dynamic_digits.program[name].graph.nodes if n.op == "call_function"}
        assert {n["node"] for n in nodes} <= calls
        assert {"node", "op", "module", "region", "block", "visual", "text"} <= set(nodes[0])
        assert task["profile"] == dict(dynamic_digits.facts[name].profile)
        assert isinstance(summary["tasks"][name]["nodes"], int)


def test_a_size_that_is_fixed_is_refused(dynamic_digits: Captured) -> None:
    with pytest.raises(tg.AnalysisError, match="has no size 'pixels'"):
        summarise(dynamic_digits.facts, sizes=[{"pixels": 3}])

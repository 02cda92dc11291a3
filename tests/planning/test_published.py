"""The published methods: their sites by hand, the options they refuse, their results, and how far they part the tasks."""

from __future__ import annotations

import pytest

import tokgraph as tg
from tests.harness import Captured, captured_tiny
from tests.planning.facts import G, U, facts
from tokgraph.ir.plan import DropSite
from tokgraph.planning import policies, policy
from tokgraph.planning.check import check_plan
from tokgraph.report.report import make_report

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

UNDERSTANDING = ("fastv", "pyramiddrop", "dart", "task-specific", "himix")
PUBLISHED = (*UNDERSTANDING, "random-ltd", "hmgen", "himix-hmgen-share-all", "himix-hmgen-share-partial")
FOUR = facts(4)
"""Four blocks and six visual tokens on both tasks, as those of ``four``."""


@pytest.fixture(scope="module")
def four() -> Captured:
    """The pure-torch model with four blocks and six visual tokens on both tasks."""
    return captured_tiny(4)


def drop(task: str, start: int, end: int | None, keep: float, selector: str = "uniform", **more: object) -> DropSite:
    return DropSite(task, start, end, keep, selector, **more)  # type: ignore[arg-type]


SITES: dict[str, tuple[dict[str, object], list[DropSite]]] = {
    "fastv": ({}, [drop(U, 2, None, 0.5, "attention", restore=False)]),
    "fastv, k and drop": ({"k": 1, "drop": 0.75}, [drop(U, 1, None, 0.25, "attention", restore=False)]),
    "pyramiddrop": (
        {},
        [drop(U, b, None, keep, "attention", restore=False) for b, keep in ((1, 0.5), (2, 0.25), (3, 0.125))],
    ),
    "pyramiddrop, two stages": ({"stages": 2, "keep": 0.3}, [drop(U, 2, None, 0.3, "attention", restore=False)]),
    "random-ltd": (
        {"seed": 5},
        [drop(task, b, b + 1, 0.5, "random", seed=5 + b) for task in (U, G) for b in (1, 2)],
    ),
    "dart": ({"k": 0}, [drop(U, 0, None, 0.5, "similarity", restore=False)]),
    "task-specific": ({}, [drop(U, 2, None, 0.0, restore=False)]),
    "task-specific, later": ({"start": 0.8, "keep": 0.25}, [drop(U, 3, None, 0.25, restore=False)]),
    "himix": ({}, [drop(U, 0, None, 0.0, mode="freeze", projections="own")]),
    "himix, over the model's projections": ({"projections": "shared"}, [drop(U, 0, None, 0.0, mode="freeze")]),
    "hmgen": (
        {},
        [drop(G, 1, 2, 0.0), drop(G, 0, 1, 1.0, projections="own"), drop(G, 2, 4, 1.0, projections="own")],
    ),
    "hmgen, over the model's projections": ({"projections": "shared"}, [drop(G, 1, 2, 0.0)]),
    "himix-hmgen-share-all": ({"skipped": 1}, [drop(U, 0, None, 0.0, mode="freeze"), drop(G, 1, 2, 0.0)]),
    "himix-hmgen-share-partial": (
        {"skipped": 1},
        [
            drop(U, 0, None, 0.0, mode="freeze", projections="own"),
            drop(G, 1, 2, 0.0),
            drop(G, 0, 1, 1.0, projections="own"),
            drop(G, 2, 4, 1.0, projections="own"),
        ],
    ),
}


@pytest.mark.parametrize("case", SITES)
def test_sites(case: str) -> None:
    options, sites = SITES[case]
    plan = policy(case.partition(",")[0], **options).plan(FOUR)
    assert list(plan.sites) == sites
    assert plan.policy == case.partition(",")[0]
    assert {name: plan.options[name] for name in options} == options


def test_skipped_blocks_lie_in_the_middle_and_alternate_with_full_ones() -> None:
    """HMGen on other depths."""

    def skipped(depth: int, count: int | None) -> list[int]:
        return [site.start for site in policy("hmgen", skipped=count, projections="shared").plan(facts(depth)).sites]

    assert skipped(3, None) == [1]
    assert skipped(24, None) == [4, 6, 8, 10, 12, 14, 16, 18]
    assert skipped(9, 4) == [1, 3, 5, 7]
    assert skipped(8, 3) == [1, 3, 5]
    for depth in range(3, 40):
        for count in range(1, (depth - 1) // 2 + 1):
            blocks = skipped(depth, count)
            assert len(blocks) == count
            assert blocks[0] >= 1
            assert blocks[-1] <= depth - 2


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "fastv before block 1": ("fastv", {"k": 0}, r"option k=0 is out of range.*4 blocks.*give 1 <= k <= 3"),
    "fastv after the last block": ("fastv", {"k": 4}, r"k=4 is out of range"),
    "fastv drops more than all": ("fastv", {"drop": 1.5}, r"option drop=1.5: .*give 0 <= drop <= 1"),
    "fastv drops no number": ("fastv", {"drop": float("nan")}, r"option drop=nan: .*give 0 <= drop <= 1"),
    "a word for a number": ("fastv", {"k": "two"}, r"option k='two': Input should be a valid integer"),
    "a list for a number": ("random-ltd", {"keep": [0.5]}, r"option keep=\[0.5\]: Input should be a valid number"),
    "one stage": ("pyramiddrop", {"stages": 1}, r"stages=1 is out of range.*give 2 <= stages <= 4"),
    "more stages than blocks": ("pyramiddrop", {"stages": 5}, r"stages=5 is out of range.*give 2 <= stages <= 4"),
    "pyramiddrop keeps more than all": ("pyramiddrop", {"keep": 2}, r"keep=2: .*give 0 <= keep <= 1"),
    "random-ltd keeps less than none": ("random-ltd", {"keep": -0.1}, r"keep=-0.1: .*give 0 <= keep <= 1"),
    "dart after the last block": ("dart", {"k": 7}, r"k=7 is out of range"),
    "dart before the first": ("dart", {"k": -1}, r"k=-1 is out of range"),
    "dart drops less than none": ("dart", {"drop": -1}, r"drop=-1: .*give 0 <= drop <= 1"),
    "task-specific starts at the end": ("task-specific", {"start": 1.0}, r"start=1.0: .*give 0 <= start < 1"),
    "task-specific starts after the end": ("task-specific", {"start": 1.1}, r"start=1.1: .*give 0 <= start < 1"),
    "hmgen skips nothing": ("hmgen", {"skipped": 0}, r"skipped=0 is out of range.*give 1 <= skipped <= 1"),
    "hmgen skips neighbours": ("hmgen", {"skipped": 2}, r"skipped=2 is out of range.*give 1 <= skipped <= 1"),
    "share all skips neighbours": (
        "himix-hmgen-share-all",
        {"skipped": 2},
        r"skipped=2 is out of range.*give 1 <= skipped <= 1",
    ),
    "no such option": ("himix", {"k": 2}, r"'himix' has no option 'k'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_out_of_range_are_refused(case: str) -> None:
    name, options, message = REFUSED[case]
    with pytest.raises(tg.PlanError, match=f"(?s){message}"):
        policy(name, **options).plan(FOUR)


@pytest.mark.parametrize("name", ["random-ltd", "hmgen", "shared"])
def test_two_blocks_have_no_middle(name: str) -> None:
    with pytest.raises(tg.PlanError, match="2 blocks, and none between the first and the last"):
        policy(name).plan(facts(2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_without_the_task_is_refused(name: str) -> None:
    needs = {U} if name in UNDERSTANDING else {G} if name == "hmgen" else {U, G}
    for task in (U, G):
        alone = tg.Facts({task: FOUR[task]})
        if name == "random-ltd":
            assert {site.task for site in policy(name).plan(alone).sites} == {task}
        elif needs <= {task}:
            assert policy(name).plan(alone).sites
        else:
            with pytest.raises(tg.PlanError, match="this policy thins"):
                policy(name).plan(alone)


@pytest.mark.parametrize("name", PUBLISHED)
def test_exact_changes_no_site(name: str) -> None:
    lean, plain = (policy(name, exact=exact).plan(FOUR) for exact in (True, False))
    assert (lean.exact, plain.exact) == (True, False)
    assert lean.sites == plain.sites
    assert lean.sites


def verify(model: Captured, plan: tg.Plan) -> tg.Accelerated:
    accelerated = model.apply(check_plan(plan, model.facts))
    result = tg.verify(model.program, accelerated)
    result.raise_if_failed()
    assert set(result.tasks) == {U, G}
    return accelerated


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(set(policies()) - {"none", "exact"}))
def test_the_oracle_agrees(four: Captured, name: str, exact: bool) -> None:
    verify(four, policy(name, exact=exact).plan(four.facts))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(policies()))
def test_the_oracle_agrees_on_digits(digits_example: Captured, name: str) -> None:
    verify(digits_example, policy(name).plan(digits_example.facts))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(policies()))
def test_the_oracle_agrees_on_janus(captured_janus, name: str) -> None:
    verify(captured_janus(), policy(name).plan(captured_janus().facts))


# Elements of a block of tests/tiny.py, 16 wide: what makes keys and values, and the rest.
NORM1 = 2 * 16
KEYS = NORM1 + (16 * 48 + 48)  # norm1, qkv
REST = (16 * 16 + 16) + 2 * 16 + (16 * 32 + 32) + (32 * 16 + 16)  # attention's out, norm2, mlp
NORM = 2 * 16  # the last norm; it and four blocks are what visual tokens of both tasks pass
ALL = 4 * (KEYS + REST) + NORM
INDEX = {
    "none": 1.0,
    "exact": 1.0,
    "shared": 1.0,
    "random-ltd": 1.0,
    # Understanding's last block computes keys of all six visual tokens, the rest for the one that predicts the first
    # word: that one is never dropped, so there only the keys part the tasks. The block before a span makes keys of all
    # rows, but the rest only of the rows that go on ...
    "fastv": ((KEYS + REST) + (KEYS + REST * 3 / 6) + (KEYS + REST) * 3 / 6 + KEYS * 3 / 6 + REST + NORM) / ALL,
    # ... unless the selector looks at the rows themselves.
    "dart": ((KEYS + REST) * (1 + 1 + 3 / 6) + KEYS * 3 / 6 + REST + NORM) / ALL,
    # 3, then floor(1.5 + 0.5) = 2, then floor(0.75 + 0.5) = 1 of 6
    "pyramiddrop": (KEYS * (6 + 3 + 2 + 1) / 6 + REST * (3 + 2 + 1) / 6 + REST + NORM) / ALL,
    "task-specific": (KEYS * (6 + 6 + 1 + 1) / 6 + REST * (6 + 1 + 1) / 6 + REST + NORM) / ALL,
    # image rows are keys everywhere and nothing else anywhere, by projections of their own: only norms stay shared
    "himix": (4 * NORM1 + NORM) / ALL,
    # block 1 sees no image row of generation, elsewhere they have their own projections
    "hmgen": (3 * (NORM1 + REST) + NORM) / ALL,
    # in block 1 understanding has the keys only, generation nothing: the rest, unused by both, counts as alike
    "himix-hmgen-share-all": (3 * KEYS + REST + NORM) / ALL,
    # the same, and the projections of the other blocks are not shared
    "himix-hmgen-share-partial": (3 * NORM1 + REST + NORM) / ALL,
}


QUICK = ("shared", "fastv", "himix-hmgen-share-partial", "task-specific")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in INDEX])
def test_sharing_index_by_hand(four: Captured, name: str) -> None:
    accelerated = four.apply(tg.make_plan(four.program, name, facts=four.facts))
    report = make_report(accelerated)
    if INDEX[name] == 1.0:
        assert report["sharing_index"] == 1.0
    else:
        assert report["sharing_index"] == pytest.approx(INDEX[name], abs=1e-9)
        assert report["sharing_index"] < 0.9
    copies = {"himix": 4, "hmgen": 3, "himix-hmgen-share-partial": 7}.get(name, 0)
    assert report["new_parameters"] == copies * (KEYS - NORM1)
    assert (report["coverage"] == 1.0) == (name in ("none", "exact"))


def test_every_policy_has_a_sharing_index_by_hand() -> None:
    assert set(INDEX) == set(policies())

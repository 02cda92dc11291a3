"""Plans as files: the same bytes for the same plan, and a clear error for anything else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokgraph as tg
from tokgraph.errors import PlanError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def sites(draw: st.DrawFn) -> tg.DropSite:
    start = draw(st.integers(0, 100))
    return tg.DropSite(
        task=draw(st.text(max_size=8)),
        start=start,
        end=draw(st.none() | st.integers(start + 1, start + 200)),
        keep=draw(st.floats(0.0, 1.0)),
        selector=draw(st.text(max_size=8)),
        mode=draw(st.sampled_from(["hide", "freeze"])),
        restore=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


plans = st.builds(
    tg.Plan,
    sites=st.lists(sites(), max_size=4).map(tuple),
    exact=st.booleans(),
    policy=st.text(max_size=8),
    options=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(plans)
def test_a_plan_survives_its_file(plan: tg.Plan) -> None:
    text = plan.to_json()
    again = tg.Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text


@settings(max_examples=30, deadline=None)
@given(plans)
def test_the_file_is_plain_json_with_a_schema(plan: tg.Plan) -> None:
    data = json.loads(plan.to_json())
    assert data["kind"] == "tokgraph.plan"
    assert data["schema"] == 1
    assert list(data) == sorted(data)
    assert len(data["sites"]) == len(plan.sites)


def test_save_and_load(tmp_path: Path) -> None:
    plan = tg.Plan((tg.DropSite("understanding", 1, 3, 0.25, "random", seed=7),), exact=True, policy="shared")
    path = tmp_path / "deep" / "plan.json"
    plan.save(path)
    first = path.read_bytes()
    assert tg.Plan.load(path) == plan
    tg.Plan.load(str(path)).save(path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "keep",
    [
        1,
        True,
        -0.0,
        1.0,
        0.0,
    ],
)
def test_equal_plans_have_equal_files(keep: float) -> None:
    plan = tg.Plan((tg.DropSite("t", 0, keep=keep),))
    same = tg.Plan((tg.DropSite("t", 0, keep=float(abs(keep))),))
    assert plan == same
    assert plan.to_json() == same.to_json()
    assert tg.Plan.from_json(plan.to_json()).to_json() == plan.to_json()


GOOD = json.loads(tg.Plan((tg.DropSite("understanding", 1, 2, 0.5),)).to_json())


def with_site(**fields: object) -> dict[str, object]:
    return {**GOOD, "sites": [{**GOOD["sites"][0], **fields}]}


def without(field: str, *, site: bool = False) -> dict[str, object]:
    fields = GOOD["sites"][0] if site else GOOD
    left = {key: value for key, value in fields.items() if key != field}
    return {**GOOD, "sites": [left]} if site else left


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD | {"kind": "tokgraph.report"}, "is not a tokgraph plan"),
        (without("kind"), "is not a tokgraph plan"),
        ([GOOD], "is not a tokgraph plan"),
        ("plan", "is not a tokgraph plan"),
        (None, "is not a tokgraph plan"),
        ({}, "is not a tokgraph plan"),
        (GOOD | {"schema": 2}, "plan schema 2; this version reads schema 1"),
        (GOOD | {"schema": "1"}, "plan schema '1'"),
        (without("schema"), "plan schema None"),
        (GOOD | {"extra": 1}, "extra: "),
        (with_site(color="red"), r"sites.0.color: "),
        (without("task", site=True), r"sites.0.task: Field required"),
        (without("start", site=True), r"sites.0.start: Field required"),
        (GOOD | {"sites": {"a": 1}}, "sites: "),
        (GOOD | {"sites": None}, "sites: "),
        (GOOD | {"exact": "maybe"}, "exact: "),
        (GOOD | {"policy": 3}, "policy: "),
        (GOOD | {"options": []}, "options: "),
        (with_site(start="one"), r"sites.0.start: "),
        (with_site(start=0.5), r"sites.0.start: "),
        (with_site(start=None), r"sites.0.start: "),
        (with_site(keep="half"), r"sites.0.keep: "),
        (with_site(keep=None), r"sites.0.keep: "),
        (with_site(mode="drop"), r"sites.0.mode: "),
        (with_site(restore="perhaps"), r"sites.0.restore: "),
        (with_site(task=3), r"sites.0.task: "),
        (with_site(keep=1.5), r"keep=1.5 is outside \[0, 1\]"),
        (with_site(keep=-0.1), r"keep=-0.1 is outside \[0, 1\]"),
        (with_site(keep=math.nan), r"keep=nan is outside \[0, 1\]"),
        (with_site(keep=math.inf), r"keep=inf is outside \[0, 1\]"),
        (with_site(start=-1), r"span \[-1, 2\) is empty or negative"),
        (with_site(start=2, end=2), r"span \[2, 2\) is empty or negative"),
    ],
)
def test_files_that_are_no_plans(data: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        tg.Plan.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", '{"kind": "tokgraph.plan"', "\x00\x01", "not json", '{"schema": 1,}', "\ufeff{}"]
)
def test_corrupt_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=r"plan.json is not JSON"):
        tg.Plan.load(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read plan file"):
        tg.Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot read plan file"):
        tg.Plan.load(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"kind": "\xe9"}')
    with pytest.raises(PlanError, match="cannot read plan file"):
        tg.Plan.load(tmp_path / "latin.json")


def test_where_a_text_came_from_is_said() -> None:
    with pytest.raises(PlanError, match="the upload is not JSON"):
        tg.Plan.from_json("{", origin="the upload")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    tg.Plan(policy="first").save(path)
    before = path.read_bytes()

    def fails(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(tg.FileError, match="disk full"):
        tg.Plan(policy="second").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    tg.Plan(policy="first").save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        tg.Plan(options={"x": object()}).save(path)
    assert path.read_bytes() == before


# ------------------------------------------------------------------ sites


@pytest.mark.parametrize("keep", [-0.01, 1.01, math.nan, math.inf, "0.5", None])
def test_ratios_outside_the_unit_interval(keep: float) -> None:
    with pytest.raises(PlanError, match=r"is outside \[0, 1\]"):
        tg.DropSite("t", 0, 1, keep)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 2), (3, 1), (0, 0)])
def test_empty_spans(start: int, end: int) -> None:
    with pytest.raises(PlanError, match="is empty or negative"):
        tg.DropSite("t", start, end)


def test_unknown_modes() -> None:
    with pytest.raises(PlanError, match="mode='drop' is not one of 'hide', 'freeze'"):
        tg.DropSite("t", 0, 1, mode="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "kept"), [(0.0, 0), (0.1, 1), (0.08, 0), (0.25, 2), (0.5, 3), (0.42, 3), (0.75, 5), (1.0, 6)]
)
def test_how_many_stay(keep: float, kept: int) -> None:
    """``floor(keep * 6 + 0.5)``: halves are rounded up."""
    assert tg.DropSite("t", 0, 1, keep).kept(6) == kept


@given(st.floats(0, 1), st.integers(0, 2000))
def test_how_many_stay_is_between_none_and_all(keep: float, visual: int) -> None:
    kept = tg.DropSite("t", 0, 1, keep).kept(visual)
    assert 0 <= kept <= visual
    assert abs(kept - keep * visual) <= 0.5 + 1e-9


def test_open_ends_are_filled_in() -> None:
    site = tg.DropSite("t", 1)
    assert site.resolved(4) == replace(site, end=4)
    assert tg.DropSite("t", 1, 3).resolved(3) == tg.DropSite("t", 1, 3)
    for bad in (tg.DropSite("t", 1, 5), tg.DropSite("t", 4), tg.DropSite("t", 4, 5)):
        with pytest.raises(PlanError, match="is out of range: the task has 4 blocks"):
            bad.resolved(4)


def test_sites_of_a_task_come_outer_spans_first() -> None:
    a, b, c, d = (tg.DropSite("t", 1, 2), tg.DropSite("t", 0, None), tg.DropSite("t", 0, 3), tg.DropSite("t", 1, 3))
    other = tg.DropSite("u", 0, 9)
    assert tg.Plan((a, other, c, b, d)).for_task("t") == (b, c, d, a)
    assert tg.Plan((a, other)).for_task("missing") == ()

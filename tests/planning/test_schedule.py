"""Phases of a training run: how they are written, and the plan in force at each step."""

from __future__ import annotations

from typing import Any

import pytest

import tokgraph as tg
from tokgraph.planning import Phase


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("shared", 5, "shared 0-5"),
        ("none:10%,shared:80%,none:10%", 300, "none 0-30, shared 30-270, none 270-300"),
        ("none:10%,shared,none:10%", 12, "none 0-1, shared 1-11, none 11-12"),
        (" none : 2 , shared , none:3", 12, "none 0-2, shared 2-9, none 9-12"),
        ("none:25%,shared:7,exact:25%,none", 20, "none 0-5, shared 5-12, exact 12-17, none 17-20"),
        ("a:33.3%,b:33.3%,c:33.4%", 10, "a 0-3, b 3-7, c 7-10"),
        ("a:12.5%,a/0.5:87.5%", 4, None),  # 0.5 steps are none
    ],
)
def test_phases_are_read(text: str, steps: int, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(tg.PlanError, match="none of the 4 steps"):
            tg.Schedule.parse(text, steps)
        return
    found = tg.Schedule.parse(text, steps)
    assert ", ".join(f"{p.plan} {p.start}-{p.stop}" for p in found.phases) == expected
    assert [found.at(step) for step in range(steps)] == [p.plan for p in found.phases for _ in range(p.start, p.stop)]
    assert found.at(steps + 7) == found.phases[-1].plan
    assert list(found.plans) == sorted({p.plan for p in found.phases}, key=[p.plan for p in found.phases].index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no phase"),
        ("none:,shared", "is no phase"),
        ("none:ten,shared", "is no phase"),
        ("none:-1,shared", "is no phase"),
        ("none:1.5,shared", "is no phase"),
        ("none:10%:2,shared", "is no phase"),
        ("none,shared", "have no share"),
        ("none:10%,shared:80%", "have 90 steps, the run has 100"),
        ("none:60%,shared:80%", "have 140 steps, the run has 100"),
        ("none:0,shared", "'none' of .* has none of the 100 steps"),
        ("none:100,shared", "'shared' of .* has none of the 100 steps"),
        ("none:120,shared", "'shared' of .* has none of the 100 steps"),
    ],
)
def test_what_is_no_schedule(text: str, message: str) -> None:
    with pytest.raises(tg.PlanError, match=message):
        tg.Schedule.parse(text, 100)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "10"])
def test_what_is_no_number_of_steps(steps: Any) -> None:
    with pytest.raises(tg.PlanError, match="a whole number of steps"):
        tg.Schedule.parse("none", steps)


def test_phases_by_hand() -> None:
    assert tg.Schedule((Phase("a", 0, 2), Phase("b", 2, 3))).at(2) == "b"
    for wrong in ((), (Phase("a", 1, 2),), (Phase("a", 0, 2), Phase("b", 3, 4)), (Phase("a", 0, 0),)):
        with pytest.raises(tg.PlanError):
            tg.Schedule(wrong)

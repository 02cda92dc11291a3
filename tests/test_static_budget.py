"""What policies move in memory beside a loop by hand: the table of the documentation holds at any depth."""

from __future__ import annotations

import pytest

from tests.passes.cost.test_moves import ROOT, module


@pytest.mark.slow
def test_no_policy_moves_more_than_a_loop_by_hand() -> None:
    with module(ROOT / "benchmarks" / "static_budget.py") as script:
        rows = script.budget(script.captured("1b", 24))
    assert {row.policy for row in rows} == set(script.POLICIES)
    for row in rows:
        assert row.moved <= 1.1 * row.loop_moved, row
        assert row.moved >= 0.9 * row.loop_moved, row  # the loop is no straw man
        assert row.masked == row.loop_masked, row
        assert (row.operators == 0) == (row.policy == "none"), row

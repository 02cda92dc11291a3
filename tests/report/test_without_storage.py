"""Models on the meta device: what is chosen by values cannot be looked at, and is counted as the rewrite noted it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokgraph as tg
from tokgraph.report.report import make_report

JANUS = Path(__file__).resolve().parents[2] / "examples" / "janus.py"
POLICIES = ("fastv", "hmgen")


@pytest.mark.slow
def test_reports_are_those_of_a_model_with_values() -> None:
    with_values, without = (
        tg.analyze(tg.capture(tg.load(str(JANUS), device=device, layers=3, padded=False))) for device in ("cpu", "meta")
    )
    for policy in POLICIES:
        plan = tg.make_plan(without, policy)
        found, expected = (make_report(tg.apply(facts, plan)) for facts in (without, with_values))
        for what in ("coverage", "sharing_index", "flops_ratio"):
            assert found[what] == pytest.approx(expected[what], rel=1e-12), (policy, what)

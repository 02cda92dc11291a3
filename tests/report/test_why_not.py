"""What keeps selections from moving further, for whole models: complete, true, the nearest miss first."""

from __future__ import annotations

import json
from typing import Any

import pytest
from expecttest import assert_expected_inline

import tokgraph as tg
from tests import tiny
from tests.passes.tools import captured, site
from tokgraph.errors import PlanError
from tokgraph.report.why_not import why_not


def listing(groups: list[dict[str, Any]]) -> str:
    """A line a group and a line a place; sources without their folders."""
    lines = []
    for group in groups:
        end = " (end)" if group["end"] else ""
        lines.append(f"{group['count']} x {group['operator']}: {group['reason']}{end}")
        for place in group["at"]:
            source = place["source"].rpartition("/")[2].partition(":")[0] if place["source"] else None
            blockers = ", ".join(place["blockers"])
            lines.append(f"  {place['value']} = {place['operator']} < {blockers} @ {place['module']} {source}")
    return "\n".join(lines) + "\n"


def test_exact_stops_where_tokens_are_mixed() -> None:
    """In the last block: the running sum needs every row before it, whoever reads its result."""
    found = captured("understanding", layers=2, token_mixer="cumsum")
    assert_expected_inline(
        listing(why_not(found.facts_of)["understanding"]),
        """\
1 x aten.cumsum.default: cumsum needs all its rows
  add_2 = aten.add.Tensor < cumsum @ layers.1 tiny.py
1 x aten.cumsum.default: aten.cumsum.default mixes rows
  cumsum = aten.cumsum.default < cumsum @ layers.1 tiny.py
""",
    )


def test_exact_stops_at_attention() -> None:
    """Which needs all keys and values; queries are of demanded rows alone."""
    found = captured("understanding", layers=2)
    assert_expected_inline(
        listing(why_not(found.facts_of)["understanding"]),
        """\
1 x aten.tril.default: aten.tril.default has no token-axis rule
  tril_default = aten.tril.default < tril_default @ layers.1.attention tiny.py
2 x aten.scaled_dot_product_attention.default: scaled_dot_product_attention needs all its rows
  add_1 = aten.add.Tensor < scaled_dot_product_attention_1 @ layers.1.attention tiny.py
  linear_5 = aten.linear.default < scaled_dot_product_attention_1 @ layers.1.attention tiny.py
""",
    )


def test_a_plan_stops_at_the_attention_of_its_span() -> None:
    """Frozen rows stay keys there; the block after the span needs them through the restore."""
    found = captured("understanding", layers=3)
    plan = tg.Plan(found.sites(site(1, 2, mode="freeze")), exact=False)
    assert_expected_inline(
        listing(why_not(found.facts_of, plan)["understanding"]),
        """\
1 x aten.tril.default: aten.tril.default has no token-axis rule
  tril_default = aten.tril.default < tril_default @ layers.1.attention tiny.py
2 x aten.scaled_dot_product_attention.default: scaled_dot_product_attention needs all its rows
  add_1 = aten.add.Tensor < scaled_dot_product_attention_1, scaled_dot_product_attention_2 @ layers.1.attention tiny.py
  linear_5 = aten.linear.default < scaled_dot_product_attention_1 @ layers.1.attention tiny.py
""",
    )


def test_nothing_is_selected_where_every_row_is_demanded() -> None:
    found = captured("understanding", outputs="full")
    assert why_not(found.facts_of) == {"understanding": []}
    assert why_not(found.facts_of, tg.Plan()) == {"understanding": []}


def test_every_task_as_plain_data() -> None:
    facts = tg.analyze(tg.capture(tiny.build(layers=2, dynamic=False)))
    found = why_not(facts)
    assert list(found) == ["understanding", "generation"]
    assert json.loads(json.dumps(found)) == found
    for groups in found.values():
        assert groups
        assert all(group["count"] == len(group["at"]) for group in groups)
        ways = [(group["end"], min(len(place["blockers"]) for place in group["at"])) for group in groups]
        assert ways == sorted(ways)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="out of range"):
        why_not(captured().facts_of, tg.Plan((tg.DropSite("understanding", 0, 9),)))

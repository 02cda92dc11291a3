"""Rows that all samples share: an index of one row, and values without a batch axis keep none."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.passes.tools import Run, assert_well_formed, calls, captured, changes, site
from tokgraph.ir.node import dims
from tokgraph.passes.pipeline import Pipeline
from tokgraph.passes.simplify import UniformRows

tokgraph = torch.ops.tokgraph
SELECTIONS = (tokgraph.select.default, tokgraph.drop.default, tokgraph.select_range.default)
RESTORES = (tokgraph.restore.default, tokgraph.restore_range.default)


def indices(graph: object) -> list[bool]:
    found = [n.args[1] for target in SELECTIONS for n in calls(graph, target)]
    found += [n.args[2] for target in RESTORES for n in calls(graph, target)]
    return [dims(index)[0] == 1 for index in found]


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_generation_keeps_the_same_rows_of_all_samples(keep: float, dynamic: bool) -> None:
    found = captured("generation", layers=3, dynamic=dynamic)
    graph = found.rewritten(site(1, 2, keep), exact=True)
    assert indices(graph)
    assert all(indices(graph))
    assert_well_formed(graph, found.graph)
    Run.of(graph).assert_equals(Run.of(found.seeded(site(1, 2, keep), exact=True)))


@pytest.mark.parametrize("selector", ["random", "uniform"])
def test_samples_that_keep_rows_of_their_own(selector: str) -> None:
    """Where images stand is data in understanding, and random numbers are drawn for each sample."""
    task = "generation" if selector == "random" else "understanding"
    graph = captured(task, layers=3).rewritten(site(1, 2, selector=selector))
    assert indices(graph)
    assert not any(indices(graph))


def test_a_sites_index() -> None:
    found = captured("generation", layers=3)
    before = found.seeded(site(1, 2))
    after = Pipeline([UniformRows()]).run_task(before)
    assert_expected_inline(
        changes(before, after),
        """\
+%arange_start = arange.start(0, 11, device=cpu)  # int64[11] by uniform-rows
+%unsqueeze.3 = unsqueeze(%arange_start, 0)  # int64[1, 11] by uniform-rows
+%lt_scalar = lt.Scalar(%unsqueeze.3, 11)  # bool[1, 11] by uniform-rows
+%ge_scalar = ge.Scalar(%unsqueeze.3, 5)  # bool[1, 11] by uniform-rows
+%logical_and = logical_and(%ge_scalar, %lt_scalar)  # bool[1, 11] by uniform-rows
+%rows.2 = rows(%logical_and, 6, True)  # int64[1, 6] by uniform-rows
+%uniform_score.2 = uniform_score(%rows.2, 3)  # float32[1, 6] by uniform-rows
+%keep_rows.2 = keep_rows(%rows.2, %uniform_score.2, 3, 11)  # int64[1, 8] by uniform-rows
-%range_mask = range_mask(%cat, 5, 11)  # bool[2, 11] by seed-sites
-%rows = rows(%range_mask, 6, True)  # int64[2, 6] by seed-sites
-%uniform_score = uniform_score(%rows, 3)  # float32[2, 6] by seed-sites
-%keep_rows = keep_rows(%rows, %uniform_score, 3, 11)  # int64[2, 8] by seed-sites
-%select = select(%expand, %keep_rows, 3, 0)  # bool[2, 1, 11, 8] layers.1.attention by seed-sites
+%select = select(%expand, %keep_rows.2, 3, 0)  # bool[2, 1, 11, 8] layers.1.attention by seed-sites
-%select.2 = select(%transpose.6, %keep_rows, 2, 0)  # float64[2, 2, 8, 8] layers.1.attention by seed-sites
+%select.2 = select(%transpose.6, %keep_rows.2, 2, 0)  # float64[2, 2, 8, 8] layers.1.attention by seed-sites
-%select.3 = select(%transpose.7, %keep_rows, 2, 0)  # float64[2, 2, 8, 8] layers.1.attention by seed-sites
+%select.3 = select(%transpose.7, %keep_rows.2, 2, 0)  # float64[2, 2, 8, 8] layers.1.attention by seed-sites
-%drop = drop(%add.4, %keep_rows)  # float64[2, 8, 16] layers.1 by seed-sites
-%restore = restore(%add.2, %drop, %keep_rows)  # float64[2, 11, 16] layers.1 by seed-sites
+%drop = drop(%add.4, %keep_rows.2)  # float64[2, 8, 16] layers.1 by seed-sites
+%restore = restore(%add.2, %drop, %keep_rows.2)  # float64[2, 11, 16] layers.1 by seed-sites
""",
    )


def test_targets_at_rows_of_all_samples() -> None:
    found = captured("generation", layers=3, dynamic=True)
    graph = found.rewritten(exact=True)
    for node in calls(graph, tokgraph.select_targets.default):
        assert dims(node)[0] == dims(node.args[0])[0]

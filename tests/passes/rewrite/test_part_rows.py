"""Rows that are read apart are computed apart where that spares a restore; and are joined, not merged, where they are keys."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from tests.passes.programs import Program, rows
from tests.passes.tools import TASKS, Run, assert_well_formed, calls, captured, site
from tokgraph.passes.rewrite.part_rows import PartRows
from tokgraph.passes.simplify import JoinRows

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


class Case:
    """Text and image rows of ``x`` ``[2, 4, 3]``, and new text rows."""

    def __init__(self) -> None:
        self.p = Program()
        self.x = self.p.input("x", torch.rand(2, 4, 3, dtype=torch.float64))
        self.new = self.p.input("new", torch.rand(2, 2, 3, dtype=torch.float64))
        self.mask = self.p.input("mask", torch.tensor([[True, False, True, False], [False, True, True, False]]))
        self.image = self.p(tokgraph.rows.default, self.mask, 2, True)
        others = self.p(aten.logical_not.default, self.mask)
        self.text = self.p(tokgraph.rows.default, others, 2, True)

    def select(self, x: fx.Node, index: fx.Node) -> fx.Node:
        return self.p(tokgraph.select.default, x, index, 1, 0)

    def restored(self) -> fx.Node:
        return self.p(tokgraph.restore.default, self.x, self.new, self.text)

    def norm(self, x: fx.Node) -> fx.Node:
        return self.p(aten.layer_norm.default, x, [3])

    def after(self, graph_pass: PartRows | JoinRows, *outputs: fx.Node) -> str:
        module = self.p.module(*outputs)
        before = module(*self.p.inputs)
        after = graph_pass(module).graph_module
        for old, new in zip(before, after(*self.p.inputs), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-15, atol=1e-15)
        assert not graph_pass(after).modified
        return "\n".join(
            f"{n.name}: {n.target.name().split('::')[1]}{n.args}" for n in after.graph.nodes if "call" in n.op
        )


def test_the_restore_between_two_frozen_blocks() -> None:
    c = Case()
    normed = c.norm(c.restored())
    assert_expected_inline(
        c.after(PartRows(), c.select(normed, c.text), c.select(normed, c.image)),
        """\
rows_default: rows(mask, 2, True)
select_default_2: select(x, rows_default, 1, 0)
layer_norm_default: layer_norm(select_default_2, [3])
layer_norm_default_1: layer_norm(new, [3])""",
    )


@pytest.mark.parametrize("why", ["read whole", "one part only", "parts that overlap", "the restore is read whole"])
def test_what_is_not_worth_parting(why: str) -> None:
    c = Case()
    restored = c.restored()
    normed = c.norm(restored)
    other = {"one part only": c.text, "parts that overlap": c.p.input("some", rows([0, 1], [0, 1]))}.get(why, c.image)
    outputs = [c.select(normed, c.text), c.select(normed, other)]
    outputs += {"read whole": [normed], "the restore is read whole": [restored]}.get(why, [])
    assert not PartRows()(c.p.module(*outputs)).modified


def test_merged_keys_in_another_order() -> None:
    c = Case()
    merged = c.p(tokgraph.merge.default, c.new, c.new, c.image)
    order = c.p(aten.cat.default, [c.text, c.image], 1)
    assert_expected_inline(
        c.after(JoinRows(), c.select(merged, order)),
        """\
rows_default: rows(mask, 2, True)
logical_not_default: logical_not(mask,)
rows_default_1: rows(logical_not_default, 2, True)
cat_default: cat([rows_default_1, rows_default], 1)
join_default: join(new, new, cat_default)""",
    )


@pytest.mark.parametrize("why", ["images first", "all in order", "rows of others"])
def test_what_is_not_joined(why: str) -> None:
    c = Case()
    merged = c.p(tokgraph.merge.default, c.new, c.new, c.image)
    given = c.p.input("given", rows([0, 1], [0, 1]))
    parts = {"images first": [c.image, c.text], "all in order": [c.image], "rows of others": [given, c.image]}[why]
    assert " merge" in f" {c.after(JoinRows(), c.select(merged, c.p(aten.cat.default, parts, 1)))}"


@pytest.mark.parametrize("task", TASKS)
def test_a_frozen_span_moves_the_stream_once(task: str) -> None:
    found = captured(task, layers=4)
    frozen = site(0, 4, 0.0, mode="freeze", projections="own")
    graph = found.rewritten(frozen)
    restores = [*calls(graph, tokgraph.restore.default), *calls(graph, tokgraph.restore_range.default)]
    assert len(restores) == 1
    merged = [*calls(graph, tokgraph.merge.default), *calls(graph, tokgraph.merge_range.default)]
    assert len(merged) == 4  # queries are made with keys and values here: the order of the keys is that of the rows
    assert not calls(graph, tokgraph.join.default)
    assert_well_formed(graph)
    Run.of(graph).assert_equals(Run.of(found.seeded(frozen)))

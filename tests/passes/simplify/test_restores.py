"""Restores of the same rows, one after the other, become one."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from tests.passes.programs import Program, rows
from tests.passes.tools import Run, assert_well_formed, calls, captured, site
from tokgraph.passes.simplify import MergeRestores

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


class Case:
    """Rows ``i`` and ``j`` of ``x``."""

    def __init__(self) -> None:
        self.p = Program()
        self.x = self.p.input("x", torch.rand(2, 4, 3, dtype=torch.float64))
        self.a, self.b = (self.p.input(name, torch.rand(2, 2, 3, dtype=torch.float64)) for name in "ab")
        self.i, self.j = self.p.input("i", rows([0, 2], [1, 3])), self.p.input("j", rows([0, 1], [1, 2]))

    def restore(self, x: torch.fx.Node, y: torch.fx.Node, index: torch.fx.Node) -> torch.fx.Node:
        return self.p(tokgraph.restore.default, x, y, index)

    def after(self, *outputs: torch.fx.Node) -> list[str]:
        """The calls that are left; values are as before."""
        module = self.p.module(*outputs)
        before = module(*self.p.inputs)
        after = MergeRestores()(module).graph_module
        for old, new in zip(before, after(*self.p.inputs), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0)
        return [f"{n.target.name().split('::')[1]}{n.args}" for n in after.graph.nodes if n.op == "call_function"]


def test_the_last_of_a_chain() -> None:
    c = Case()
    chain = c.restore(c.restore(c.restore(c.x, c.a, c.i), c.b, c.i), c.a, c.i)
    assert_expected_inline("\n".join(c.after(chain)), """restore(x, a, i)""")


def test_one_that_is_read_in_between_stays() -> None:
    c = Case()
    first = c.restore(c.x, c.a, c.i)
    assert_expected_inline(
        "\n".join(c.after(c.restore(first, c.b, c.i), first)),
        """\
restore(x, a, i)
restore(x, b, i)""",
    )


def test_other_rows_stay() -> None:
    c = Case()
    assert len(c.after(c.restore(c.restore(c.x, c.a, c.i), c.b, c.j))) == 2


def test_rows_put_back_unchanged() -> None:
    c = Case()
    assert c.after(c.p(aten.relu.default, c.restore(c.x, c.p.select(c.x, c.i), c.i))) == ["relu(x,)"]


def test_rows_of_another_value_are_a_change() -> None:
    c = Case()
    y = c.p(aten.relu.default, c.x)
    assert len(c.after(c.restore(c.x, c.p.select(y, c.i), c.i))) == 3


def test_a_span_writes_the_stream_once() -> None:
    found = captured(layers=4)
    graph = found.rewritten(site(1, 3))
    assert len(calls(graph, tokgraph.restore.default)) == 1
    assert_well_formed(graph, found.graph)
    Run.of(graph).assert_equals(Run.of(found.seeded(site(1, 3))))

"""Rows that stand side by side are slices: what moves them, and what stays a gather."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

import tokgraph as tg
from tests.passes.programs import Program, rows
from tests.passes.tools import Run, assert_well_formed, calls, captured, changes, site
from tokgraph.passes.pipeline import Pipeline
from tokgraph.passes.rewrite.realise import rewrite_passes
from tokgraph.passes.simplify import RangeRows, TakeRoutedRows

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
MOVED = {"select", "drop", "restore", "merge"}


class Case:
    """Rows of ``x`` ``[2, 4, 3]`` by an index."""

    def __init__(self) -> None:
        self.p = Program()
        self.x = self.p.input("x", torch.rand(2, 4, 3, dtype=torch.float64))
        self.two = self.p.input("two", torch.rand(2, 2, 3, dtype=torch.float64))
        self.chosen = self.p.input("chosen", rows([0, 1], [0, 1]))

    def positions(self, start: int, stop: int) -> fx.Node:
        return self.p(aten.unsqueeze.default, self.p(aten.arange.start, start, stop), 0)

    def mask(self, start: int, stop: int) -> fx.Node:
        return self.p(tokgraph.range_mask.default, self.x, start, stop)

    def rows(self, mask: fx.Node, exact: bool = True) -> fx.Node:
        return self.p(tokgraph.rows.default, mask, 2, exact)

    def others(self, mask: fx.Node) -> fx.Node:
        return self.p(aten.logical_not.default, mask)

    def without(self, index: fx.Node, keep: int = 0) -> fx.Node:
        score = self.p(tokgraph.uniform_score.default, index, keep)
        return self.p(tokgraph.keep_rows.default, index, score, keep, 4)

    def after(self, *outputs: fx.Node) -> list[str]:
        """What moves rows then; values are as before."""
        outputs = tuple(self.p(aten.mul.Tensor, x, 2.0) for x in outputs)
        module = self.p.module(*outputs)
        before = module(*self.p.inputs)
        after = RangeRows()(module).graph_module
        for old, new in zip(before, after(*self.p.inputs), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0)
        assert not RangeRows()(after).modified
        moving = [
            n for n in after.graph.nodes if getattr(n.target, "namespace", "") == "tokgraph" and n.args[0] is not n
        ]
        names = [f"{n.target.name().split('::')[1]} {n.args[-1]}" for n in moving]
        return sorted(name for name in names if name.split()[0].removesuffix("_range") in MOVED)


RANGES: dict[str, tuple[Callable[[Case], fx.Node], int]] = {
    "positions": (lambda c: c.positions(1, 3), 1),
    "a window": (lambda c: c.p(tokgraph.range_rows.default, c.x, 2, 4), 2),
    "an image": (lambda c: c.rows(c.mask(1, 3)), 1),
    "before an image": (lambda c: c.rows(c.others(c.mask(2, 4))), 0),
    "behind an image": (lambda c: c.rows(c.others(c.mask(0, 2))), 2),
    "all but an image": (lambda c: c.without(c.rows(c.mask(2, 4))), 0),
}
OTHERS: dict[str, Callable[[Case], fx.Node]] = {
    "given": lambda c: c.chosen,
    "around an image": lambda c: c.rows(c.others(c.mask(1, 3))),
    "as many as there may be": lambda c: c.rows(c.mask(1, 3), exact=False),
    "some of an image": lambda c: c.without(c.positions(1, 4), keep=1),
    "all but what is in the middle": lambda c: c.without(c.rows(c.mask(1, 3))),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_is_a_slice(name: str) -> None:
    make, start = RANGES[name]
    c = Case()
    index = make(c)
    taken, put = c.p(tokgraph.select.default, c.x, index, 1, 0), c.p(tokgraph.restore.default, c.x, c.two, index)
    outputs = [taken, put, c.p(tokgraph.drop.default, c.x, index)]
    kinds = ["restore", "select"]  # the selection of the stream is the same slice
    if name != "positions":  # a merge takes an index of every sample
        outputs.append(c.p(tokgraph.merge.default, c.two, c.two, index))
        kinds.insert(0, "merge")
    assert c.after(*outputs) == [f"{kind}_range {start}" for kind in kinds]


@pytest.mark.parametrize("name", OTHERS)
def test_other_rows_are_gathered(name: str) -> None:
    c = Case()
    assert c.after(c.p(tokgraph.select.default, c.x, OTHERS[name](c), 1, 0)) == ["select 0"]


def test_what_is_returned_shares_no_memory() -> None:
    c = Case()
    module = c.p.module(c.p(tokgraph.select.default, c.x, c.positions(1, 3), 1, 0))
    assert not RangeRows()(module).modified


def test_text_before_an_image() -> None:
    found = captured("generation", layers=3)
    *passes, taken = rewrite_passes(found.facts, found.sites(site(1, 2, 0.0)), exact=False)
    assert isinstance(passes[-1], RangeRows)
    assert isinstance(taken, TakeRoutedRows)  # of what has experts of modalities
    before = Pipeline(passes[:-1]).run_task(found.graph, found.facts)
    after = Pipeline(passes[-1:]).run_task(before, found.facts)
    assert_expected_inline(
        changes(before, after),
        """\
-%drop = drop(%add.2, %keep_rows)  # float64[2, 5, 16] layers.0 by push-down
-%layer_norm.3 = layer_norm(%drop, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[2, 5, 16] layers.1.norm1
+%select_range = select_range(%add.2, %keep_rows, 1, 0, 0)  # float64[2, 5, 16] layers.0 by range-rows
+%layer_norm.3 = layer_norm(%select_range, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[2, 5, 16] layers.1.norm1
-%add.3 = add.Tensor(%drop, %linear.6)  # float64[2, 5, 16] layers.1
+%add.3 = add.Tensor(%select_range, %linear.6)  # float64[2, 5, 16] layers.1
-%restore = restore(%add.2, %add.4, %keep_rows)  # float64[2, 11, 16] layers.1 by seed-sites
-%layer_norm.5 = layer_norm(%restore, [16], @layers.2.norm1.weight, @layers.2.norm1.bias, 1e-05, False)  # float64[2, 11, 16] layers.2.norm1
+%restore_range = restore_range(%add.2, %add.4, %keep_rows, 0)  # float64[2, 11, 16] layers.1 by range-rows
+%layer_norm.5 = layer_norm(%restore_range, [16], @layers.2.norm1.weight, @layers.2.norm1.bias, 1e-05, False)  # float64[2, 11, 16] layers.2.norm1
-%add.5 = add.Tensor(%restore, %linear.10)  # float64[2, 11, 16] layers.2
+%add.5 = add.Tensor(%restore_range, %linear.10)  # float64[2, 11, 16] layers.2
""",
    )
    assert_well_formed(after, before)
    Run.of(after).assert_equals(Run.of(found.seeded(site(1, 2, 0.0))))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "sites",
    [(site(0, 2, 0.0),), (site(1, 2, 1.0, projections="own"),), (site(0, 3, 0.0, mode="freeze", projections="own"),)],
    ids=["hide", "own", "freeze"],
)
def test_slices_compute_what_gathers_did(sites: tuple[tg.DropSite, ...], dynamic: bool) -> None:
    found = captured("generation", layers=3, dynamic=dynamic)
    graph = found.rewritten(*sites, exact=True)
    assert any(calls(graph, target) for target in (tokgraph.select_range.default, tokgraph.merge_range.default))
    assert_well_formed(graph)
    Run.of(graph).assert_equals(Run.of(found.seeded(*sites, exact=True)))

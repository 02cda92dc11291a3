"""No pass takes a size that is open for the one of the example batch, also where sizes of the example coincide."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tests.passes.programs import Program
from tokgraph.errors import InternalError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import dims, value
from tokgraph.ir.open_sizes import OpenSizes
from tokgraph.passes import GraphPass
from tokgraph.passes.capture.masked_rows import MaskedRows
from tokgraph.passes.emitter import refresh_after
from tokgraph.passes.rewrite.wants import Along, Declined, commute

aten = torch.ops.aten


class Open(Program):
    """A graph whose inputs have a symbol of its own for every size."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))

    def input(self, name: str, x: Tensor) -> fx.Node:
        node = super().input(name, x)
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * x.dim())
        node.meta["val"] = self.mode.from_tensor(x, source=ConstantSource(name), symbolic_context=context)
        return node


# ------------------------------------------------------------------ the invariant


@dataclass(frozen=True)
class Asking(GraphPass):
    """Asks whether there are as many tokens as samples, or how many of both, as passes must not."""

    name: ClassVar[str] = "asking-for-sizes"
    product: int = 0

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        samples, tokens = value(graph_module.graph.find_nodes(op="placeholder")[0]).shape
        bool(samples * tokens == self.product if self.product else samples == tokens)


@pytest.mark.parametrize(
    ("samples", "asking", "fixed"),
    [(8, Asking(), "s[0-9]+ = s[0-9]+"), (4, Asking(32), r"Eq\(s"), (4, Asking(), ""), (8, Asking(32), "")],
)
def test_a_pass_that_fixes_a_size_is_named(samples: int, asking: Asking, fixed: str) -> None:
    p = Open()
    module = p.module(p(aten.neg.default, p.input("x", torch.rand(samples, 8))))
    if not fixed:
        assert not asking(module).modified
        return
    with pytest.raises(InternalError, match=f"it takes sizes that are open for those of the example batch: {fixed}"):
        asking(module)


def test_equations_that_hold_of_all_sizes_fix_nothing() -> None:
    p = Open()
    samples, tokens = value(p.input("x", torch.rand(3, 8))).shape
    sizes = OpenSizes.of(p.graph)
    assert (tokens - 5) * samples == samples * tokens - 5 * samples
    assert torch.sym_max(tokens - 5, 1) == tokens - 5
    assert tokens != samples
    assert sizes.fixed_since() == []
    assert tokens == 8
    assert len(sizes.fixed_since()) == 1


# ------------------------------------------------------------------ comparisons, where sizes of the example coincide


def assert_nothing_found(p: Open, *outputs: fx.Node) -> None:
    """Rows behind masks are left as they are, and so are the sizes."""
    assert not MaskedRows()(p.module(*outputs)).modified


@pytest.fixture
def p() -> Open:
    return Open()


@pytest.fixture
def x(p: Open) -> fx.Node:
    return p.input("x", torch.rand(4, 5, 5))


def test_a_mask_of_other_rows(p: Open, x: fx.Node) -> None:
    """As many samples and tokens in the example as what is written to."""
    other, mask = p.input("other", torch.rand(4, 5, 5)), p.input("mask", torch.ones(4, 5).bool())
    assert_nothing_found(p, p(aten.index_put.default, x, [mask], p(aten.index.Tensor, other, [mask])))


def test_rows_of_another_value_of_as_many_features(p: Open, x: fx.Node) -> None:
    other, mask = p.input("other", torch.rand(4, 5, 5)), p.input("mask", torch.ones(4, 5).bool())
    read = p(aten.index.Tensor, x, [mask])  # which says that these are rows of the mask
    assert_nothing_found(p, p(aten.index_put.default, x, [mask], p(aten.index.Tensor, other, [mask])), read)


def test_rows_that_are_added_of_as_many_features(p: Open, x: fx.Node) -> None:
    mask, y = p.input("mask", torch.ones(4, 5).bool()), p.input("y", torch.rand(20, 5))
    read = p(aten.index.Tensor, x, [mask])
    added = p(aten.add.Tensor, read, read)
    added.update_arg(1, y)
    assert_nothing_found(p, p(aten.index_put.default, x, [mask], added))


def test_results_of_one_operator_of_one_size(p: Open, x: fx.Node) -> None:
    """An operator of someone's own may have results of any sizes: no row of one of them can be taken alone."""
    other = p.input("other", torch.rand(4, 5, 5))
    several = p(aten.topk.default, x, 2)
    several.meta["val"] = (value(x), value(other))
    first = p(operator.getitem, several, 0)
    sizes = OpenSizes.of(p.graph)
    found = commute(first, Along(1, 0))
    assert isinstance(found, Declined)
    assert "different shapes" in found.reason
    assert sizes.fixed_since() == []


def test_what_changes_its_size_to_one_that_is_as_large(p: Open, x: fx.Node) -> None:
    """Values are computed again behind one whose rows became fewer, of other sizes or of the same."""
    other = p.input("other", torch.rand(4, 5, 5))
    after = p(aten.neg.default, x)
    again = p(aten.neg.default, after)
    p.module(again)
    after.update_arg(0, other)
    sizes = OpenSizes.of(p.graph)
    refresh_after(p.graph, [other])
    assert dims(again) == dims(other) != dims(x)
    assert sizes.fixed_since() == []

"""Passes that make an exported graph plain: what they change, what they leave alone, and that the values stay the same."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import tokgraph as tg
from tests.passes.tools import assert_well_formed, calls, changes, traced
from tokgraph.passes import GraphPass, Pipeline
from tokgraph.passes.capture.normalize import RemoveAssertions, RemoveNoOps, SplitToSlices, TypeAsToCast, ViewToReshape

aten = torch.ops.aten
END = 2**63 - 1


def run(graph_pass: GraphPass, before: tg.TaskGraph) -> str:
    """What a pass changes; the result computes the same, says so truly, and a second run changes nothing."""
    after = Pipeline([graph_pass]).run_task(before)
    assert_well_formed(after, before)
    inputs = before.flatten(before.example())
    for a, b in zip(after.graph_module(*inputs), before.graph_module(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    difference = changes(before, after)
    assert graph_pass(before.copy().graph_module).modified == bool(difference)
    assert not graph_pass(after.copy().graph_module).modified
    return difference


def test_whole_slices_and_writes_are_removed() -> None:
    def lower(x: Tensor, columns: Tensor, low: Tensor) -> tuple[Tensor]:
        y = aten.index_put(x[:, 0:], [None, None, columns], low)
        return (aten.slice_scatter(x, aten.slice_scatter(x[0:], y, 1, 0, END), 0, 0, END) * 2,)

    before = traced(lower, torch.randn(2, 3, 4), torch.tensor([1, 3]), torch.tensor(-1.0))
    assert_expected_inline(
        run(RemoveNoOps(), before),
        """\
-%slice = slice.Tensor(%args, 0, 0, end)  # float32[2, 3, 4]
-%slice_scatter = slice_scatter(%slice, %index_put, 1, 0, end)  # float32[2, 3, 4]
-%slice_scatter.2 = slice_scatter(%args, %slice_scatter, 0, 0, end)  # float32[2, 3, 4]
-%mul = mul.Tensor(%slice_scatter.2, 2)  # float32[2, 3, 4]
+%mul = mul.Tensor(%index_put, 2)  # float32[2, 3, 4]
""",
    )


def test_partial_slices_and_writes_stay() -> None:
    def write(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        y[:, 1:] = rows
        return y, x[:, :-1]

    before = traced(write, torch.randn(2, 3), torch.randn(2, 2))
    assert calls(before, aten.slice_scatter.default)
    assert run(RemoveNoOps(), before) == ""


def test_a_write_that_casts_stays() -> None:
    """The result has the type of what is written over."""

    def write(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (aten.slice_scatter(x, y, 1, 0, None),)

    assert run(RemoveNoOps(), traced(write, torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float64))) == ""


def test_type_as_is_a_cast() -> None:
    def norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 2).type_as(y), (y * 2).type_as(y)

    before = traced(norm, torch.randn(2, 3), torch.randn(5, dtype=torch.float64))
    assert_expected_inline(
        run(TypeAsToCast(), before),
        """\
-%type_as = type_as(%mul, %args.2)  # float64[2, 3]
+%_to_copy = _to_copy(%mul, dtype=torch.float64)  # float64[2, 3] by type-as-to-cast
-%type_as.2 = type_as(%mul.2, %args.2)  # float64[5]
-return [%type_as, %type_as.2]
+return [%_to_copy, %mul.2]
""",
    )


def test_no_type_as() -> None:
    assert run(TypeAsToCast(), traced(lambda x: (x.double(),), torch.randn(2))) == ""


@pytest.mark.parametrize(
    "split",
    [
        lambda x: x.split(2, -1),
        lambda x: x.split([2, 2], 2),
        lambda x: x.chunk(2, -1),
    ],
)
def test_splits_become_slices(split: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    def gate(x: Tensor) -> tuple[Tensor]:
        a, b = split(x)
        return (a * b.sigmoid(),)

    added = [line for line in run(SplitToSlices(), traced(gate, torch.randn(2, 3, 4))).splitlines() if line[0] == "+"]
    assert_expected_inline(
        "\n".join(added) + "\n",
        """\
+%slice_tensor = slice.Tensor(%args, 2, 0, 2)  # float32[2, 3, 2] by split-to-slices
+%slice_tensor.2 = slice.Tensor(%args, 2, 2, 4)  # float32[2, 3, 2] by split-to-slices
+%sigmoid = sigmoid(%slice_tensor.2)  # float32[2, 3, 2]
+%mul = mul.Tensor(%slice_tensor, %sigmoid)  # float32[2, 3, 2]
""",
    )


def test_views_become_reshapes() -> None:
    assert_expected_inline(
        run(ViewToReshape(), traced(lambda x: (x.view(-1) + 1,), torch.randn(2, 3))),
        """\
-%view = view(%args, [-1])  # float32[6]
+%view = reshape(%args, [-1])  # float32[6]
""",
    )
    assert run(ViewToReshape(), traced(lambda x: (x.t() + 1,), torch.randn(2, 3))) == ""


def test_assertions_on_values_become_checks() -> None:
    def checked(x: Tensor) -> tuple[Tensor]:
        torch._assert_async((x > -100).all(), "small")
        return (x + 1,)

    before = traced(checked, torch.randn(2))
    assert calls(before, aten._assert_async.msg)
    assert_expected_inline(
        re.sub(r"/\S*tools.py:\d+", "tools.py", run(RemoveAssertions(), before)),
        """\
-%_assert_async = _assert_async.msg(%all, small)
+%check = check(%all, small, tools.py, , [], [])
""",
    )
    assert run(RemoveAssertions(), traced(lambda x: (x + 1,), torch.randn(2))) == ""


def test_assertions_on_types_and_sizes_are_removed() -> None:
    before = traced(lambda x: (x.to(torch.float64) + 1,), torch.randn(2))
    assert calls(before, aten._assert_tensor_metadata.default)
    lines = run(RemoveAssertions(), before).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("-%_assert_tensor_metadata")

"""Masks that are the lower triangle become ``is_causal``, however they are written; others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests.passes.programs import Program
from tests.passes.tools import assert_well_formed, calls, changes, placeholders, traced
from tokgraph.ir.node import argument
from tokgraph.passes.pipeline import Pipeline
from tokgraph.passes.simplify import CausalAttention

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
ROWS = 5
Mask = Callable[[Tensor], Tensor]


def at(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def grid(x: Tensor) -> tuple[Tensor, Tensor]:
    return at(x)[:, None], at(x)[None, :]


def packed(x: Tensor) -> Tensor:
    """As transformers does: samples begin where positions do not go up by one, and no sample sees another."""
    positions = at(x)[None].expand(x.shape[0], -1)
    sample = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    b, rows, columns = (
        torch.arange(x.shape[0])[:, None, None, None],
        at(x)[None, None, :, None],
        at(x)[None, None, None],
    )
    return (sample[b, rows] == sample[b, columns]) & (positions[b, columns] <= positions[b, rows])


def low(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


TRIANGLES: dict[str, Mask] = {
    "tril of ones": lambda x: torch.ones(ROWS, ROWS, dtype=torch.bool).tril(),
    "not triu": lambda x: ~torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1),
    "columns at most rows": lambda x: grid(x)[1] <= grid(x)[0],
    "rows at least columns": lambda x: grid(x)[0] >= grid(x)[1],
    "rows above columns less one": lambda x: grid(x)[0] > grid(x)[1] - 1,
    "not columns above rows": lambda x: torch.logical_not(grid(x)[1] > grid(x)[0]),
    "of a batch": lambda x: (grid(x)[1] <= grid(x)[0])[None, None].expand(x.shape[0], 1, -1, -1),
    "and all": lambda x: torch.ones((), dtype=torch.bool) & (grid(x)[1] <= grid(x)[0]),
    "packed samples": packed,
    "positions from one on": lambda x: torch.arange(1, ROWS + 1)[None] <= torch.arange(1, ROWS + 1)[:, None],
    "cut from a longer one": lambda x: torch.ones(9, 9, dtype=torch.bool).tril()[:ROWS, :ROWS],
    "minus infinity above": lambda x: torch.full((ROWS, ROWS), -torch.inf, dtype=x.dtype).triu(1),
    "masked fill": lambda x: torch.zeros(ROWS, ROWS, dtype=x.dtype).masked_fill(grid(x)[1] > grid(x)[0], -torch.inf),
    "where": lambda x: torch.where(grid(x)[1] <= grid(x)[0], 0.0, low(torch.float32)).to(x.dtype),
    "one minus, times the lowest": lambda x: (1 - (grid(x)[1] <= grid(x)[0]).to(x.dtype)) * low(x.dtype),
}
OTHERS: dict[str, Mask] = {
    "an input": lambda x: x[..., 0].unsqueeze(1).unsqueeze(1) < 2,
    "without the diagonal but the first": lambda x: (grid(x)[1] < grid(x)[0]) | (grid(x)[1] == 0),
    "one ahead": lambda x: torch.ones(ROWS, ROWS, dtype=torch.bool).tril(1),
    "backwards": lambda x: grid(x)[1] >= grid(x)[0],
    "a window": lambda x: (grid(x)[1] <= grid(x)[0]) & (grid(x)[0] - grid(x)[1] < 3),
    "a prefix seen by all": lambda x: (grid(x)[1] <= grid(x)[0]) | (grid(x)[1] < 2),
    "a bias of positions": lambda x: torch.where(grid(x)[1] <= grid(x)[0], 0.1 * (grid(x)[1] - grid(x)[0]), -torch.inf),
    "hidden by ten": lambda x: torch.where(grid(x)[1] <= grid(x)[0], 0.0, -10.0),
    "shown by one": lambda x: torch.where(grid(x)[1] <= grid(x)[0], 1.0, -torch.inf),
    "every other position": lambda x: torch.arange(0, 2 * ROWS, 2)[None] <= at(x)[:, None],
    "positions that may overflow": lambda x: at(x).to(torch.int8)[None] <= at(x).to(torch.int8)[:, None],
    "packed by the input": lambda x: packed(x) & (x[:, None, None, :, 0] < 2),
}


def attend(x: Tensor, mask: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(
        heads, heads * 2, heads * 3, mask.to(x.dtype) if mask.is_floating_point() else mask
    )


def case(mask: Mask, samples: int = 2) -> tuple[tg.TaskGraph, tg.TaskGraph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(samples, ROWS, 8, dtype=torch.float64)
    before = traced(lambda x: attend(x, mask(x)), x)
    return before, Pipeline([CausalAttention()]).run_task(before), x


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", TRIANGLES)
def test_a_triangle(name: str, samples: int) -> None:
    before, after, x = case(TRIANGLES[name], samples)
    (attention,) = calls(after, aten.scaled_dot_product_attention.default)
    assert argument(attention, "attn_mask") is None
    assert argument(attention, "is_causal") is True
    assert_well_formed(after, before)
    torch.testing.assert_close(after.graph_module(x), before.graph_module(x), rtol=1e-14, atol=1e-14)
    assert len(calls(after, aten.arange.default)) == 0


@pytest.mark.parametrize("name", OTHERS)
def test_another_mask_stays(name: str) -> None:
    before, after, _ = case(OTHERS[name])
    for graph in (before, after):
        (attention,) = calls(graph, aten.scaled_dot_product_attention.default)
        assert argument(attention, "attn_mask") is not None
        assert not argument(attention, "is_causal")


def test_a_mask_that_hides_nothing_goes() -> None:
    before, after, x = case(lambda x: torch.ones(ROWS, ROWS, dtype=torch.bool))
    (attention,) = calls(after, aten.scaled_dot_product_attention.default)
    assert argument(attention, "attn_mask") is None
    assert not argument(attention, "is_causal")
    torch.testing.assert_close(after.graph_module(x), before.graph_module(x), rtol=1e-14, atol=1e-14)


def test_one_attention() -> None:
    before, after, _ = case(TRIANGLES["columns at most rows"])
    assert_expected_inline(
        changes(before, after),
        """\
-%arange = arange(5, device=cpu, pin_memory=False)  # int64[5]
-%unsqueeze = unsqueeze(%arange, 0)  # int64[1, 5]
-%arange.2 = arange(5, device=cpu, pin_memory=False)  # int64[5]
-%unsqueeze.2 = unsqueeze(%arange.2, 1)  # int64[5, 1]
-%le = le.Tensor(%unsqueeze, %unsqueeze.2)  # bool[5, 5]
-%scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %mul, %mul.2, %le)  # float64[2, 2, 5, 4]
+%scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %mul, %mul.2, None, is_causal=True)  # float64[2, 2, 5, 4]
""",
    )


def narrowed(rows: int, columns: int) -> Program:
    """An attention whose mask is the lower triangle at two choices of rows, for queries and for keys."""
    p = Program()
    x = p.input("x", torch.randn(2, 1, 6, 4, dtype=torch.float64))
    kept = [
        p(tokgraph.rows.default, p.input(f"mask{i}", torch.arange(6).expand(2, -1) < n), n, True)
        for i, n in enumerate((rows, columns))
    ]
    if rows == columns:
        kept[1] = kept[0]
    ones = p(aten.ones.default, [6, 6], dtype=torch.bool)
    mask = p(
        aten.expand.default,
        p(aten.unsqueeze.default, p(aten.unsqueeze.default, p(aten.tril.default, ones), 0), 0),
        [2, 1, 6, 6],
    )
    mask = p.select(p.select(mask, kept[0], 2), kept[1], 3)
    q, k = (p.select(x, i, 2) for i in kept)
    p(aten.scaled_dot_product_attention.default, q, k, k, mask)
    return p


@pytest.mark.parametrize(("rows", "columns", "causal"), [(4, 4, True), (4, 5, False), (3, 6, False)])
def test_the_same_rows_of_queries_and_keys_stay_causal(rows: int, columns: int, causal: bool) -> None:
    p = narrowed(rows, columns)
    module = p.module(next(reversed(p.graph.nodes)))
    before = module(*p.inputs)
    result = CausalAttention()(module)
    assert result.modified is causal
    torch.testing.assert_close(result.graph_module(*p.inputs), before, rtol=1e-14, atol=1e-14)


def test_placeholders_stay() -> None:
    """An input that only the mask read is an input still."""
    _, after, _ = case(TRIANGLES["of a batch"])
    assert len(placeholders(after.graph)) == 1

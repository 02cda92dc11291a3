"""Distances of tensors: infinities, NaN, values that stand for infinity, and tensors larger than a chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokgraph.ir import distance
from tokgraph.ir.distance import relative_distance

INF, NAN = float("inf"), float("nan")
LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-3], [0.0], 1e-3),
        ([INF, 1.0, NAN], [INF, 1.0, NAN], 0.0),
        ([INF], [1.0], INF),
        ([1.0], [INF], INF),
        ([NAN], [1.0], INF),
        ([1.0], [NAN], INF),
        ([LEAST, 1.0], [LEAST, 2.0], 0.5),  # what masks logits does not hide the others
        ([LEAST / 2, 1.0], [LEAST, 1.0], 0.5),
        ([0.0, 1.0], [LEAST, 1.0], 1.0),
    ],
)
def test_of_floats(a: list[float], b: list[float], expected: float) -> None:
    assert relative_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_of_others() -> None:
    ints, halves = torch.tensor([1, 2]), torch.tensor([-65504.0, 1.0], dtype=torch.float16)
    assert relative_distance(ints, ints.clone()) == 0
    assert relative_distance(ints, ints + 1) == INF
    assert relative_distance(ints, ints.float()) == 0
    assert relative_distance(torch.zeros(2), torch.zeros(3)) == INF
    assert relative_distance(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_distance(torch.tensor([1 + 1j]), torch.tensor([1 + 2j])) == 0.5
    assert relative_distance(halves * torch.tensor([1, 2]), halves) == 1
    assert relative_distance(torch.tensor([1e-9]), torch.tensor([2e-9]), floor=1.0) == pytest.approx(1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 7), st.floats(0, 1))
def test_chunks_do_not_matter(values: list[float], chunk: int, shift: float) -> None:
    b = torch.tensor(values, dtype=torch.float64)
    a = b + shift * torch.arange(len(values))
    whole = relative_distance(a, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distance, "_CHUNK", chunk)
        assert relative_distance(a, b) == whole
    size = float(b.abs().max())
    error = float((a - b).abs().max())
    assert whole == pytest.approx(error / size if size else error)

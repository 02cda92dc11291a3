"""Forwards that write a part of a value in place: the graph, which writes nothing, has the same loss and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

import tokgraph as tg
from tests.field.models import OPEN, VLM, assert_same, batch, seeded, spec, understanding


def slices(x: Tensor, features: Tensor) -> None:
    x[:, 2:6] = features


def other_type(x: Tensor, features: Tensor) -> None:
    x[:, 2:6] = features.double()


def fewer_rows(x: Tensor, features: Tensor) -> None:
    x[:, 2:6] = features[:, :1]


def fewer_axes(x: Tensor, features: Tensor) -> None:
    x[:, 2:6] = features[0, 0]


def every_other(x: Tensor, features: Tensor) -> None:
    x[:, 2:6, ::2] = features[..., ::2]


def one_row(x: Tensor, features: Tensor) -> None:
    x[:, 2] = features[:, 0]


def filled(x: Tensor, features: Tensor) -> None:
    x[:, :1].zero_()
    x[:, 1].fill_(x.mean())
    x[:, 2:6] += features


WRITES = (slices, other_type, fewer_rows, fewer_axes, every_other, one_row, filled)
IN_SHORT = ((slices, True), (other_type, False))


@pytest.mark.parametrize(
    ("write", "dynamic"),
    [
        pytest.param(write, dynamic, marks=() if (write, dynamic) in IN_SHORT else pytest.mark.slow)
        for write in WRITES
        for dynamic in (False, True)
    ],
)
def test_part_of_a_value(write: Callable[[Tensor, Tensor], None], dynamic: bool) -> None:
    class Written(VLM):
        def embed(self, ids: Tensor, patches: Tensor | None) -> Tensor:
            x = self.embedding(ids).clone()
            write(x, self.projector(self.tower(patches)))
            return x

    model = seeded(lambda: Written(layers=1))
    program = tg.capture(spec(model, dynamic=OPEN if dynamic else None))
    task = tg.apply(program, tg.make_plan(program, "exact"))["u"]
    second = batch(seed=5)
    assert_same(model, lambda: understanding(model, **second), lambda: task(**second))

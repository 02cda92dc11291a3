"""Slices that count from the end by a size of the batch, as models do that put image queries before their text."""

from __future__ import annotations

from torch import Tensor, nn

import tokgraph as tg
from tests.field.models import OPEN, VLM, assert_same, batch, cross_entropy, seeded, spec


def last(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(ids, patches)[:, -labels.shape[1] :], labels)


def test_logits_of_as_many_rows_as_there_are_labels() -> None:
    model = seeded(lambda: VLM(layers=1))
    task = tg.optimize(spec(model, last, dynamic=OPEN), "exact")["u"]
    second = batch(seed=5, before=3)
    assert_same(model, lambda: last(model, **second), lambda: task(**second))

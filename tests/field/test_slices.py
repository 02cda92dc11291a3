"""Slices of logits: that count from the end by a size of the batch, as models do that put image queries before their text,
and all but the last row, beside logits that are returned.
"""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field.models import OPEN, VLM, assert_same, batch, cross_entropy, seeded, spec
from tokgraph.report import make_report


def last(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(ids, patches)[:, -labels.shape[1] :], labels)


@pytest.mark.slow
def test_logits_of_as_many_rows_as_there_are_labels() -> None:
    model = seeded(lambda: VLM(layers=1))
    task = tg.optimize(spec(model, last, dynamic=OPEN), "exact")["u"]
    second = batch(seed=5, before=3)
    assert_same(model, lambda: last(model, **second), lambda: task(**second))


def all_but_the_last(model: m.Model, ids: Tensor, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The usual loss, with logits that are returned."""
    logits = model(ids, patches)
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)), logits


def padded(model: m.Model, ids: Tensor, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(ids, patches)
    return m.cross_entropy(logits, labels), logits


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_logits_that_are_returned_beside_a_loss_over_all_but_the_last(dynamic: bool) -> None:
    """Both begin with one selection, so that nothing is computed that a loss over padded labels would not ask for."""
    model, flops = m.model(layers=2), []
    for forward in (padded, all_but_the_last):
        facts = tg.analyze(tg.capture(m.spec(model, m.batch(), forward, dynamic=dynamic)))
        accelerated = tg.apply(facts, tg.make_plan(facts, "exact"))
        tg.verify(accelerated).raise_if_failed()
        flops.append(make_report(accelerated)["tasks"][m.TASK]["flops"]["ratio"])
        for inputs in (m.batch(), m.batch((5, 1), seed=3), m.batch((8, 0), seed=4)):  # an image at the very end
            assert m.worst(accelerated[m.TASK](**inputs)[0], forward(model, **inputs)[0], model) < 1e-10
    assert flops[0] == flops[1] < 1

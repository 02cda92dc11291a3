"""Losses over rows that a boolean index takes: refused, or followed where the model says how many there are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import tokgraph as tg
from tests.field.test_losses import assert_as_eager, batch, embedded, task
from tests.tiny import IMAGE_ID


def near_patches(model, ids, patches, labels, told=False):
    taken, target = model.backbone(embedded(model, ids, patches))[ids == IMAGE_ID], patches.flatten(0, 1)
    if told:
        torch._check(taken.shape[0] == target.shape[0])
    return F.mse_loss(model.code_head(taken)[:, :4], target) + 0 * labels.sum()


def told(model, ids, patches, labels):
    return near_patches(model, ids, patches, labels, told=True)


def test_they_are_refused_with_what_to_do_instead() -> None:
    with pytest.raises(tg.CaptureError) as raised:
        tg.capture(task(near_patches))
    assert "boolean index" in str(raised.value)
    assert "torch._check(" in str(raised.value)


def test_they_are_followed_where_their_number_is_said() -> None:
    spec = task(told)
    program = tg.capture(spec)
    assert_as_eager(spec, tg.apply(program, tg.Plan(exact=True)), batch(1))
    dropping = tg.apply(program, tg.Plan((tg.DropSite("understanding", 1, 2, keep=0.5),)))
    tg.verify(dropping).raise_if_failed()
    inputs = batch(1)
    inputs["ids"][0, (inputs["ids"][0] == IMAGE_ID).nonzero()[0]] = IMAGE_ID + 1  # one fewer than there are patches
    with pytest.raises(tg.BatchError):
        dropping["understanding"](**inputs)

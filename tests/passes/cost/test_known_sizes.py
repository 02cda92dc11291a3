"""Where sizes come from: what shapes show, and each assumption in words, checked against captures at other sizes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import captured_tiny
from tokgraph.ir.cost import TaskCost

U, G = "understanding", "generation"
GROWS = "the encoder grows with the number of visual tokens: "


def sliced(model: tiny.Unified, ids: torch.Tensor, patches: torch.Tensor, labels: torch.Tensor):
    """As ``tiny.understand``, but the head reads the rows from position 3 on: one or two image rows fewer."""
    x = model.embed(ids)
    x = x.masked_scatter((ids == tiny.IMAGE_ID).unsqueeze(-1), model.patches(patches).flatten(0, 1))
    logits = model.head(model.backbone(x)[:, 3:-1])
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 4:].flatten()), logits


def cost_of(task: tg.Task) -> TaskCost:
    spec = tiny.build()
    return tg.analyze(tg.capture(tg.ModelSpec(spec.model, {U: task})))[U].cost


def assumed(cost: TaskCost) -> tuple[str, ...]:
    assert cost.sizes is not None
    return cost.sizes.assumed


@pytest.mark.slow
def test_shapes_tell_of_a_range_of_positions() -> None:
    assert assumed(captured_tiny(3, dynamic=True).facts[G].cost) == ()


@pytest.mark.slow
def test_ids_do_not_tell_how_many_images_there_are() -> None:
    assert assumed(captured_tiny(3, dynamic=True).facts[U].cost) == (
        GROWS + "an image for every 6 visual tokens of a sample",
    )


@pytest.mark.slow
def test_where_the_batch_is_fixed_the_encoder_grows_in_proportion() -> None:
    task = tiny.build().tasks[U]
    cost = cost_of(replace(task, dynamic={"ids": {1: "tokens"}, "labels": {1: "tokens"}}))
    assert assumed(cost) == (GROWS + "in proportion to them, from 6 visual tokens on",)
    one, two = (cost.at(visual=visual).by_region()["encoder"] for visual in (6, 12))
    for amount in ("forward_flops", "backward_flops", "forward_written"):  # parameters are read once
        assert getattr(two, amount) == 2 * getattr(one, amount) > 0


@pytest.mark.slow
def test_a_slice_leaves_out_as_many_as_now() -> None:
    """Rows 1 to 6, or 2 to 7, are image rows: from row 3 on there is one fewer at least, also where the image is longer."""
    cost = cost_of(replace(tiny.build(dynamic=True).tasks[U], forward=sliced))
    images, text = assumed(cost)
    assert images == GROWS + "an image for every 6 visual tokens of a sample"
    assert re.fullmatch(r"slice slice_\d+ of the sequence leaves out 1 visual tokens at any size", text)
    head = [n for n in cost.at(visual=12, tokens=17).nodes if n.region == "head" and n.work.flops]
    assert head
    assert [n.visual for n in head] == pytest.approx([11 / 13] * len(head))

"""Bugs that are put into tokgraph on purpose, each of a kind that a rewriter may have: the fuzzer must find them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokgraph.ops import masks, moving
from tokgraph.passes.rewrite import seed, site_rows
from tokgraph.passes.simplify import causal

Plant = Callable[[pytest.MonkeyPatch], None]


def rows_come_back_in_other_places(patch: pytest.MonkeyPatch) -> None:
    whole = moving._restore
    patch.setattr(moving, "_restore", lambda x, rows, index: whole(x, rows, index.roll(1, 1)))


def gradients_of_dropped_rows_count_twice(patch: pytest.MonkeyPatch) -> None:
    def doubled(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        first, *others = backward(ctx, grad)
        return (2 * first, *others)

    backward = moving.drop._backward_fn
    patch.setattr(moving.drop, "_backward_fn", doubled)


def every_mask_is_causal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(causal, "is_lower_triangle", lambda found, lowest: True)


def the_row_before_the_text_is_not_demanded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masks, "_demand_mask", lambda visual, reads: visual if reads == "visual" else ~visual)


def frozen_rows_are_no_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(seed, "_hides", lambda site, block: True)


def means_beside_the_decoder_take_all_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(seed, "seed_sides", lambda *given: None)


def the_mask_is_not_narrowed_with_the_keys(patch: pytest.MonkeyPatch) -> None:
    """The first columns of a mask stand for the keys that are left."""

    def first_rows(emit: Any, x: Any, chain: Any, axis: int = 1, batch: int = 0) -> Any:
        short = chains(emit, x, chain, axis, batch)
        is_mask = x.meta["val"].dtype is torch.bool and axis == x.meta["val"].dim() - 1 and axis > 1
        if not is_mask or not chain:
            return short
        size = short.meta["val"].shape[axis]
        return emit.call(torch.ops.aten.slice.Tensor, x, axis, 0, size, origin=x)

    chains = seed.Emitter.chain
    patch.setattr(seed.Emitter, "chain", first_rows)


def one_row_more_is_dropped_than_asked_for(patch: pytest.MonkeyPatch) -> None:
    kept = site_rows.EqualRows.kept

    def fewer(self: Any, site: Any, around: Any, seen: Any) -> Any:
        visual = self._facts.visual.count
        return kept(self, replace(site, keep=max(0.0, site.keep - 1 / visual)), around, seen)

    patch.setattr(site_rows.EqualRows, "kept", fewer)


PLANTED: dict[str, Plant] = {
    plant.__name__.replace("_", " "): plant
    for plant in (
        rows_come_back_in_other_places,
        gradients_of_dropped_rows_count_twice,
        every_mask_is_causal,
        the_row_before_the_text_is_not_demanded,
        frozen_rows_are_no_keys,
        means_beside_the_decoder_take_all_rows,
        the_mask_is_not_narrowed_with_the_keys,
        one_row_more_is_dropped_than_asked_for,
    )
}

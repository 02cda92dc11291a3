"""The attention selector where other sites lie around and before it: scores are of the rows of the site's own space."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, captured_tiny
from tests.test_ragged import IMAGES
from tests.test_ragged import spec as ragged_spec
from tokgraph.ir.plan import DropSite
from tokgraph.planning.check import check_plan

U = "understanding"


def answering(spec: tg.ModelSpec) -> tg.ModelSpec:
    """The same, labelled from two tokens after the last image on: the last prompt token is text."""
    task = spec.tasks[U]
    ids, labels = task.inputs["ids"], task.inputs["labels"].clone()
    for row, of_row in zip(labels, ids, strict=True):
        row[: int((of_row == tiny.IMAGE_ID).nonzero().max()) + 2] = -100
    return tg.ModelSpec(spec.model, {U: replace(task, inputs={**task.inputs, "labels": labels})})


@pytest.fixture(scope="module")
def four() -> Captured:
    return Captured.of(answering(tiny.build(layers=4)))


def site(start: int, end: int | None, keep: float, selector: str = "uniform", **more: object) -> DropSite:
    return DropSite(U, start, end, keep, selector, **more)  # type: ignore[arg-type]


SITES = {
    "after a site that restores": (site(1, 2, 0.5), site(2, None, 0.5, "attention", restore=False)),
    "beginning with one around it": (site(1, 4, 0.8), site(1, 3, 0.4, "attention")),
    "inside a frozen one": (site(0, 4, 0.6, mode="freeze"), site(2, 4, 0.3, "attention", mode="freeze")),
    "inside a hidden one": (site(0, 4, 0.8), site(2, 4, 0.4, "attention")),
    "inside one, after one that restores": (site(0, 4, 0.8), site(1, 2, 0.4), site(2, 3, 0.4, "attention")),
    "inside one, after a frozen one": (site(0, 4, 0.8), site(1, 2, 0.4, mode="freeze"), site(2, 3, 0.4, "attention")),
}


def verify(model: Captured, sites: tuple[DropSite, ...], exact: bool = True) -> None:
    plan = check_plan(tg.Plan(sites, exact), model.facts)
    tg.verify(model.program, model.apply(plan)).raise_if_failed()


@pytest.mark.parametrize("case", SITES)
def test_the_oracle_agrees(four: Captured, case: str) -> None:
    verify(four, SITES[case])


@pytest.mark.slow
@pytest.mark.parametrize("ragged", ["min", "pad"])
def test_the_oracle_agrees_on_ragged_batches(ragged: tg.plan.Ragged) -> None:
    model = Captured.of(answering(ragged_spec(IMAGES)))
    for sites in SITES.values():
        verify(model, tuple(replace(s, ragged=ragged) for s in sites), exact=False)


def test_a_prompt_that_was_dropped_before_pays_nothing_and_is_an_error() -> None:
    """Labels follow the image at once: the last prompt token is the last visual one, which an even site drops."""
    model = captured_tiny(4)
    with pytest.raises(tg.BatchError, match="another number of such tokens than the 1"):
        verify(model, (site(0, 4, 0.8), site(2, 4, 0.4, "attention")))

"""Rewritten graphs against the hand-written loop over transformers' own layers: loss, logits, every parameter's gradient.

The loop (`tests/reference/janus.py`) holds no tokgraph code. Samples hold their image at different positions, and every
second one is padded on the right.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import cycle

import pytest
import torch
from torch import Tensor

import tokgraph as tg
from tests.harness import ZERO, Captured, assert_close, assert_same_gradients, gradients, random_hash

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

reference = pytest.importorskip("tests.reference.janus", reason="needs transformers")

TASKS = ("understanding", "generation")
TOLERANCE = 1e-10  # float64, relative to the largest magnitude of the tensor
On = partial(tg.DropSite, "")  # the task is filled in by the test
Inputs = dict[str, Tensor]

SITES = {
    "no site": (),
    "hide": (On(1, 3, 0.5),),
    "hide all out": (On(1, 3, 0.0),),
    "hide none": (On(1, 3, 1.0),),
    "hide from the first block": (On(0, 2, 0.3),),
    "hide to the last block": (On(2, None, 0.25),),
    "hide random": (On(1, 3, 0.5, "random", seed=7),),
    "hide for good": (On(1, 3, 0.5, restore=False),),
    "hide for good, all out": (On(2, None, 0.0, restore=False),),
    "hide for good, none": (On(1, 3, 1.0, restore=False),),
    "hide for good, random": (On(1, 2, 0.5, "random", restore=False, seed=3),),
    "freeze": (On(1, 3, 0.5, mode="freeze"),),
    "freeze all, everywhere": (On(0, None, 0.0, mode="freeze"),),
    "freeze none": (On(0, None, 1.0, mode="freeze"),),
    "freeze, then gone": (On(1, 3, 0.25, mode="freeze", restore=False),),
    "freeze, then gone, all out": (On(0, 2, 0.0, mode="freeze", restore=False),),
    "freeze random": (On(0, 3, 0.25, "random", mode="freeze", seed=1),),
    "nested": (On(0, 4, 0.75), On(1, 3, 0.25)),
    "nested three deep, for good": tuple(On(start, None, 2.0**-start, restore=False) for start in (1, 2, 3)),
    "nested in the same span": (On(1, 3, 0.5), On(1, 3, 0.25)),
    "nested, the inner one wants more than is left": (On(0, 4, 0.25), On(1, 3, 0.5)),
    "restored inside a span for good": (On(1, None, 0.5, restore=False), On(2, 3, 0.25)),
    "freeze inside hide": (On(0, 4, 0.5), On(1, 3, 0.25, mode="freeze")),
    "freeze inside freeze": (On(0, 4, 0.5, mode="freeze"), On(1, 3, 0.25, mode="freeze")),
    "hide inside freeze that is gone": (On(0, 2, 0.5, mode="freeze", restore=False), On(2, 4, 0.25)),
    "every second block": (On(0, 1, 0.0), On(2, 3, 0.0)),
    "one after the other": (On(0, 2, 0.5), On(2, 3, 0.25, mode="freeze"), On(3, 4, 0.5, restore=False)),
}
NORM_SITES = {
    "hide": (On(1, 3, 0.5, "norm"),),
    "hide for good": (On(1, 3, 0.5, "norm", restore=False),),
    "freeze": (On(0, None, 0.3, "norm", mode="freeze"),),
    "nested": (On(0, 4, 0.75, "norm"), On(1, 3, 0.25, "norm")),
}
EAGER_SITES = (
    "no site",
    "hide",
    "hide for good",
    "freeze all, everywhere",
    "freeze, then gone",
    "nested",
    "freeze inside hide",
)


def check(
    captured: Captured,
    task: str,
    sites: tuple[tg.DropSite, ...],
    exact: bool,
    inputs: Inputs | None = None,
    tolerance: float = TOLERANCE,
    zero: float = ZERO,
) -> None:
    """Apply the sites, run both, compare loss, logits at the rows returned, and all gradients."""
    inputs = dict(captured.spec.tasks[task].inputs) if inputs is None else inputs
    plan = tg.Plan(tuple(replace(site, task=task) for site in sites), exact=exact)
    (loss, logits), index = captured.apply(plan, task)[task].with_rows(**inputs)
    expected = getattr(reference, task)(captured.model, **inputs, sites=[in_reference(s, task, inputs) for s in sites])

    first = inputs["input_ids"].shape[1] - 1 if task == "generation" else 0  # the row of the stream that is row 0 here
    rows = index.get("[1]", torch.arange(logits.shape[1]).expand(len(logits), -1)) + first
    same = rows.unsqueeze(2) == expected.rows.unsqueeze(1)
    assert same.any(2).all(), "a row is returned that the reference dropped"
    at = same.int().argmax(2, keepdim=True)

    assert_close(loss, expected.loss, "loss", tolerance)
    assert_close(logits, expected.logits.gather(1, at.expand_as(logits)), "logits", tolerance)
    assert_same_gradients(gradients(captured.model, loss), gradients(captured.model, expected.loss), tolerance, zero)


def in_reference(site: tg.DropSite, task: str, inputs: Inputs) -> reference.Site:
    selector = random_positions(site, task, inputs) if site.selector == "random" else site.selector
    return reference.Site(site.start, site.end, site.keep, selector, site.mode, site.restore)


def random_positions(site: tg.DropSite, task: str, inputs: Inputs) -> Tensor:
    """Return the visual positions that a lone ``random`` site keeps, by the definition of the hash."""
    if task == "understanding":
        visual = inputs["input_ids"] == 255
        demanded = reference.reads_text(visual)
    else:
        batch, text = inputs["input_ids"].shape
        visual = (torch.arange(text + 16) >= text).expand(batch, -1)
        demanded = reference.reads_visual(visual)
    kept = []
    for sample in range(len(visual)):
        candidates = [i for i in range(visual.shape[1]) if visual[sample, i]]
        must_stay = [i for i in candidates if demanded[sample, i] and not site.restore]
        free = [i for i in candidates if i not in must_stay]
        count = max(math.floor(site.keep * len(candidates) + 0.5) - len(must_stay), 0)
        ranks = sorted(range(len(free)), key=lambda rank: -random_hash(sample, rank, site.seed))
        kept.append(sorted(must_stay + [free[rank] for rank in ranks[:count]]))
    return torch.tensor(kept)


@pytest.mark.parametrize(("case", "task"), list(zip(SITES, cycle(TASKS), strict=False)))
def test_sdpa(captured_janus, task, case):
    check(captured_janus("sdpa"), task, SITES[case], exact=True)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "task"), list(zip(SITES, cycle(reversed(TASKS)), strict=False)))
def test_sdpa_of_the_other_task(captured_janus, task, case):
    check(captured_janus("sdpa"), task, SITES[case], exact=True)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "task"), list(zip(SITES, cycle(TASKS), strict=False)))
def test_sdpa_where_all_rows_are_computed_at_the_end(captured_janus, task, case):
    check(captured_janus("sdpa"), task, SITES[case], exact=False)


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("case", NORM_SITES)
def test_norm_selector(captured_janus, case, exact):
    check(captured_janus("sdpa"), "understanding", NORM_SITES[case], exact)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("case", EAGER_SITES)
def test_eager(captured_janus, task, case):
    check(captured_janus("eager"), task, SITES[case], exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_float32(captured_janus, task):
    check(captured_janus("sdpa", torch.float32), task, SITES["nested"], True, tolerance=1e-5, zero=1e-2)


def other_batch(task: str, batch: int, more_text: int) -> Inputs:
    """Return another batch, with some text tokens more (or fewer) before the image."""
    if task == "generation":
        inputs = reference.tiny_generation_batch(batch, seed=5)
        return {**inputs, "input_ids": torch.arange(1, 13 + more_text).expand(batch, -1)}
    inputs = reference.tiny_understanding_batch(batch, seed=5)
    put_before = {"input_ids": 3, "attention_mask": 1, "labels": reference.IGNORE}
    return {
        name: torch.cat([torch.full((batch, max(more_text, 0)), put_before[name]), value[:, max(-more_text, 0) :]], 1)
        if name in put_before
        else value
        for name, value in inputs.items()
    }


@pytest.mark.slow  # with symbols; tests/test_laws.py holds another model to the laws at other sizes
@pytest.mark.parametrize(
    ("batch", "more_text", "exact"), [(3, 0, False), (5, 7, True), (2, -2, False), (1, 0, True), (1, 3, True)]
)
@pytest.mark.parametrize("task", TASKS)
def test_batches_of_other_shapes_go_through_the_same_program(captured_janus, task, batch, more_text, exact):
    sites = (On(0, 3, 0.5, "random", mode="hide", seed=2),)
    check(captured_janus("sdpa", dynamic=True), task, sites, exact, other_batch(task, batch, more_text))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nested three deep, for good", "freeze inside hide"])
@pytest.mark.parametrize("task", TASKS)
def test_batches_of_other_shapes_in_nested_spans(captured_janus, task, case):
    check(captured_janus("sdpa", dynamic=True), task, SITES[case], True, other_batch(task, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no site", "hide for good", "freeze", "nested"])
@pytest.mark.parametrize("task", TASKS)
def test_captured_with_a_batch_of_one(captured_janus, task, case):
    check(captured_janus("sdpa", batch=1), task, SITES[case], exact=True)


@pytest.mark.parametrize(
    ("task", "sites", "error", "message"),
    [
        ("understanding", (On(0, 2, 0.5), On(1, 3, 0.5)), tg.IllegalRewriteError, "overlap"),
        ("understanding", (On(0, 3, 0.5), On(1, 2, 0.5, restore=False)), tg.IllegalRewriteError, "overlap"),
        ("understanding", (On(0, 3, 0.5, mode="freeze"), On(1, 2, 0.5)), tg.PlanError, "inside a 'freeze' site"),
        ("generation", (On(1, 2, 0.5, "norm"),), tg.PlanError, "not causal"),
        ("generation", (On(1, 5, 0.5),), tg.PlanError, "out of range"),
    ],
)
def test_refused(captured_janus, task, sites, error, message):
    plan = tg.Plan(tuple(replace(site, task=task) for site in sites))
    with pytest.raises(error, match=message):
        captured_janus("sdpa").apply(plan, task)

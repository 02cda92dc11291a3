"""Redundancy of visual rows: against hooks on the eager model, and effective ranks that are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness import Captured
from tests.measurement.models import batch, captured
from tests.passes.tools import TASKS
from tokgraph.measurement import (
    Redundancy,
    attention_allocation,
    effective_rank,
    find_segments,
    measure_forward,
    visual_redundancy,
)
from tokgraph.measurement.observe import ObservedRun

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double())[0]


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4.0),
        ([3.0, 0.0, 0.0, 0.0], 1.0),
        ([2.0, 2.0, 0.0, 0.0], 2.0),
        ([3.0, 1.0, 0.0, 0.0], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
    ],
)
def test_effective_rank_of_known_singular_values(values: list[float], rank: float) -> None:
    rows = torch.zeros(4, 6).double()
    rows[range(4), range(4)] = torch.tensor(values).double()
    turned = orthogonal(4) @ rows @ orthogonal(6)
    assert effective_rank(turned) == pytest.approx(rank)
    assert effective_rank(7 * turned) == pytest.approx(rank)  # scale does not matter
    assert effective_rank(turned.T) == pytest.approx(rank)


def test_rows_of_zeros_have_no_direction() -> None:
    assert effective_rank(torch.zeros(3, 4)) == 0.0


def layers_of(found: Captured) -> list[nn.Module]:
    model: Any = found.model
    if hasattr(model, "model"):
        return list(model.model.language_model.layers)
    return list(model.blocks if hasattr(model, "blocks") else model.layers)


def streams(found: Captured, task: str, given: dict[str, Any]) -> list[Tensor]:
    """The residual stream of the eager model, before the first layer and after each."""
    noted: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not noted:
            noted.append(args[0] if args else kwargs["hidden_states"])
        noted.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers_of(found)]
    try:
        with torch.no_grad():
            found.spec.tasks[task].forward(found.model, **given)
    finally:
        for hook in hooks:
            hook.remove()
    return noted


def by_hand(stream: list[Tensor], visual: Tensor) -> Redundancy:
    cosines, ranks = [], []
    for before, after in zip(stream, stream[1:], strict=False):
        pairs = [(before[b, t], after[b, t]) for b, t in visual.nonzero().tolist()]
        cosines.append(sum(float(F.cosine_similarity(x, y, dim=0)) for x, y in pairs) / len(pairs))
        entropies = []
        for rows, here in zip(after, visual, strict=True):
            values = torch.linalg.svdvals(rows[here].double())
            p = values / values.sum()
            entropies.append(float(-(p[p > 0] * p[p > 0].log()).sum()))
        ranks.append(sum(math.exp(e) for e in entropies) / len(entropies))
    return Redundancy(tuple(cosines), tuple(ranks))


def assert_like(ours: Redundancy, reference: Redundancy, tolerance: float) -> None:
    assert ours.cosine == pytest.approx(reference.cosine, rel=tolerance)
    assert ours.effective_rank == pytest.approx(reference.effective_rank, rel=tolerance)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("example", ["janus_example", "digits_example"])
def test_hooks_on_the_eager_model(task: str, example: str, request: pytest.FixtureRequest) -> None:
    found: Captured = request.getfixturevalue(example)
    graph, facts = found.program[task], found.facts[task]
    visual = find_segments(graph, facts)["image"]
    reference = by_hand(streams(found, task, dict(graph.task.inputs)), visual)
    ours = visual_redundancy(graph, facts)
    assert len(ours.cosine) == len(facts.blocks) == 4
    assert_like(ours, reference, 1e-9)
    assert all(-1 <= c <= 1 for c in ours.cosine)
    assert all(1 <= r <= visual.sum(1).max() for r in ours.effective_rank)


def test_batches_add_up() -> None:
    found, whole = captured(), batch(5, tokens=14)
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 1), slice(1, 5))]
    graph, facts = found.program["t"], found.facts["t"]
    one = visual_redundancy(graph, facts, [whole])
    assert_like(visual_redundancy(graph, facts, parts), one, 1e-12)
    assert_like(one, by_hand(streams(found, "t", whole), find_segments(graph, facts, whole)["image"]), 1e-9)


@pytest.mark.slow
def test_half_precision_is_compared_in_float32() -> None:
    found = captured(dtype=torch.bfloat16)
    graph, facts = found.program["t"], found.facts["t"]
    rounded = [x.float() for x in streams(found, "t", dict(graph.task.inputs))]
    visual = find_segments(graph, facts)["image"]
    assert_like(visual_redundancy(graph, facts), by_hand(rounded, visual), 1e-3)
    exact = captured()
    assert_like(
        visual_redundancy(graph, facts, dtype=torch.float64),
        visual_redundancy(exact.program["t"], exact.facts["t"]),
        0.02,
    )


def test_one_run_a_batch_serves_both() -> None:
    found = captured()
    graph, facts = found.program["t"], found.facts["t"]
    batches = [batch(2), batch(3, tokens=13)]
    runs = 0
    plain: Callable[..., Any] = ObservedRun.run

    def counted(self: ObservedRun, *args: Any) -> Any:
        nonlocal runs
        runs += 1
        return plain(self, *args)

    with mock.patch.object(ObservedRun, "run", counted):
        both = measure_forward(graph, facts, batches, queries=("output",))
    assert runs == 2
    assert both.redundancy == visual_redundancy(graph, facts, batches)
    alone = attention_allocation(graph, facts, batches, queries=("output",))
    assert torch.equal(both.allocation.mass, alone.mass)
    assert both.allocation.queries == ("output",)


def test_nothing_to_measure() -> None:
    found = captured()
    assert all(map(math.isnan, visual_redundancy(found.program["t"], found.facts["t"], []).cosine))

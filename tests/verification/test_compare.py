"""Comparing results: relative errors, compact rows, what counts as failed, and the words for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.passes import models
from tests.passes.tools import Captured, Run, captured, site
from tokgraph.errors import VerificationError
from tokgraph.ir.interpreter import trains_with_dropout
from tokgraph.ir.program import COMPACT_OUTPUTS
from tokgraph.ir.verification import TaskVerification, Verification
from tokgraph.verification import judge
from tokgraph.verification.compare import (
    Difference,
    Results,
    compare_gradients,
    compare_outputs,
    run_oracle,
    run_rewritten,
)


def results(*outputs: object, **gradients: Tensor) -> Results:
    return Results(list(outputs), gradients)


def graph_of(leaves: int, compact: dict[int, int] | None = None) -> tg.TaskGraph:
    """A task graph of which only the number of outputs and the compact ones matter."""
    graph = captured().graph.copy()
    graph.graph_module.meta[COMPACT_OUTPUTS] = compact or {}
    _, spec = torch.utils._pytree.tree_flatten(tuple(range(leaves)))
    return replace(graph, out_spec=spec)


def test_output_errors_are_relative_to_the_largest_value() -> None:
    mine, reference = results(torch.tensor([4.0, 1.0])), results(torch.tensor([4.0, 2.0]))
    found = compare_outputs(graph_of(1), mine, reference)
    assert (found.error, found.where) == (0.25, "output 0")


def test_the_worst_output_is_named() -> None:
    mine = results(torch.tensor(1.0), torch.tensor([1.0, 3.0]), torch.tensor([1.1]))
    reference = results(torch.tensor(1.0), torch.tensor([1.0, 2.0]), torch.tensor([1.0]))
    found = compare_outputs(graph_of(3), mine, reference)
    assert (found.error, found.where) == (0.5, "output 1")


def test_compact_outputs_are_compared_at_their_rows() -> None:
    whole = torch.arange(12.0).reshape(2, 3, 2)
    rows = torch.tensor([[0, 2], [1, 2]])
    compact = torch.stack([whole[0, rows[0]], whole[1, rows[1]]])
    graph = graph_of(2, {1: 2})
    loss = torch.tensor(1.0)
    assert compare_outputs(graph, results(loss, compact, rows), results(loss, whole)).error == 0.0
    assert compare_outputs(graph, results(loss, compact, rows.flip(0)), results(loss, whole)).error > 0.1


@pytest.mark.parametrize(
    ("mine", "reference", "error"),
    [
        (torch.zeros(2), torch.zeros(2), 0.0),
        (torch.zeros(2, 0), torch.zeros(2, 0), 0.0),
        (torch.ones(2), torch.zeros(2), 1.0),
        (torch.ones(2), torch.ones(3), math.inf),
        (torch.tensor([math.inf]), torch.tensor([1.0]), math.inf),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), math.inf),  # ids and counts are equal, or wrong
        (torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool), math.inf),
    ],
)
def test_odd_outputs(mine: Tensor, reference: Tensor, error: float) -> None:
    assert compare_outputs(graph_of(1), results(mine), results(reference)).error == error


@pytest.mark.parametrize("other", [0.0, 7.0])
def test_a_nan_is_the_worst_of_all(other: float) -> None:
    mine = results(torch.tensor([other]), torch.tensor([math.nan]), torch.tensor([other]))
    reference = results(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0]))
    found = compare_outputs(graph_of(3), mine, reference)
    assert found.error == math.inf
    assert found.where == "output 1"
    a, b = (results(x=torch.tensor([v]), y=torch.tensor([1.0])) for v in (math.nan, 1.0))
    assert compare_gradients(a, b).where == "x"


def test_gradients_that_one_graph_lost_count_as_zero() -> None:
    reference = results(a=torch.tensor([2.0]), b=torch.tensor([0.0]))
    assert compare_gradients(results(a=torch.tensor([2.0])), reference).error == 0.0
    found = compare_gradients(results(b=torch.tensor([0.0])), reference)
    assert (found.error, found.where) == (1.0, "a")
    found = compare_gradients(results(a=torch.tensor([2.0]), c=torch.tensor([1.0])), reference)
    assert found.where == "c"
    assert found.error > 1e5


def test_gradients_far_below_the_largest_are_noise() -> None:
    """A key bias has no gradient but rounding."""
    reference = results(large=torch.tensor([100.0]), tiny=torch.tensor([1e-15]))
    found = compare_gradients(results(large=torch.tensor([100.0]), tiny=torch.tensor([-1e-15])), reference)
    assert found.error == pytest.approx(2e-15 / 1e-4)


# ------------------------------------------------------------------ runs


def test_runs_are_those_of_the_graph() -> None:
    found = captured("generation")
    plain, mine = Run.of(found.graph), run_rewritten(found.graph, torch.float64)
    assert torch.equal(mine.outputs[0], plain.outputs[0].detach())
    for name, gradient in mine.gradients.items():
        torch.testing.assert_close(gradient, plain.gradients[name], rtol=1e-13, atol=1e-13)
    assert not any(p.grad is not None for p in found.graph.graph_module.parameters())


@pytest.mark.slow
def test_a_float32_model_is_verified_in_float64() -> None:
    found = captured("understanding", dtype="float32")
    outcome = tg.verify(found.program, found.apply(site(0, 1), exact=True))
    assert outcome.dtype is torch.float64
    assert outcome.passed
    assert outcome.max_output_error < 1e-12
    assert outcome.capture_tolerance == 1e-4
    coarse = tg.verify(found.program, found.apply(site(0, 1), exact=True), dtype=torch.float32)
    assert coarse.passed
    assert 1e-9 < coarse.max_gradient_error < 1e-4


class Dropping(models.PreNorm):
    """Dropout between and inside attention, as in training."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)[:, None]
        x = x + F.scaled_dot_product_attention(h, h, h, is_causal=True, dropout_p=0.5 if self.training else 0.0)[:, 0]
        return x + F.dropout(self.mlp(self.norm2(x)), 0.5, self.training)


def test_dropout_is_left_out_of_the_comparison() -> None:
    spec = models.spec(Dropping)
    found = Captured.of(spec, "t")
    assert trains_with_dropout(found.graph.graph_module)
    accelerated = found.apply(site(0, 1), exact=True)
    outcome = tg.verify(found.program, accelerated)
    assert outcome.passed
    assert outcome.tasks["t"].capture_error == 0.0  # capture compares with the same seed
    assert not torch.equal(accelerated["t"](**spec.tasks["t"].inputs), accelerated["t"](**spec.tasks["t"].inputs))
    spec.model.eval()
    assert not trains_with_dropout(Captured.of(spec, "t").graph.graph_module)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = models.decoder(models.PreNorm)
        self.decoder.head = nn.Linear(4, models.VOCABULARY, bias=False).double()
        self.decoder.head.weight = self.decoder.tokens.weight


def tied_loss(model: Tied, ids: Tensor) -> Tensor:
    return models.embedded(model.decoder, ids)


def test_tied_weights_have_one_gradient() -> None:
    """That of both uses, under one name, as autograd gives it."""
    visual = tg.VisualTokens.ids(input="ids", equal=models.IMAGE_ID)
    model, ids = Tied(), models.image_ids()
    found = Captured.of(tg.ModelSpec(model, {"t": tg.Task(tied_loss, {"ids": ids}, visual=visual, reads="text")}), "t")
    (expected,) = torch.autograd.grad(tied_loss(model, ids), [model.decoder.tokens.weight])
    accelerated = found.apply(exact=True)
    for graph in (found.graph, accelerated.program["t"]):
        gradients = run_rewritten(graph, torch.float64).gradients
        names = [n for n in gradients if n in ("decoder.tokens.weight", "decoder.head.weight")]
        torch.testing.assert_close(sum(gradients[n] for n in names), expected, rtol=1e-12, atol=1e-12)
    assert tg.verify(found.program, found.apply(site(0, 1), exact=True)).passed


def test_the_oracle_leaves_random_numbers_alone() -> None:
    found = captured()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    run_oracle(found.graph, found.facts, found.sites(site(0, 1, 0.5, "random")), torch.float64)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_storage_cannot_be_verified() -> None:
    spec = models.spec(models.PreNorm)
    spec = tg.ModelSpec(spec.model.to("meta"), spec.tasks)
    found = Captured.of(spec, "t")
    with pytest.raises(VerificationError, match="on the meta device"):
        tg.verify(found.program, found.apply(site(0, 1)))


# ------------------------------------------------------------------ verdicts


GOOD = TaskVerification(1e-12, 1e-12, "output 0", "w", 1e-13, 0.0)


def verdict(**tasks: TaskVerification) -> Verification:
    return Verification(tasks, torch.float64, 1e-9, 1e-4)


def test_the_verdict_names_the_worst_first() -> None:
    bad = replace(GOOD, output_error=1e-3, gradient_error=0.5, worst_output="output 1", worst_parameter="head.weight")
    found = verdict(good=GOOD, bad=bad)
    assert not found.passed
    assert found.failures() == [
        "task 'bad': the gradient of head.weight differs from the oracle by 5.0e-01 (tolerance 1e-09)",
        "task 'bad': output 1 differs from the oracle by 1.0e-03 (tolerance 1e-09)",
    ]
    with pytest.raises(VerificationError, match=r"gradient of head.weight .* \(1 more\)"):
        found.raise_if_failed()
    assert (found.max_output_error, found.max_gradient_error) == (1e-3, 0.5)


@pytest.mark.parametrize("field", ["output_error", "gradient_error", "identity_error", "capture_error"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_every_error_counts(field: str, value: float) -> None:
    assert not verdict(t=replace(GOOD, **{field: value})).passed


def test_what_passes() -> None:
    assert verdict(t=GOOD).passed
    assert verdict(t=replace(GOOD, capture_error=None)).passed
    verdict(t=GOOD).raise_if_failed()


@pytest.mark.parametrize("which", ["compare_outputs", "compare_gradients"])
def test_an_identity_that_is_not_a_number_fails(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of outputs and gradients of the keep-all plan is NaN."""
    found = captured()
    accelerated = found.apply(site(0, 1))
    real, calls = getattr(judge, which), []

    def second_is_nan(*args: object) -> Difference:
        calls.append(args)
        return real(*args) if len(calls) == 1 else Difference(math.nan, "x")

    monkeypatch.setattr(judge, which, second_is_nan)
    assert not tg.verify(found.program, accelerated).passed

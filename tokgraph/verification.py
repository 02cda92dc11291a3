"""Verification: the accelerated program against the oracle, keep-all against the captured graph, capture against eager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .errors import VerificationError
from .facts import TaskFacts
from .passes.pipeline import Pipeline
from .passes.rewrite.pipeline import rewrite_passes
from .passes.verify import compare_gradients, compare_outputs, run_oracle, run_rewritten
from .passes.verify.interpret import trains_with_dropout
from .plan import Plan
from .program import Program, TaskGraph, is_meta
from .runtime import Accelerated
from .spec import split_outputs

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference that passes, by the type computed in."""
CAPTURE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference between the losses of the user's forward and of the captured graph, by the model's type."""


@dataclass(frozen=True)
class TaskVerification:
    """How far one task's graph is from its references; every error is relative, ``max |a - b| / max |b|``.

    Args:
        output_error: loss and outputs against the oracle, at the rows the graph returns.
        gradient_error: parameter gradients against the oracle.
        worst_output: the output leaf with the largest error.
        worst_parameter: the parameter with the largest error.
        identity_error: the plan with every keep ratio set to 1, against the captured graph (outputs and gradients).
        capture_error: the captured graph's loss against that of the user's forward; ``None`` with dropout.
    """

    output_error: float
    gradient_error: float
    worst_output: str
    worst_parameter: str
    identity_error: float
    capture_error: float | None


@dataclass(frozen=True)
class Verification:
    """The outcome for all tasks.

    Args:
        tasks: task -> errors.
        dtype: the type computed in.
        tolerance: the largest error that passes.
        capture_tolerance: the largest capture error that passes.
    """

    tasks: Mapping[str, TaskVerification]
    dtype: torch.dtype
    tolerance: float
    capture_tolerance: float

    @property
    def max_output_error(self) -> float:
        """Largest output error over tasks."""
        return max(t.output_error for t in self.tasks.values())

    @property
    def max_gradient_error(self) -> float:
        """Largest gradient error over tasks."""
        return max(t.gradient_error for t in self.tasks.values())

    @property
    def passed(self) -> bool:
        """Whether every error is within its tolerance."""
        return not self.failures()

    def failures(self) -> list[str]:
        """What failed, the worst first."""
        found: list[tuple[float, str]] = []
        for name, task in self.tasks.items():
            for error, limit, what in (
                (task.output_error, self.tolerance, f"{task.worst_output} differs from the oracle"),
                (
                    task.gradient_error,
                    self.tolerance,
                    f"the gradient of {task.worst_parameter} differs from the oracle",
                ),
                (task.identity_error, self.tolerance, "the plan with keep 1.0 differs from the captured graph"),
                (task.capture_error or 0.0, self.capture_tolerance, "the captured loss differs from the forward's"),
            ):
                if not error <= limit:  # a NaN fails as well
                    found.append((error / limit, f"task {name!r}: {what} by {error:.1e} (tolerance {limit:.0e})"))
        return [text for _, text in sorted(found, key=lambda item: -item[0] if item[0] == item[0] else -float("inf"))]

    def raise_if_failed(self) -> None:
        """Raise :class:`VerificationError` naming the worst offender, if anything failed."""
        failures = self.failures()
        if failures:
            more = f" ({len(failures) - 1} more)" if len(failures) > 1 else ""
            raise VerificationError(
                f"{failures[0]}{more}",
                help="please report this: a rewrite that is not refused must agree with the oracle",
            )


def verify(program: Program, accelerated: Accelerated, *, dtype: torch.dtype | None = None) -> Verification:
    """Compare an accelerated program with the oracle on the tasks' example batches: outputs, loss, all gradients.

    Args:
        program: the captured program that ``accelerated`` was made from.
        accelerated: the accelerated program.
        dtype: the type to compute in; default: float64, which tells a wrong rewrite from rounding.

    Raises:
        VerificationError: the model has no values to compare (it is on the meta device).
    """
    if is_meta(program.model):
        raise VerificationError(
            "the model is on the meta device, so there are no values to compare",
            help="build the model with storage, or skip verification (--no-verify) and verify a smaller size",
        )
    dtype = torch.float64 if dtype is None else dtype
    plan, facts = accelerated.plan, accelerated.facts
    tasks = {
        name: _verify_task(program[name], accelerated.program[name], facts[name], plan, program, dtype)
        for name in program
    }
    own = next((p.dtype for p in program.model.parameters() if p.is_floating_point()), torch.float32)
    return Verification(tasks, dtype, TOLERANCE[dtype], CAPTURE_TOLERANCE[own])


def _verify_task(
    captured: TaskGraph, rewritten: TaskGraph, facts: TaskFacts, plan: Plan, program: Program, dtype: torch.dtype
) -> TaskVerification:
    sites = plan.for_task(facts.name)
    mine, reference = run_rewritten(rewritten, dtype), run_oracle(captured, facts, sites, dtype)
    output, gradient = compare_outputs(rewritten, mine, reference), compare_gradients(mine, reference)
    everything = [replace(site, keep=1.0) for site in sites]
    kept = Pipeline(rewrite_passes(facts, everything, plan.exact)).run_task(captured)
    whole, plain = run_rewritten(kept, dtype), run_rewritten(captured, dtype)
    identity = max(compare_outputs(kept, whole, plain).error, compare_gradients(whole, plain).error)
    return TaskVerification(
        output.error, gradient.error, output.where, gradient.where, identity, _capture_error(captured, program)
    )


def _capture_error(graph: TaskGraph, program: Program) -> float | None:
    """Relative difference of the losses of the user's forward and of the captured graph."""
    if trains_with_dropout(graph.graph_module):
        return None
    task, inputs = graph.task, graph.example()
    with torch.no_grad():
        eager, _ = split_outputs(task.forward(program.model, **inputs))
        captured, _ = split_outputs(graph.unflatten(graph.graph_module(*graph.flatten(inputs))))
    return float((eager - captured).abs() / eager.abs().clamp_min(torch.finfo(eager.dtype).tiny))

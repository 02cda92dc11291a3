"""The outcome of verification, as data: errors by task, and what counts as failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokgraph.errors import VerificationError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference that passes, by the type computed in."""


@dataclass(frozen=True)
class TaskVerification:
    """How far one task's graph is from its references; every error is relative, ``max |a - b| / max |b|``.

    Args:
        output_error: loss and outputs against the oracle, at the rows the graph returns.
        gradient_error: parameter gradients against the oracle.
        worst_output: the output leaf with the largest error.
        worst_parameter: the parameter with the largest error.
        identity_error: the plan with every keep ratio set to 1, against the captured graph (outputs and gradients).
        capture_error: the captured graph against the user's forward, as capture compared them: loss, outputs, gradients,
            buffers (:class:`~tokgraph.ir.fidelity.CaptureCheck`); ``None`` where it could not.
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
                (task.capture_error or 0.0, self.capture_tolerance, "the captured graph differs from the forward"),
            ):
                if not error <= limit:  # a NaN fails as well
                    found.append((error / limit, f"task {name!r}: {what} by {error:.1e} (tolerance {limit:.0e})"))
        return [text for _, text in sorted(found, key=lambda item: -item[0] if item[0] == item[0] else -float("inf"))]

    def raise_if_failed(self) -> None:
        """Raise :class:`VerificationError` naming the worst offender, if anything failed."""
        raise_first(self.failures(), "please report this: a rewrite that is not refused must agree with the oracle")


def raise_first(failures: list[str], help: str) -> None:
    """Raise :class:`VerificationError` with the first failure and the number of others, if there is one."""
    if failures:
        more = f" ({len(failures) - 1} more)" if len(failures) > 1 else ""
        raise VerificationError(f"{failures[0]}{more}", help=help)

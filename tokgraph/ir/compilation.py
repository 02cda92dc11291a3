"""How a task's graph is to be compiled, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokgraph.errors import CompileError

from .verification import raise_first

By = Literal["graph", "block"]
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of ``torch.compile``."""


@dataclass(frozen=True)
class Compilation:
    """How the graphs of tasks are compiled.

    Args:
        mode: a mode of ``torch.compile`` (:data:`MODES`).
        by: ``"graph"``: each graph as a whole, the fastest step; ``"block"``: decoder blocks one by one, and equal ones once,
            so that the first step of a deep model does not wait for each of its blocks.
        backend: ``"inductor"``, the name of another backend of ``torch.compile``, or such a backend.

    Raises:
        CompileError: there is no such mode, or it cannot be compiled by that.
    """

    mode: str = "default"
    by: By = "graph"
    backend: str | Callable[..., Any] = "inductor"

    def __post_init__(self) -> None:
        for what, given, known in (("mode", self.mode, MODES), ("unit", self.by, get_args(By))):
            if given not in known:
                raise CompileError(f"no {what} of compilation is {given!r}", help=f"it is one of {', '.join(known)}")

    @property
    def title(self) -> str:
        """The backend's name, for messages."""
        return self.backend if isinstance(self.backend, str) else getattr(self.backend, "__name__", repr(self.backend))

    @classmethod
    def of(cls, asked: bool | str | Compilation) -> Compilation | None:
        """What ``compile=`` says: ``False`` not at all, ``True`` in the default mode, a mode, or all of it."""
        if isinstance(asked, Compilation):
            return asked
        if isinstance(asked, bool):
            return cls() if asked else None
        return cls(asked)


@dataclass(frozen=True)
class TaskCompilation:
    """One task's compiled graph against the same graph run operator by operator, over several steps.

    Args:
        seconds: the first step, compilation included.
        functions: different functions that were compiled.
        output_error: ``max |a - b| / max |b|`` of loss and outputs; ``None``: the graph draws random numbers (dropout), and
            compiled code draws others.
        gradient_error: the same of gradients.
        worst_output: the output with the largest error.
        worst_parameter: the parameter with the largest error.
    """

    seconds: float
    functions: int
    output_error: float | None = None
    gradient_error: float | None = None
    worst_output: str = ""
    worst_parameter: str = ""


@dataclass(frozen=True)
class CompilationCheck:
    """The outcome for all tasks.

    Args:
        tasks: task -> errors.
        tolerance: the largest error that passes: rounding in the model's type.
    """

    tasks: Mapping[str, TaskCompilation]
    tolerance: float

    def failures(self) -> list[str]:
        """What failed."""
        return [
            f"task {name!r}: {what} of the compiled graph differs by {error:.1e} (tolerance {self.tolerance:.0e})"
            for name, task in self.tasks.items()
            for error, what in (
                (task.output_error, task.worst_output),
                (task.gradient_error, f"the gradient of {task.worst_parameter}"),
            )
            if error is not None and not error <= self.tolerance  # a NaN fails as well
        ]

    def raise_if_failed(self) -> None:
        """Raise :class:`VerificationError`, if anything failed."""
        raise_first(
            self.failures(),
            "compiled code rounds elsewhere, not that much: please report it; without compile= the graph agrees with the "
            "oracle",
        )

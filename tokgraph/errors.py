"""Errors a user can act on: what happened, where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Where:
    """A place in the user's program.

    Args:
        node: name of the FX node.
        op: the operator the node calls, as ``aten.conv1d.default``.
        module: module path, as ``language_model.layers.3.self_attn``.
        source: ``file:line`` of the innermost line of the model's code, when export kept one.
        caller: ``file:line`` of the user's own code that led there, where ``source`` is in an installed library.
    """

    node: str | None = None
    op: str | None = None
    module: str | None = None
    source: str | None = None
    caller: str | None = None

    def lines(self) -> list[str]:
        """The ``-->`` lines of a diagnostic, one fact a line."""
        facts = [
            ("source", self.source or ("not recorded by torch.export" if self.node else None)),
            ("called from", self.caller),
            ("module", self.module),
            ("node", f"{self.node} = {self.op}" if self.node and self.op else self.node),
        ]
        return [f"  --> {name}: {value}" for name, value in facts if value]


class TokgraphError(Exception):
    """Base of every error that a user's input or model can cause.

    Args:
        message: what happened, in one sentence.
        where: the place in the user's program, when there is one.
        help: what the user can do.
    """

    code = "TG000"

    def __init__(self, message: str, *, where: Where | None = None, help: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.help = help

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        if self.where is not None:
            lines += self.where.lines()
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)


class LoadError(TokgraphError):
    """The model file cannot be loaded, or does not define a usable ``build`` function."""

    code = "TG001"


class SpecError(TokgraphError):
    """A :class:`tokgraph.ModelSpec` or :class:`tokgraph.Task` is inconsistent."""

    code = "TG002"


class CaptureError(TokgraphError):
    """A task's forward cannot be captured by ``torch.export``."""

    code = "TG003"


class AnalysisError(TokgraphError):
    """The captured graph does not show the structure that tokgraph needs."""

    code = "TG004"


class PlanError(TokgraphError):
    """A plan, a policy option or a plan file is invalid."""

    code = "TG005"


class IllegalRewriteError(TokgraphError):
    """A rewrite cannot be shown legal, so it is refused."""

    code = "TG006"


class BatchError(TokgraphError):
    """A batch does not fit the shape of the batch that the plan was made for."""

    code = "TG007"


class VerificationError(TokgraphError):
    """The rewritten program disagrees with the oracle."""

    code = "TG008"


class ExportError(TokgraphError):
    """A graph cannot be exported, or the exported one disagrees with the program."""

    code = "TG009"


class DependencyError(TokgraphError):
    """A package or device that a command needs is missing, or not usable."""

    code = "TG010"


class FileError(TokgraphError):
    """A saved program was changed, is incomplete, or was written by another version."""

    code = "TG011"


class StaleError(TokgraphError):
    """The model is no longer the one that was captured, in a way that the graphs cannot follow."""

    code = "TG012"


class CompileError(TokgraphError):
    """A task's graph cannot be compiled."""

    code = "TG013"


class InternalError(Exception):
    """A broken invariant inside tokgraph: a bug of ours, never the user's."""

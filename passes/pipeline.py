"""The pass contract, and the pipeline that runs passes over every task of a program."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from tokgraph.errors import InternalError, TokgraphError
from tokgraph.ir.program import Program, TaskGraph

Numerics = Literal["exact", "approximate"]


class GraphPass(PassBase):
    """A pass over one task graph; subclasses are frozen dataclasses whose fields are their options.

    A pass with a field ``task`` runs on that task's graph only.

    Class attributes:
        name: the pass's name in diagnostics, deltas and documentation.
        numerics: ``"exact"``: outputs and gradients stay equal beyond rounding; ``"approximate"``: they may not.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics] = "exact"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Check the precondition on the graph, run, check the postcondition on the *result*."""
        self.requires(graph_module)
        result = self.call(graph_module)
        if result is None:
            raise InternalError(f"pass {self.name} returned no result")
        self.ensures(result.graph_module)
        return result

    @abc.abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Edit ``graph_module`` in place and say whether anything changed."""


@dataclass(frozen=True)
class PassDelta:
    """What one pass did to one task's graph."""

    task: str
    name: str
    modified: bool
    nodes_before: int
    nodes_after: int


Observer = Callable[[PassDelta, TaskGraph], None]
Pass = Callable[[fx.GraphModule], PassResult | None]


def validate(module: nn.Module) -> None:
    """Check what every pass must leave behind.

    Raises:
        InternalError: the graph is malformed, or a tensor node lost its fake value.
    """
    assert isinstance(module, fx.GraphModule)
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise InternalError(f"malformed graph: {error}") from error
    missing = [n.name for n in module.graph.nodes if n.op == "call_function" and n.users and "val" not in n.meta]
    if missing:
        raise InternalError(f"nodes without a value: {', '.join(missing[:5])}")


@dataclass(frozen=True)
class Pipeline:
    """Runs passes, in order, over every task of a program.

    Args:
        passes: :class:`GraphPass` instances, or any callable ``GraphModule -> PassResult | None``.
        observer: called after every pass with its :class:`PassDelta` and the task graph.
        check: validate the graph after every pass.
    """

    passes: Sequence[Pass]
    observer: Observer | None = None
    check: bool = True

    def run(self, program: Program) -> Program:
        """The program with the passes applied to copies of its graphs.

        Raises:
            TokgraphError: as a pass raises it.
            InternalError: a pass broke the graph; the message names it and those that ran before.
        """
        return program.replacing({name: self.run_task(graph) for name, graph in program.items()})

    def run_task(self, graph: TaskGraph) -> TaskGraph:
        """One task's graph with the passes for it applied to a copy."""
        edited = graph.copy()
        chosen = [p for p in self.passes if getattr(p, "task", None) in (None, graph.name)]
        manager = PassManager([self._observed(p, edited) for p in chosen], run_checks_after_each_pass=self.check)
        manager.add_checks(validate)
        try:
            module = manager(edited.graph_module).graph_module
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, TokgraphError):
                cause = cause.__cause__
            if cause is not None:
                raise cause from None
            raise InternalError(f"task {graph.name}: {error}: {error.__cause__}") from error
        assert isinstance(module, fx.GraphModule)
        return replace(edited, graph_module=module)

    def _observed(self, function: Pass, graph: TaskGraph) -> Pass:
        def run(module: fx.GraphModule) -> PassResult:
            before = len(module.graph.nodes)
            result = function(module)
            if result is None:  # plain fx passes may edit in place and return nothing
                result = PassResult(module, True)
            if self.observer is not None:
                delta = PassDelta(
                    graph.name, pass_name(function), result.modified, before, len(result.graph_module.graph.nodes)
                )
                self.observer(delta, replace(graph, graph_module=result.graph_module))
            return result

        run.__name__ = pass_name(function)
        return run


def pass_name(function: Pass) -> str:
    """A pass's name: its ``name`` attribute, or what Python calls it."""
    return str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))

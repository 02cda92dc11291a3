"""The pipeline: it runs passes, one after another, over every task of a program, and checks what each leaves behind."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from tokgraph.errors import InternalError, TokgraphError
from tokgraph.ir.collector import collector_paused
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.printer import operator_name
from tokgraph.ir.program import Program, TaskGraph

from .contract import Numerics, Pass, pass_name, run_pass


@dataclass(frozen=True)
class PassDelta:
    """What one pass did to one task's graph.

    Args:
        task: the task.
        name: the pass.
        modified: whether the graph is another one than before.
        nodes_before: nodes of the graph before.
        nodes_after: nodes after.
        operators: operator -> calls more than before (negative: fewer), of those whose number changed, by name.
        numerics: what the pass says of itself; ``None``: it is no :class:`~tokgraph.passes.GraphPass` and does not say.
        seconds: how long it took, without the checks after it.
    """

    task: str
    name: str
    modified: bool
    nodes_before: int
    nodes_after: int
    operators: Mapping[str, int] = field(default_factory=dict)
    numerics: Numerics | None = None
    seconds: float = field(default=0.0, compare=False)


Observer = Callable[[PassDelta, TaskGraph], None]


def validate(module: fx.GraphModule) -> None:
    """Check what every pass must leave behind.

    Raises:
        InternalError: the graph is malformed, or a value that is used lost its fake value.
    """
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
        passes: :class:`~tokgraph.passes.GraphPass` instances, or any callable ``GraphModule -> PassResult | None``.
        observer: called after every pass with its :class:`PassDelta` and the task graph.
        check: validate the graph after every pass.
        stop_after: name of a pass: on a task that it runs on, no pass runs after it.
    """

    passes: Sequence[Pass]
    observer: Observer | None = None
    check: bool = True
    stop_after: str | None = None

    def run(self, program: Program, facts: Mapping[str, TaskFacts] | None = None) -> Program:
        """The program with the passes applied to copies of its graphs.

        Args:
            program: the program.
            facts: the facts of its tasks, for passes that need them.

        Raises:
            TokgraphError: as a pass raises it.
            InternalError: a pass broke the graph; the message names it and those that ran before.
        """
        known = facts or {}
        return program.replacing({name: self.run_task(graph, known.get(name)) for name, graph in program.items()})

    @collector_paused()
    def run_task(self, graph: TaskGraph, facts: TaskFacts | None = None) -> TaskGraph:
        """One task's graph with the passes for it applied to a copy."""
        edited = graph.copy()
        ran: list[str] = []
        for function in self._chosen(graph.name):
            try:
                edited = self._step(function, edited, facts)
            except TokgraphError:
                raise
            except Exception as error:
                what = str(error) if isinstance(error, InternalError) else f"{type(error).__name__}: {error}"
                raise InternalError(
                    f"task {graph.name}: pass {pass_name(function)}: {what} (ran before: {', '.join(ran) or 'none'})"
                ) from error
            ran.append(pass_name(function))
        if self.observer is None:
            edited.graph_module.recompile()
        return edited

    def _chosen(self, task: str) -> Iterator[Pass]:
        mine = [p for p in self.passes if getattr(p, "task", None) in (None, task)]
        ends = [i for i, p in enumerate(mine, 1) if pass_name(p) == self.stop_after]
        return iter(mine[: ends[-1]] if ends else mine)

    def _step(self, function: Pass, graph: TaskGraph, facts: TaskFacts | None) -> TaskGraph:
        before = _operators(graph.graph) if self.observer is not None else Counter()
        start = time.perf_counter()
        # Nobody calls what lies between passes, unless someone looks at it; code of a deep graph takes long to write.
        result = run_pass(function, graph.graph_module, facts, recompile=self.observer is not None)
        seconds = time.perf_counter() - start
        if self.check:
            validate(result.graph_module)
        graph = replace(graph, graph_module=result.graph_module)
        if self.observer is not None:
            self.observer(_delta(function, result, before, graph, seconds), graph)
        return graph


def _operators(graph: fx.Graph) -> Counter[str]:
    return Counter(operator_name(n.target) if n.op == "call_function" else n.op for n in graph.nodes)


def _delta(function: Pass, result: PassResult, before: Counter[str], graph: TaskGraph, seconds: float) -> PassDelta:
    after = _operators(graph.graph)
    changed = {name: after[name] - before[name] for name in sorted(before | after) if after[name] != before[name]}
    numerics = getattr(function, "numerics", None)
    return PassDelta(
        graph.name, pass_name(function), result.modified, before.total(), after.total(), changed, numerics, seconds
    )

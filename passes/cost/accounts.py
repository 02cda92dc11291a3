"""A task's pathways and costs, each worked out when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from tokgraph.ir.cost import TaskCost
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.program import TaskGraph

from .as_run import as_run
from .attribution import task_cost
from .pathways import lean_graph, pathways


class GraphAccounts:
    """Pathways and costs of a captured graph (:class:`tokgraph.ir.facts.Accounts`).

    Args:
        graph: the captured graph.
        facts: the task's other facts.
    """

    def __init__(self, graph: TaskGraph, facts: TaskFacts) -> None:
        self._captured = graph
        self._facts = facts

    @cached_property
    def profile(self) -> Mapping[str, float]:
        """Parameter name -> share of the visual tokens that it transforms."""
        return pathways(self._lean, self._facts).profile

    @cached_property
    def cost(self) -> TaskCost:
        """What a training step costs."""
        return task_cost(self._graph, self._facts)

    @cached_property
    def exact_cost(self) -> TaskCost:
        """What it costs without work that no demanded output reads."""
        return task_cost(self._lean, self._facts)

    @cached_property
    def _lean(self) -> TaskGraph:
        return as_run(lean_graph(self._captured, self._facts))

    @cached_property
    def _graph(self) -> TaskGraph:
        return as_run(self._captured)

"""Analysis: the facts of every task of a program."""

from __future__ import annotations

from dataclasses import replace

from .cost import TaskCost
from .facts import Facts
from .passes.analysis.attribution import task_cost
from .passes.analysis.facts import task_facts
from .passes.analysis.pathways import lean_graph, pathways
from .program import Program


def analyze(program: Program) -> Facts:
    """Analyse a captured program: visual flow, blocks, attention, demand and pathway profile of each task, and cost.

    Raises:
        AnalysisError: a task shows no residual stream with attention, or its visual tokens cannot be found.
    """
    facts = {}
    for name, graph in program.items():
        found = task_facts(graph)
        lean = lean_graph(graph, found)
        facts[name] = replace(
            found,
            profile=pathways(lean, found).profile,
            cost=task_cost(graph, found),
            exact_cost=task_cost(lean, found),
        )
    return Facts(facts)


def costs(program: Program, facts: Facts) -> dict[str, TaskCost]:
    """The cost of every task of a program, captured or rewritten: before and after a plan.

    Args:
        program: a captured program, or the ``program`` of an :class:`~tokgraph.Accelerated`.
        facts: facts of the captured program.

    Returns:
        Task -> cost, symbolic; that of a rewritten graph is known for the visual tokens of the example batch only.
    """
    return {name: task_cost(graph, facts[name]) for name, graph in program.items()}

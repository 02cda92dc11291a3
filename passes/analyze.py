"""Analysis of a program: the facts of its tasks, and the places of its nodes."""

from __future__ import annotations

from dataclasses import replace

from tokgraph.ir.facts import Facts, TaskFacts
from tokgraph.ir.program import Program, TaskGraph
from tokgraph.passes.analysis.structure import task_facts
from tokgraph.passes.cost.accounts import GraphAccounts
from tokgraph.passes.lower.places import mark_places


def analyze(program: Program) -> Facts:
    """Analyse a captured program: visual flow, blocks, attention and demand of each task; pathways and costs on demand.

    Every node of the program learns its place: module, block and kind of work.

    Raises:
        AnalysisError: a task shows no residual stream with attention, or its visual tokens cannot be found.
    """
    return Facts({name: _analyze(graph) for name, graph in program.items()}, program)


def _analyze(graph: TaskGraph) -> TaskFacts:
    found = task_facts(graph)
    mark_places(graph, found)
    return replace(found, accounts=GraphAccounts(graph, found))

"""Analysis: the facts of every task of a program."""

from __future__ import annotations

from dataclasses import replace

from .facts import Facts, TaskFacts
from .passes.analysis.attribution import task_cost
from .passes.analysis.facts import task_facts
from .passes.analysis.pathways import Pathways, lean_graph, pathways
from .program import Program, TaskGraph


def analyze(program: Program) -> Facts:
    """Analyse a captured program: visual flow, blocks, attention, demand and pathway profile of each task, and cost.

    Raises:
        AnalysisError: a task shows no residual stream with attention, or its visual tokens cannot be found.
    """
    facts = {}
    for name, graph in program.items():
        found = task_facts(graph)
        profile = demanded_pathways(graph, found).profile
        facts[name] = replace(found, profile=profile, cost=task_cost(graph, found))
    return Facts(facts)


def demanded_pathways(graph: TaskGraph, facts: TaskFacts) -> Pathways:
    """Pathways of a captured graph without the work that no demanded output reads."""
    return pathways(lean_graph(graph, facts), facts)

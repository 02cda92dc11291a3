"""Analysis: the facts of every task of a program."""

from __future__ import annotations

from dataclasses import replace

from .facts import Facts, TaskFacts
from .passes.analysis.facts import task_facts
from .passes.analysis.pathways import Pathways, pathways
from .passes.pipeline import Pipeline
from .passes.rewrite import Sink
from .passes.rewrite.pipeline import seeds
from .program import Program, TaskGraph


def analyze(program: Program) -> Facts:
    """Analyse a captured program: visual flow, blocks, attention, demand and pathway profile of each task.

    Raises:
        AnalysisError: a task shows no residual stream with attention, or its visual tokens cannot be found.
    """
    facts = {}
    for name, graph in program.items():
        found = task_facts(graph)
        facts[name] = replace(found, profile=demanded_pathways(graph, found).profile)
    return Facts(facts)


def demanded_pathways(graph: TaskGraph, facts: TaskFacts) -> Pathways:
    """Pathways of a captured graph without the work that no demanded output reads."""
    return pathways(Pipeline([*seeds(facts, (), exact=True), Sink()]).run_task(graph), facts)

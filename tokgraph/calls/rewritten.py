"""A plan applied to a captured program, first of all or again for another capture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tokgraph.ir.conditions import Autocast
from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import Plan
from tokgraph.ir.program import Program, TaskGraph, model_device
from tokgraph.ir.spec import ModelSpec
from tokgraph.passes.analyze import analyze
from tokgraph.passes.capture.autocast import in_autocast
from tokgraph.passes.capture.export import capture
from tokgraph.passes.lower.places import mark_places
from tokgraph.passes.pipeline import Observer, Pipeline
from tokgraph.passes.rewrite.realise import rewrite_passes
from tokgraph.planning.check import check_plan


def rewritten(facts: Facts, plan: Plan, observer: Observer | None = None, stop_after: str | None = None) -> Program:
    """The program with a plan applied, its places marked.

    Args:
        facts: facts of the captured program.
        plan: a plan that was checked against them.
        observer: called after every pass.
        stop_after: name of the last pass to run.
    """
    passes = [p for name in facts.program for p in rewrite_passes(facts[name], plan.for_task(name), plan.exact)]
    with in_autocast(None, model_device(facts.program.model).type):  # the graphs hold the casts of their own regions
        program = Pipeline(passes, observer, stop_after=stop_after).run(facts.program, facts)
    if stop_after is None:
        for name, graph in program.items():
            mark_places(graph, facts[name])
    return program


def task_anew(spec: ModelSpec, name: str, plan: Plan, autocast: Autocast | None, leaves: Sequence[Any]) -> TaskGraph:
    """A task captured again, for the model as it is now, with the plan's sites for it.

    Args:
        spec: the model and its tasks.
        name: the task's name.
        plan: the plan of all tasks.
        autocast: the region to capture in.
        leaves: leaves of the inputs of a call, whose types the example batch gets: the model's may have changed.

    Raises:
        TokgraphError: the model as it is now cannot be captured, or the plan does not fit it.
    """
    task = spec.tasks[name]
    example, structure = pytree.tree_flatten(dict(task.inputs))
    alike = [
        x.to(leaf.dtype)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and isinstance(leaf, torch.Tensor)
        else x
        for x, leaf in zip(example, leaves[: len(example)], strict=True)  # behind them is what is precomputed
    ]
    task = replace(task, inputs=pytree.tree_unflatten(alike, structure))
    facts = analyze(capture(ModelSpec(spec.model, {name: task}), autocast=autocast))
    mine = replace(plan, sites=tuple(site for site in plan.sites if site.task == name))
    return rewritten(facts, check_plan(mine, facts))[name]

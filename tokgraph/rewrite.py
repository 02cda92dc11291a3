"""Rewriting: a plan applied to a captured program."""

from __future__ import annotations

from .analyze import analyze
from .facts import Facts
from .passes.pipeline import Observer, Pipeline
from .passes.rewrite.pipeline import rewrite_passes
from .plan import Plan
from .planning import check_plan
from .program import Program
from .runtime import Accelerated


def apply(program: Program, plan: Plan, *, facts: Facts | None = None, observer: Observer | None = None) -> Accelerated:
    """Apply a plan; the captured program stays as it is.

    Args:
        program: the captured program.
        plan: the plan.
        facts: facts of the program, when they are known already.
        observer: called after every pass.

    Raises:
        PlanError: the plan does not fit the program.
        IllegalRewriteError: a block in a span mixes tokens in a way that rules out dropping them.
    """
    facts = analyze(program) if facts is None else facts
    plan = check_plan(plan, facts)
    passes = [p for name in program for p in rewrite_passes(facts[name], plan.for_task(name), plan.exact)]
    return Accelerated(Pipeline(passes, observer).run(program), program, plan, facts)

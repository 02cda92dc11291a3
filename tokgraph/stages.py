"""The stages in order: capture, analyse, plan, rewrite, verify, report; and all of them in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tokgraph.ir.compilation import Compilation
from tokgraph.ir.cost import TaskCost
from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import Plan, Ragged
from tokgraph.ir.program import Program
from tokgraph.ir.rates import Rates
from tokgraph.ir.spec import ModelSpec
from tokgraph.passes.analyze import analyze
from tokgraph.passes.capture.export import CLEANUPS, IN_AUTOCAST, capture
from tokgraph.passes.cost.attribution import task_cost
from tokgraph.passes.pipeline import Observer
from tokgraph.passes.rewrite.realise import REWRITE
from tokgraph.planning.check import check_plan, with_ragged

from .calls.rewritten import rewritten
from .errors import PlanError
from .measurement import program_rates
from .planning import Policy, policy
from .report import make_report
from .runtime import Accelerated
from .verification import verify as run_verification
from .verification import verify_compiled

Progress = Callable[[str], None]
__all__ = ["PASSES", "STAGES", "Progress", "analyze", "apply", "capture", "costs", "make_plan", "optimize", "run_until"]

STAGES = ("capture", "analyse", "plan", "rewrite", "verify", "compile", "report")
PASSES = tuple(found.name for found in (*CLEANUPS, *IN_AUTOCAST, *REWRITE))
"""Names of the passes that the stages run, in order: those of ``capture``, then those of ``rewrite``."""


def facts_of(program: Program | Facts, facts: Facts | None) -> Facts:
    """The facts that a stage is given: themselves, those given beside a program, or those of a new analysis of it."""
    if isinstance(program, Facts):
        if facts is not None:
            raise TypeError("facts know their program: give them once")
        return program
    return analyze(program) if facts is None else facts.of(program)


def costs(program: Program, facts: Facts) -> dict[str, TaskCost]:
    """The cost of every task of a program, captured or rewritten: before and after a plan.

    Args:
        program: a captured program, or the ``program`` of an :class:`~tokgraph.Accelerated`.
        facts: facts of the captured program.

    Returns:
        Task -> cost, symbolic; that of a rewritten graph is known for the visual tokens of the example batch only.
    """
    return {name: task_cost(graph, facts[name]) for name, graph in program.items()}


def make_plan(
    program: Facts | Program,
    policy: str | Policy = "shared",
    *,
    facts: Facts | None = None,
    ragged: Ragged = "min",
    **options: Any,
) -> Plan:
    """Plan with a policy.

    Args:
        program: facts of a captured program, or the program, which is then analysed.
        policy: a policy's name, or a policy.
        facts: facts of the program, when they are known already.
        ragged: what all sites do where samples hold different numbers of visual tokens (:class:`tokgraph.DropSite`).
        options: options of the named policy.

    Raises:
        PlanError: no such policy or option, or the policy cannot plan for this model.
    """
    facts = facts_of(program, facts)
    chosen = _named(policy, options)
    if ragged != "min" and "ragged" in chosen.options():
        chosen = replace(chosen, ragged=ragged)  # type: ignore[type-var]
    return check_plan(with_ragged(chosen.plan(facts), ragged), facts)


def _named(name: str | Policy, options: dict[str, Any]) -> Policy:
    if isinstance(name, Policy):
        if options:
            raise PlanError("options go with a policy's name; a Policy object holds its own")
        return name
    return policy(name, **options)


def apply(
    program: Facts | Program, plan: Plan, *, facts: Facts | None = None, observer: Observer | None = None
) -> Accelerated:
    """Apply a plan; the captured program stays as it is.

    Args:
        program: facts of a captured program, or the program, which is then analysed.
        plan: the plan.
        facts: facts of the program, when they are known already.
        observer: called after every pass.

    Raises:
        PlanError: the plan does not fit the program.
        IllegalRewriteError: a block in a span mixes tokens in a way that rules out dropping them.
    """
    facts = facts_of(program, facts)
    plan = check_plan(plan, facts)
    return Accelerated(rewritten(facts, plan, observer), plan, facts)


def optimize(
    spec: ModelSpec,
    policy: str | Policy | Plan = "shared",
    *,
    verify: bool = True,
    compile: bool | str | Compilation = False,
    rates: Rates | bool = False,
    progress: Progress | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Accelerated:
    """Capture a model, thin it by a policy, and prove the result against the oracle.

    Args:
        spec: the model and its tasks.
        policy: a policy's name, a policy, or a plan.
        verify: compare with the oracle, and compiled graphs with those; a disagreement raises.
        compile: ``True``, a mode of ``torch.compile`` (``"reduce-overhead"``, ``"max-autotune"``), or a
            :class:`tokgraph.Compilation`: as :meth:`Accelerated.compile` does.
        rates: of the machine to train on, for the speed-up that the report promises; ``True`` measures those of the model's
            device (:func:`tokgraph.measure_rates`), in a second.
        progress: called with each stage's name (:data:`STAGES`) before it begins.
        observer: called after every pass.
        options: options of the named policy (``span``, ``keep``, ...).

    Returns:
        The accelerated program, with ``plan``, ``report`` and ``verification``.

    Raises:
        TokgraphError: a stage refused the model, the plan or the result.
    """
    tell = progress or (lambda stage: None)
    tell("capture")
    how = Compilation.of(compile)
    facts, plan = _planned(capture(spec, observer=observer), policy, tell, options)
    tell("rewrite")
    accelerated = apply(facts, plan, observer=observer)
    if verify:
        tell("verify")
        accelerated.verification = run_verification(accelerated)
        accelerated.verification.raise_if_failed()
    if how is not None:
        tell("compile")
        accelerated.compile(how)
    if how is not None and verify:
        accelerated.compilation_check = verify_compiled(accelerated)
        accelerated.compilation_check.raise_if_failed()
    tell("report")
    if rates is True:
        rates = program_rates(accelerated.program)
    accelerated.report = make_report(accelerated, rates or None)
    return accelerated


def run_until(
    spec: ModelSpec,
    last: str,
    policy: str | Policy | Plan = "shared",
    *,
    progress: Progress | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Program:
    """As :func:`optimize`, but no further than one pass: the graphs as it leaves them.

    Args:
        spec: the model and its tasks.
        last: name of the pass (:data:`PASSES`). A task that it does not run on gets all passes of its stage.
        policy: a policy's name, a policy, or a plan; not looked at where the pass is one of capture.
        progress: called with each stage's name before it begins.
        observer: called after every pass.
        options: options of the named policy.

    Raises:
        PlanError: no stage runs a pass of that name.
        TokgraphError: a stage refused the model or the plan.
    """
    if last not in PASSES:
        raise PlanError(f"no stage runs a pass that is named {last!r}", help=f"the passes are {', '.join(PASSES)}")
    tell = progress or (lambda stage: None)
    tell("capture")
    if last in {cleanup.name for cleanup in (*CLEANUPS, *IN_AUTOCAST)}:
        return capture(spec, observer=observer, stop_after=last)
    facts, plan = _planned(capture(spec, observer=observer), policy, tell, options)
    tell("rewrite")
    return rewritten(facts, plan, observer, last)


def _planned(
    program: Program, policy: str | Policy | Plan, tell: Progress, options: dict[str, Any]
) -> tuple[Facts, Plan]:
    """The stages between capture and rewrite."""
    tell("analyse")
    facts = analyze(program)
    tell("plan")
    if not isinstance(policy, Plan):
        return facts, make_plan(facts, policy, **options)
    if options:
        raise PlanError(f"a plan takes no options, such as {next(iter(options))}", help="options go with policies")
    return facts, check_plan(policy, facts)

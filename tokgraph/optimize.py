"""The whole path: capture, analyse, plan, rewrite, verify, report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .analyze import analyze
from .capture import capture
from .errors import PlanError
from .passes.pipeline import Observer
from .plan import Plan
from .planning import check_plan, make_plan
from .policies import Policy
from .report import make_report
from .rewrite import apply
from .runtime import Accelerated
from .spec import ModelSpec
from .verification import verify as run_verification

Progress = Callable[[str], None]
STAGES = ("capture", "analyse", "plan", "rewrite", "verify", "report")


def optimize(
    spec: ModelSpec,
    policy: str | Policy | Plan = "shared",
    *,
    verify: bool = True,
    progress: Progress | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Accelerated:
    """Capture a model, thin it by a policy, and prove the result against the oracle.

    Args:
        spec: the model and its tasks.
        policy: a policy's name, a policy, or a plan.
        verify: compare with the oracle; a disagreement raises.
        progress: called with each stage's name (:data:`STAGES`) before it begins.
        observer: called after every rewrite pass.
        options: options of the named policy, and ``ragged`` (:func:`tokgraph.make_plan`).

    Returns:
        The accelerated program, with ``plan``, ``facts``, ``verification`` and ``report``.

    Raises:
        TokgraphError: a stage refused the model, the plan or the result.
    """
    tell = progress or (lambda stage: None)
    tell("capture")
    program = capture(spec)
    tell("analyse")
    facts = analyze(program)
    tell("plan")
    if isinstance(policy, Plan):
        if options:
            raise PlanError(f"a plan takes no options, such as {next(iter(options))}", help="options go with policies")
        plan = check_plan(policy, facts)
    else:
        plan = make_plan(program, policy, facts=facts, **options)
    tell("rewrite")
    accelerated = apply(program, plan, facts=facts, observer=observer)
    if verify:
        tell("verify")
        accelerated.verification = run_verification(program, accelerated)
        accelerated.verification.raise_if_failed()
    tell("report")
    accelerated.report = make_report(program, accelerated)
    return accelerated

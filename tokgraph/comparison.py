"""Policies side by side on one model, and plans side by side: plain data for tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import DropSite, Plan, Ragged
from tokgraph.ir.program import is_meta
from tokgraph.ir.spec import ModelSpec
from tokgraph.passes.capture.export import capture
from tokgraph.planning.search import checked_mix
from tokgraph.report.report import make_report, ratio
from tokgraph.verification.judge import verify as run_verification

from .errors import TokgraphError
from .planning import Policy
from .stages import Progress, analyze, apply, make_plan

SCHEMA = 1


def compare(
    spec: ModelSpec,
    policies: Sequence[str | Policy | Plan],
    *,
    mix: Mapping[str, float] | None = None,
    ragged: Ragged = "min",
    verify: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What each policy does to one model, captured once.

    Args:
        spec: the model and its tasks.
        policies: names, policies or plans.
        mix: task -> weight of its training step in the mixed ratio; default: all alike.
        ragged: what the policies' sites do where samples hold different numbers of visual tokens.
        verify: compare each result with the oracle, where the model has values.
        progress: called with what is done next.

    Returns:
        Schema 1: ``{"schema", "mix", "rows": [...]}``, a row a policy: FLOPs ratio by task and mixed, activation bytes
        ratio, sharing index, coverage, new parameters, whether it was verified; a policy that refuses the model has its
        ``error`` instead.

    Raises:
        TokgraphError: the model cannot be captured or analysed, or the mix does not weigh its tasks.
    """
    tell = progress or (lambda stage: None)
    tell("capture")
    program = capture(spec)
    tell("analyse")
    facts = analyze(program)
    weights = checked_mix(facts, mix)
    rows = []
    for policy in policies:
        label = policy if isinstance(policy, str) else getattr(policy, "name", getattr(policy, "policy", "plan"))
        tell(label)
        try:
            rows.append({"policy": label, **_row(facts, policy, weights, ragged, verify)})
        except TokgraphError as error:
            rows.append({"policy": label, "error": error.message})
    return {"schema": SCHEMA, "mix": weights, "rows": rows}


def _row(
    facts: Facts,
    policy: str | Policy | Plan,
    weights: Mapping[str, float],
    ragged: Ragged,
    verify: bool,
) -> dict[str, Any]:
    plan = policy if isinstance(policy, Plan) else make_plan(facts, policy, ragged=ragged)
    accelerated = apply(facts, plan)
    if verify and not is_meta(accelerated.model):
        accelerated.verification = run_verification(accelerated)
    report = make_report(accelerated)
    tasks = report["tasks"]
    return {
        "flops_ratio": {name: task["flops"]["ratio"] for name, task in tasks.items()},
        "mixed_flops_ratio": _mixed(tasks, weights, "flops", "total"),
        "activation_ratio": _mixed(tasks, weights, "activation_bytes", None),
        "sharing_index": report["sharing_index"],
        "coverage": report["coverage"],
        "new_parameters": report["new_parameters"],
        "verified": report["verification"]["passed"],
    }


def _mixed(tasks: Mapping[str, Any], weights: Mapping[str, float], what: str, part: str | None) -> float:
    def amount(task: str, when: str) -> float:
        found = tasks[task][what][when]
        return float(found if part is None else found[part])

    after, before = (sum(w * amount(t, when) for t, w in weights.items()) for when in ("after", "before"))
    return ratio(after, before)


def diff(a: Plan, b: Plan) -> dict[str, Any]:
    """How two plans differ.

    Returns:
        ``{"only_a": sites, "only_b": sites, "common": sites, "fields": {name: [in a, in b]}}``.
    """
    mine, others = Counter(a.sites), Counter(b.sites)
    fields = {
        name: [getattr(a, name), getattr(b, name)]
        for name in ("exact", "policy", "options")
        if getattr(a, name) != getattr(b, name)
    }
    return {
        "only_a": _sites(mine - others),
        "only_b": _sites(others - mine),
        "common": _sites(mine & others),
        "fields": fields,
    }


def _sites(sites: Counter[DropSite]) -> list[dict[str, Any]]:
    return [asdict(site) for site in sorted(sites.elements(), key=lambda s: (s.task, s.start, -(s.end or 0), repr(s)))]

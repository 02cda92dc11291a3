"""The report of an accelerated program: what it costs, what it shares, and how it was verified, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tokgraph.ir.compilation import CompilationCheck
from tokgraph.ir.cost import Work
from tokgraph.ir.facts import Facts
from tokgraph.ir.names import copied_name
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.rates import Rates
from tokgraph.ir.verification import Verification
from tokgraph.passes.cost.as_run import as_run
from tokgraph.passes.cost.attribution import task_cost
from tokgraph.passes.cost.moves import drop_overhead
from tokgraph.passes.cost.pathways import Pathways, coverage, pathways, sharing_index
from tokgraph.passes.cost.peak import peak_memory
from tokgraph.passes.cost.roofline import roofline, seconds_by_bound
from tokgraph.passes.cost.works import count_nodes
from tokgraph.passes.pipeline import Pipeline
from tokgraph.passes.rewrite.realise import rewrite_passes
from tokgraph.runtime import Accelerated

SCHEMA = 1


def make_report(accelerated: Accelerated, rates: Rates | None = None) -> dict[str, Any]:
    """The report (schema 1) of an accelerated program against the captured one.

    FLOPs and activation bytes (kept for the backward pass) are of one training step on the example batch; ``cost`` has
    them, and bytes read and written, by region and block, by kind of token and by module. ``drop_overhead`` has what moving
    rows takes by itself, ``peak_bytes`` the most memory that a step has in use beyond parameters and batch.
    ``promise`` says what of a step's time is left if all goes by FLOPs and, with ``rates``, by the roofline: the least
    seconds of every operator by its FLOPs or its bytes, summed up by what bounds them.
    ``tokens_per_block`` counts the visual rows whose residual a block computes. Sharing index and coverage are read off
    the rewritten graphs.
    """
    plan, facts = accelerated.plan, accelerated.facts
    program = facts.program
    after = {name: _pathways_after(program[name], accelerated, facts) for name in program}
    before = {name: facts[name].profile for name in program}
    profiles = {name: _of_copied(p.profile) for name, p in after.items()}
    added = accelerated.own_parameters
    sizes = {name: p.numel() for name, p in program.model.named_parameters(remove_duplicate=False)}
    tasks = {name: _task_report(graph, accelerated, facts, after[name], rates) for name, graph in program.items()}
    check = accelerated.compilation_check
    totals = [sum(t["flops"][when]["total"] for t in tasks.values()) for when in ("before", "after")]
    return {
        "schema": SCHEMA,
        "policy": plan.policy,
        "options": plan.options,
        "sharing_index": round(sharing_index(before, profiles, sizes, set(map(copied_name, added))), 12),
        "coverage": round(coverage(before, profiles, sizes), 12),
        "new_parameters": sum(p.numel() for p in added.values()),
        "flops_ratio": totals[1] / totals[0],
        "rates": None if rates is None else rates.to_data(),
        "tasks": tasks,
        "verification": _verification_report(accelerated.verification),
        **({} if check is None else {"compilation": _compilation_report(accelerated, check)}),
    }


def _of_copied(profile: Mapping[str, float]) -> dict[str, float]:
    """A profile in which visual tokens that pass a copy count for the parameter that it is a copy of."""
    merged: dict[str, float] = {}
    for name, share in profile.items():
        merged[copied_name(name)] = max(merged.get(copied_name(name), 0.0), share)
    return merged


def _pathways_after(captured: TaskGraph, accelerated: Accelerated, facts: Facts) -> Pathways:
    """Pathways of the rewritten graph; a plan without ``exact`` is followed by it, since dead work does not count."""
    task, plan = facts[captured.name], accelerated.plan
    if plan.exact:
        return pathways(accelerated.program[captured.name], task)
    lean = Pipeline(rewrite_passes(task, plan.for_task(captured.name), exact=True)).run_task(captured, task)
    return pathways(lean, task)


def _task_report(
    captured: TaskGraph, accelerated: Accelerated, facts: Facts, after: Pathways, rates: Rates | None
) -> dict[str, Any]:
    task, plan, rewritten = facts[captured.name], accelerated.plan, accelerated.program[captured.name]
    costs = {"before": task.cost.at(), "after": task_cost(rewritten, task).at()}
    before, now = (cost.total() for cost in costs.values())
    return {
        "nodes": {"before": len(captured.graph.nodes), "after": len(rewritten.graph.nodes)},
        "blocks": len(task.blocks),
        "visual_tokens": task.visual.count,
        "tokens_per_block": {"before": [task.visual.mean] * len(task.blocks), "after": list(after.tokens_per_block)},
        "flops": {"before": _flops(before), "after": _flops(now), "ratio": now.flops / before.flops},
        "activation_bytes": {"before": before.saved, "after": now.saved, "ratio": ratio(now.saved, before.saved)},
        **_peak_and_promise(captured, rewritten, now.flops / before.flops, rates),
        "drop_overhead": drop_overhead(rewritten),
        "cost": {when: cost.rollups() for when, cost in costs.items()},
        "dimensions": {f"{d.input}[{d.dim}]": d.name if d.symbol else d.size for d in task.dimensions},
        "passes": [p.to_data() for p in rewrite_passes(task, plan.for_task(task.name), plan.exact)],
    }


def _peak_and_promise(captured: TaskGraph, rewritten: TaskGraph, flops: float, rates: Rates | None) -> dict[str, Any]:
    """The most memory that a step has in use, and what of its time is left: by FLOPs, and by the roofline of a machine."""
    counted = {
        when: (graph, count_nodes(graph)) for when, graph in (("before", as_run(captured)), ("after", rewritten))
    }
    peaks = {when: peak_memory(*found).bytes for when, found in counted.items()}
    promise: dict[str, Any] = {"flops": flops, "roofline": None, "seconds": None}
    if rates is not None:
        least = {when: seconds_by_bound(roofline(graph, rates, works)) for when, (graph, works) in counted.items()}
        left = ratio(sum(least["after"].values()), sum(least["before"].values()))
        promise |= {"roofline": left, "seconds": least}
    return {"peak_bytes": peaks | {"ratio": ratio(peaks["after"], peaks["before"])}, "promise": promise}


def ratio(now: float, before: float) -> float:
    """``now / before``; 1 where both are 0: a model that is frozen keeps no activations."""
    return now / before if before else 1.0 if not now else float("inf")


def _flops(work: Work) -> dict[str, int]:
    return {"forward": work.forward_flops, "backward": work.backward_flops, "total": work.flops}


def _verification_report(verification: Verification | None) -> dict[str, Any]:
    if verification is None:
        return {"passed": None, "max_output_error": None, "max_gradient_error": None}
    return {
        "passed": verification.passed,
        "dtype": str(verification.dtype).removeprefix("torch."),
        "tolerance": verification.tolerance,
        "max_output_error": verification.max_output_error,
        "max_gradient_error": verification.max_gradient_error,
        "tasks": {
            name: {
                "output_error": t.output_error,
                "gradient_error": t.gradient_error,
                "worst_output": t.worst_output,
                "worst_parameter": t.worst_parameter,
                "identity_error": t.identity_error,
                "capture_error": t.capture_error,
            }
            for name, t in verification.tasks.items()
        },
    }


def _compilation_report(accelerated: Accelerated, check: CompilationCheck) -> dict[str, Any]:
    how = next(module.compilation for module in accelerated.values())
    return {
        "passed": not check.failures(),
        "tolerance": check.tolerance,
        "mode": how.mode if how else None,
        "by": how.by if how else None,
        "tasks": {name: asdict(task) for name, task in check.tasks.items()},
    }

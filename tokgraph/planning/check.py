"""Planning: a policy, or a plan made by hand, checked against the facts of a program."""

from __future__ import annotations

from dataclasses import replace

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import DropSite, Plan, Ragged

from .placement import check_placed
from .selectors import selectors


def with_ragged(plan: Plan, ragged: Ragged) -> Plan:
    """The plan with ``ragged`` in all its sites; ``"min"``, the default of sites, leaves them as they are.

    Raises:
        PlanError: it is neither ``"min"`` nor ``"pad"``.
    """
    if ragged == "min":
        return plan
    return replace(plan, sites=tuple(replace(site, ragged=ragged) for site in plan.sites))


def check_plan(plan: Plan, facts: Facts) -> Plan:
    """The plan with every span's end filled in.

    Raises:
        PlanError: a site names an unknown task or selector, leaves the blocks, or looks ahead on a path that predicts
            visual tokens; sites of one task differ in ``ragged``; or block numbers of a task are not layer numbers.
    """
    for name in facts:
        if len({site.ragged for site in plan.for_task(name)}) > 1:
            raise PlanError(
                f"task {name!r} has sites with ragged='min' and sites with ragged='pad'",
                help="let all sites of a task treat samples with different numbers of visual tokens alike",
            )
    return replace(plan, sites=tuple(_check_site(site, facts) for site in plan.sites))


def _check_site(site: DropSite, facts: Facts) -> DropSite:
    if site.task not in facts:
        raise PlanError(
            f"the plan has a site for task {site.task!r}, which the model does not have",
            help=f"the tasks are {', '.join(map(repr, facts))}; was the plan made for another model?",
        )
    known = selectors()
    if site.selector not in known:
        raise PlanError(
            f"selector {site.selector!r} is unknown",
            help=f"the selectors are {', '.join(map(repr, known))}; your own: tokgraph.register_selector",
        )
    task = facts[site.task]
    check_placed(facts, [site.task])
    if not known[site.selector].causal and task.demand.reads != "text":
        raise PlanError(
            f"selector {site.selector!r} is not causal, and task {site.task!r} predicts visual tokens: which of them stay "
            "would depend on tokens that are not generated yet",
            help="use 'uniform' or 'random' on this task",
        )
    if task.visual.ragged and (site.projections == "own" or known[site.selector].score is not None):
        what = "own projections" if site.projections == "own" else f"selector {site.selector!r}"
        raise PlanError(
            f"task {site.task!r}: samples hold different numbers of visual tokens ({task.visual.count} to "
            f"{task.visual.most}), and {what} need the same number in all",
            help="group the batch by number of images, or use a built-in selector and shared projections",
        )
    resolved = site.resolved(len(task.blocks))
    if site.projections == "own":
        for block in task.blocks[resolved.start : resolved.end]:
            if not block.projections:
                raise PlanError(
                    f"task {site.task!r}: block {block.index} ({block.module or 'no module'}) computes queries, keys or values "
                    "by something else than linear layers with parameters of their own, so they cannot be copied",
                    help="use projections='shared'",
                )
    return resolved

"""What a training run takes on a cluster, with a plan and without, in every layout: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tokgraph.errors import PlanError
from tokgraph.ir.cluster import Cluster
from tokgraph.planning.search import checked_mix
from tokgraph.runtime import Accelerated

from .layouts import Laid, Layouts
from .workload import Workload, workload

SCHEMA = 1
_DAY = 86400.0
NOT_COUNTED = (
    "nothing of it was measured on several GPUs",
    "seconds are the least by the roofline: kernels that reach less than these rates, and time between kernels, add to them",
    "memory is what tensors take: a driver's context, buffers of collectives and fragments do not count (reserve=)",
    "the optimizer is AdamW, fused, with moments in float32 and a float32 copy of parameters of 16 bits",
    "stages for PyTorch's own pipelining are made by hand yet",
)
"""What is to be said of every estimate."""


def estimate(accelerated: Accelerated, cluster: Cluster, *, mix: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Memory of a GPU, time of a step, tokens a second, and what a budget of tokens takes, layout by layout.

    Layouts are ``ddp`` (a copy on each GPU), ``fsdp`` (shards over all), ``hsdp`` (shards in a machine, copies of them), and
    ``pipeline`` (1F1B), each with blocks computed again in the backward pass and without. A micro-batch is as large as the
    example batch. Formulas and their sources: ``docs/cluster.md``.

    Args:
        accelerated: the program; what it was captured as is what it is compared with.
        cluster: the GPUs, and the run.
        mix: task -> weight of its micro-batches; default: all alike.

    Returns:
        Schema 1: ``{"schema", "policy", "cluster", "mix", "model", "tasks", "layouts", "fits", "uncounted",
        "not_counted"}``. ``tasks`` has for every task the parts ``before`` and ``after`` the plan
        (:class:`tokgraph.passes.lower.part_costs.PartCost`), ``layouts`` for every layout and way of checkpointing ``before``,
        ``after`` and their ``ratio``, ``fits`` the layouts whose memory is enough, ``uncounted`` operators whose FLOPs nobody
        knows.

    Raises:
        PlanError: the mix does not weigh the tasks, or there are more stages than parts.
        AnalysisError: a size depends on values that have no storage.
    """
    facts = accelerated.facts
    weights = checked_mix(facts, mix)
    programs = {"before": facts.program, "after": accelerated.program}
    longest = max(len(task.blocks) for task in facts.values()) + 2
    if cluster.stages is not None and cluster.stages > longest:
        raise PlanError(
            f"a model of {longest - 2} blocks is no pipeline of {cluster.stages} stages",
            help=f"the blocks, what is before and what is after them are {longest} parts: give no more stages",
        )
    works = {when: workload(program, facts, weights, cluster) for when, program in programs.items()}
    laid = {
        (when, again): {x.name: x for x in Layouts(work, cluster, again).all()}
        for when, work in works.items()
        for again in (False, True)
    }
    rows = [
        {"layout": name, "checkpoint": again, **_compared(works, {w: laid[w, again][name] for w in works}, cluster)}
        for name in laid["before", False]
        for again in (False, True)
    ]
    return {
        "schema": SCHEMA,
        "policy": accelerated.plan.policy,
        "cluster": cluster.to_data(),
        "mix": weights,
        "model": {when: _model(work) for when, work in works.items()},
        "tasks": {name: {when: _task(work, name) for when, work in works.items()} for name in weights},
        "layouts": rows,
        "fits": {
            when: [{key: row[key] for key in ("layout", "checkpoint")} for row in rows if row[when]["fits"]]
            for when in works
        },
        "uncounted": sorted({op for task in facts.values() for _, op in task.cost.uncounted}),
        "not_counted": list(NOT_COUNTED),
    }


def _model(work: Workload) -> dict[str, int]:
    """Numbers and bytes of the model."""
    return {
        "elements": sum(x.elements for x in work.held),
        "trained_elements": sum(x.elements for x in work.held if x.trained),
        "bytes": sum(x.bytes for x in work.held),
        "gradient_bytes": sum(x.gradient for x in work.held),
        "optimizer_bytes": sum(x.states for x in work.held),
    }


def _task(work: Workload, name: str) -> dict[str, Any]:
    """A micro-batch of a task, and its parts."""
    task = work.tasks[name]
    bytes_by_part = [sum(x.bytes for x in work.held if i in x.parts) for i in work.parts]
    parts = [{**asdict(part), "parameter_bytes": size} for part, size in zip(task.parts, bytes_by_part, strict=True)]
    for part in parts:
        del part["parameters"]
    return {"tokens": task.tokens, "weight": task.weight, "parts": parts}


def _compared(works: Mapping[str, Workload], laid: Mapping[str, Laid], cluster: Cluster) -> dict[str, Any]:
    """A layout before and after the plan, and what the plan leaves of it."""
    told = {when: _told(works[when], laid[when], cluster) for when in works}
    before, after = told["before"], told["after"]
    ratio = {
        "memory": after["memory"]["total"] / before["memory"]["total"],
        "seconds": after["seconds"]["step"] / before["seconds"]["step"],
    }
    return {**told, "ratio": ratio}


def _told(work: Workload, laid: Laid, cluster: Cluster) -> dict[str, Any]:
    """A layout as plain data."""
    tokens = cluster.gpus * cluster.micro_batches * work.tokens
    flops = cluster.micro_batches * work.mean(lambda p: p.forward_flops + p.backward_flops, work.parts)
    seconds = {
        name: getattr(laid, name) for name in ("compute", "communication", "optimizer", "step", "serial", "bubble")
    }
    days = None if cluster.tokens is None else cluster.tokens / tokens * laid.step / _DAY
    return {
        "shape": laid.shape,
        "memory": laid.memory.to_data(),
        "fits": laid.memory.total <= cluster.memory - cluster.reserve,
        "seconds": seconds,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / laid.step,
        "mfu": flops / laid.step / cluster.flops,
        "days": days,
        "gpu_hours": None if days is None else days * 24 * cluster.gpus,
    }

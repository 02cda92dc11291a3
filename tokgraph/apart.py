"""The facts of several tasks as plain data, each task's found in a process of its own: on two cores in half the time.

Tracing a model keeps one core busy, and tasks are traced independently. A graph cannot be sent from one process to another, but
plain data can: each process loads the model file again, and captures, analyses and summarises one task. That is for models on
the meta device, which have no weights to be loaded twice, and no values that a forward could be compared on.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from tokgraph.ir.blocks import Block
from tokgraph.ir.facts import Facts
from tokgraph.ir.spec import ModelSpec, load
from tokgraph.passes.capture.export import capture
from tokgraph.report.summary import batches_of, of_all_tasks, one_sample, summarise, with_nodes
from tokgraph.stages import analyze

_LARGE = 600
"""Modules from which on tracing takes longer than starting a process, which takes some seconds."""


@dataclass(frozen=True)
class ModelFile:
    """How a model is loaded.

    Args:
        path: ``model.py`` or ``model.py:function``.
        settings: the function's arguments.
    """

    path: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a summary is to hold.

    Args:
        sizes: sizes beside those of the example batch at which to give the cost; none: one sample.
        convention: whose formula to give beside the exact count.
        nodes: also the cost of every node.
    """

    sizes: tuple[Mapping[str, int], ...] = ()
    convention: str = "exact"
    nodes: bool = False


@dataclass(frozen=True)
class Summary:
    """What is known of a program, as plain data.

    Args:
        summary: the summary.
        full: the same with the profile of every parameter and the cost of every node, where they were asked for.
    """

    summary: dict[str, Any]
    full: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What is known of one task: plain data, which can be sent to another process.

    Args:
        found: of a program of this task alone.
        profile: parameter -> share of the visual tokens that it transforms.
        blocks: the task's blocks.
    """

    found: Summary
    profile: Mapping[str, float]
    blocks: tuple[Block, ...]


def can_be_parted(spec: ModelSpec) -> bool:
    """Whether it is worth it: several tasks, several cores, and a model without storage that is large enough."""
    modules = sum(1 for _ in spec.model.modules())
    bare = all(x.is_meta for x in (*spec.model.parameters(), *spec.model.buffers()))
    return bare and modules >= _LARGE and len(spec.tasks) > 1 and _cores() > 1


def _cores() -> int:
    """Cores that this process may use; where the system does not say, all there are."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def summarise_apart(file: ModelFile, spec: ModelSpec, asked: Asked) -> Summary | None:
    """The summary of a model's tasks: what it is of facts of the whole program.

    Args:
        file: where other processes find the model.
        spec: the model, loaded.
        asked: what the summary is to hold.

    Returns:
        ``None`` where a process failed: done once more in this one, it says why.
    """
    first, *others = spec.tasks
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    processes = []
    with ExitStack() as at_end:
        for name in others:
            ends[name], theirs = context.Pipe()
            process = context.Process(target=_in_a_process, args=(theirs, file, name, asked), daemon=True)
            process.start()
            theirs.close()
            at_end.callback(process.terminate)
            processes.append(process)
        try:
            facts = analyze(capture(_alone(spec, first)))
            batches = [*batches_of(facts), *(batch for end in ends.values() for batch in end.recv())]
            sizes = asked.sizes or one_sample(batches)
            for end in ends.values():
                end.send(sizes)
            parts = {first: _part(facts, first, sizes, asked)} | {name: end.recv() for name, end in ends.items()}
            for process in processes:
                process.join()
        except Exception:
            return None
    return _together(spec, parts)


def _in_a_process(end: Connection, file: ModelFile, task: str, asked: Asked) -> None:
    """Send what the example batch of a task is, wait for the sizes to give the cost at, and send the task's part."""
    facts = analyze(capture(_alone(load(file.path, **file.settings), task)))
    end.send(batches_of(facts))
    end.send(_part(facts, task, end.recv(), asked))


def _alone(spec: ModelSpec, task: str) -> ModelSpec:
    return replace(spec, tasks={task: spec.tasks[task]})


def _part(facts: Facts, task: str, sizes: Iterable[Mapping[str, int]], asked: Asked) -> Part:
    summary = summarise(facts, sizes=sizes, convention=asked.convention)
    known = facts[task]
    return Part(Summary(summary, with_nodes(summary, facts) if asked.nodes else {}), dict(known.profile), known.blocks)


def _together(spec: ModelSpec, parts: Mapping[str, Part]) -> Summary:
    """The summaries of single tasks as one."""
    common = of_all_tasks(spec.model, parts)

    def joined(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        first, *_ = found.values()
        return first and {**first, **common, "tasks": {name: of["tasks"][name] for name, of in found.items()}}

    return Summary(
        joined({name: part.found.summary for name, part in parts.items()}),
        joined({name: part.found.full for name, part in parts.items()}),
    )

"""Measured facts: what batches show of a captured model that its graph does not. Attention, redundancy, gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from tokgraph.errors import AnalysisError
from tokgraph.ir.facts import Facts, facts_before
from tokgraph.ir.program import Program, is_meta
from tokgraph.ir.spec import check_tasks

from .attention import MAX_BYTES, Allocation
from .gradients import BlockCosine, GradientNorms, gradient_cosines, measure_gradients
from .redundancy import Redundancy
from .task import measure_forward

Batches = Mapping[str, Iterable[Mapping[str, Any]]]


@dataclass(frozen=True)
class TaskMeasures:
    """What was measured of one task.

    Args:
        allocation: attention mass between segments, by block and head.
        redundancy: change and effective rank of the visual rows, by block.
        gradients: parameter name -> norms of its gradient through visual rows and through all others.
    """

    allocation: Allocation
    redundancy: Redundancy
    gradients: Mapping[str, GradientNorms] = field(repr=False)


@dataclass(frozen=True)
class Measurements:
    """What was measured of a program.

    Args:
        tasks: task -> its measures.
        cosines: how much the tasks' gradients agree, block by block.
    """

    tasks: Mapping[str, TaskMeasures]
    cosines: tuple[BlockCosine, ...]


@overload
def measure(program: Facts, facts: Batches | None = None, *, max_bytes: int = MAX_BYTES) -> Measurements: ...


@overload
def measure(
    program: Program | Facts, facts: Facts | None = None, batches: Batches | None = None, *, max_bytes: int = MAX_BYTES
) -> Measurements: ...


def measure(
    program: Program | Facts,
    facts: Facts | Batches | None = None,
    batches: Batches | None = None,
    *,
    max_bytes: int = MAX_BYTES,
) -> Measurements:
    """Measure a captured program on calibration batches: ``measure(facts, batches)``, or ``measure(program, facts, batches)``.

    Args:
        program: facts of the captured program, or the program.
        facts: its facts, where the program comes first.
        batches: ``{task: [inputs by name, ...]}``, of any size where the task's dimensions are dynamic. Tasks that are left
            out are measured on their example batch, and so are all with ``None``.
        max_bytes: attention weights held at once, in bytes.

    Raises:
        AnalysisError: the model is on the meta device, or the facts are of another program.
        BatchError: a batch does not fit its task, or a task is unknown.
    """
    facts, batches = facts_before(program, facts, batches)
    program = facts.program
    if is_meta(program.model):
        raise AnalysisError(
            "the model is on the meta device, so there is nothing to measure",
            help="build the model with storage (a smaller size), or ask for the static facts only",
        )
    of_tasks = {name: list(of_task) for name, of_task in (batches or {}).items()}
    check_tasks(of_tasks, program)
    tasks, splits = {}, {}
    with torch.inference_mode(False):  # gradients are measured, whatever the caller's mode
        for name, graph in program.items():
            forward = measure_forward(graph, facts[name], of_tasks.get(name), max_bytes=max_bytes)
            splits[name] = measure_gradients(graph, facts[name], of_tasks.get(name))
            tasks[name] = TaskMeasures(forward.allocation, forward.redundancy, splits[name].norms())
    return Measurements(tasks, gradient_cosines(splits, facts))


@dataclass(frozen=True)
class ImageAttention:
    """How much attention a task pays to its image, block by block: where it falls away, visual tokens are redundant.

    Args:
        task: the task.
        query: whose attention: the segment that the loss is about, ``"output"`` or ``"image"``.
        mass: share of the attention of these queries on image keys, by block, the mean over heads.
        early: mean over the first half of the blocks.
        late: mean over the others.
    """

    task: str
    query: str
    mass: tuple[float, ...]
    early: float
    late: float


def image_attention(measured: Measurements, facts: Facts) -> tuple[ImageAttention, ...]:
    """The asymmetry between tasks, as found on this model: attention to the image from the queries that matter.

    Those are the answer's, and the image's own where the task predicts visual tokens. A task whose declared segments have
    no ``"image"`` is left out.

    Args:
        measured: what :func:`measure` found.
        facts: facts of the same program.

    Source: arXiv 2606.01503 (understanding turns away from visual tokens in late layers, generation does not).
    """
    found = []
    for name, task in facts.items():
        allocation = measured.tasks[name].allocation
        if "image" not in allocation.keys or not allocation.queries:
            continue
        wanted = "image" if task.demand.reads == "visual" else "output"
        query = wanted if wanted in allocation.queries else allocation.queries[-1]
        mass = tuple(allocation.between(query, "image").tolist())
        half = max(1, len(mass) // 2)
        late = mass[half:] or mass
        found.append(ImageAttention(name, query, mass, sum(mass[:half]) / half, sum(late) / len(late)))
    return tuple(found)


def image_mass(measured: Measurements, facts: Facts) -> dict[str, tuple[float, ...]]:
    """Task -> attention mass on image keys by block, from the queries that matter (:func:`image_attention`).

    Args:
        measured: what :func:`measure` found.
        facts: facts of the same program.

    Raises:
        AnalysisError: a task's declared segments have no ``"image"``.
    """
    found = {attention.task: attention.mass for attention in image_attention(measured, facts)}
    for name in facts:
        if name not in found:
            raise AnalysisError(
                f"task {name!r}: no segment is named 'image', so attention to it is not known",
                help="name the segment of the visual tokens 'image' in Task.segments",
            )
    return found

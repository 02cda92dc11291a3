"""Groups of parameters: the share of the visual tokens that each transforms, task by task, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from tokgraph.ir.blocks import Block
from tokgraph.measurement.measurements import Measurements, TaskMeasures


class Pathways(Protocol):
    """What is asked of a task: its facts have it."""

    @property
    def profile(self) -> Mapping[str, float]:
        """Parameter -> share of the visual tokens that it transforms."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The task's blocks."""


def group_pathways(
    elements: Mapping[str, int], facts: Mapping[str, Pathways], measured: Measurements | None
) -> list[dict[str, Any]]:
    """Group of parameters -> share of the visual tokens that it transforms, task by task, weighted by size.

    Groups are blocks, and modules two levels deep outside of them. What was measured is the share of the gradient's norm
    that flows through visual rows, ``null`` where a task has no gradient.
    """
    blocks = {block.module: block.index for task in facts.values() for block in task.blocks if block.module}
    used = {name for task in facts.values() for name in task.profile}
    groups: dict[str, list[str]] = {}
    for name in elements:
        if name in used:
            groups.setdefault(_group(name, blocks), []).append(name)
    found = []
    for group, names in groups.items():
        size = sum(elements[name] for name in names)
        profile = {
            task: sum(elements[name] * of.profile.get(name, 0.0) for name in names) / size for task, of in facts.items()
        }
        entry: dict[str, Any] = {"group": group, "elements": size, "profile": profile, "visual_gradient": None}
        if measured is not None:
            entry["visual_gradient"] = {task: _visual_part(of, names) for task, of in measured.tasks.items()}
        found.append(entry)
    return found


def _group(parameter: str, blocks: Mapping[str, int]) -> str:
    path = parameter.rpartition(".")[0]
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        if (module := ".".join(parts[:depth])) in blocks:
            return f"block {blocks[module]}"
    return ".".join(parts[:2]) or parameter


def _visual_part(task: TaskMeasures, names: Iterable[str]) -> float | None:
    norms = [task.gradients[name] for name in names if name in task.gradients]
    visual, text = (math.sqrt(sum(getattr(n, kind) ** 2 for n in norms)) for kind in ("visual", "text"))
    return visual / (visual + text) if visual + text > 0 else None

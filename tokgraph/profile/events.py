"""What one profiled run shows, as data, and how runs are summed up by block, phase and kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tokgraph.export.files import NodePlace


@dataclass(frozen=True)
class Event:
    """The execution of one node.

    Args:
        name: what the runtime calls it.
        place: where it comes from, ``None`` where that is not known.
        start: seconds since the run began.
        seconds: how long it took.
    """

    name: str
    place: NodePlace | None
    start: float
    seconds: float


@dataclass(frozen=True)
class RunProfile:
    """One profiled run.

    Args:
        wall: seconds that the run took.
        events: what it executed, in order.
    """

    wall: float
    events: tuple[Event, ...]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(samples), "min": min(samples), "max": max(samples)}


def summarise_runs(runs: Sequence[RunProfile]) -> dict[str, Any]:
    """Seconds of profiled runs: whole, in kernels, unmapped, and by block, phase and kind; each with its spread.

    Returns:
        ``{"wall", "kernels", "mapped", "between": spread}``, ``"unmapped": {name: median seconds}``, and ``"by_block"``,
        ``"by_phase"``, ``"by_kind"``: ``{key: spread}``. What is outside blocks is in ``by_block`` under its kind.
    """
    kernels = [sum(e.seconds for e in run.events) for run in runs]
    mapped = [sum(e.seconds for e in run.events if e.place is not None) for run in runs]
    return {
        "wall": spread([run.wall for run in runs]),
        "kernels": spread(kernels),
        "mapped": spread(mapped),
        "between": spread([max(0.0, run.wall - total) for run, total in zip(runs, kernels, strict=True)]),
        "unmapped": {
            name: found["median"] for name, found in _grouped(runs, lambda e: None if e.place else e.name).items()
        },
        "by_block": _in_order(_grouped(runs, _block)),
        "by_phase": _grouped(runs, lambda e: e.place.phase if e.place else None),
        "by_kind": _grouped(runs, lambda e: e.place.kind if e.place else None),
        "by_module": _grouped(runs, lambda e: e.place.module or "(forward)" if e.place else None),
    }


def _block(event: Event) -> str | None:
    if event.place is None:
        return None
    return event.place.kind if event.place.block is None else f"block {event.place.block}"


def _grouped(runs: Sequence[RunProfile], key: Callable[[Event], str | None]) -> dict[str, dict[str, float]]:
    totals: list[dict[str, float]] = []
    for run in runs:
        found: dict[str, float] = defaultdict(float)
        for event in run.events:
            if (name := key(event)) is not None:
                found[name] += event.seconds
        totals.append(found)
    names = dict.fromkeys(name for found in totals for name in found)
    return {name: spread([found.get(name, 0.0) for found in totals]) for name in names}


def _in_order(found: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    def order(name: str) -> tuple[int, int, str]:
        if name.startswith("block "):
            return (1, int(name.removeprefix("block ")), "")
        return (0 if name in ("encoder", "input") else 2, 0, name)

    return {name: found[name] for name in sorted(found, key=order)}

"""How much of the time that a plan promises to save is saved, and what ate the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokgraph.ir.program import TaskGraph
from tokgraph.ir.rates import Rates
from tokgraph.passes.cost.roofline import BOUNDS, roofline, seconds_by_bound
from tokgraph.passes.cost.works import Counted, count_nodes, example_number

from .events import RunProfile, spread

BETWEEN = "between kernels"


def kept_promise(
    before: TaskGraph,
    after: TaskGraph,
    backward: bool,
    rates: Rates,
    profiles: tuple[Sequence[RunProfile], Sequence[RunProfile]],
    realised: float,
) -> dict[str, Any]:
    """The promise of a rewritten graph, and what its runs made of it.

    Args:
        before: the captured graph.
        after: the rewritten graph.
        backward: whether runs have a backward pass.
        rates: of the machine that they ran on.
        profiles: profiled runs of both.
        realised: time of the rewritten graph over that of the captured one, without profiling.

    Returns:
        ``flops`` and ``roofline``: promised time over that of the captured graph; ``realised`` and ``share``: which part of
        the saving that FLOPs promise was realised, ``None`` where they promise none; ``by_bound``: for what is bound by
        matrix products (``matmul``), by memory, for moving ``rows``, and for what passes between kernels, seconds of a run
        ``before`` and ``after``, those ``promised`` (before, times what the roofline leaves of them), and the ``excess``.
    """
    graphs = {"before": before, "after": after}
    counted = {when: count_nodes(graph) for when, graph in graphs.items()}
    times = {when: roofline(graph, rates, counted[when]) for when, graph in graphs.items()}
    least = {when: seconds_by_bound(found, backward) for when, found in times.items()}
    flops = _flops(after, counted["after"], backward) / _flops(before, counted["before"], backward)
    bounds = [{time.node: time.bound for time in found} for found in times.values()]
    measured = [_by_bound(runs, bound) for runs, bound in zip(profiles, bounds, strict=True)]
    by_bound = {}
    for bound in (*BOUNDS, BETWEEN):
        a, b = (found[bound]["median"] for found in measured)
        floor = least["before"].get(bound, 0.0)
        promised = a * least["after"][bound] / floor if floor else a if bound == BETWEEN else 0.0
        by_bound[bound] = {"before": a, "after": b, "promised": promised, "excess": b - promised}
    return {
        "flops": flops,
        "roofline": sum(least["after"].values()) / sum(least["before"].values()),
        "realised": realised,
        "share": (1 - realised) / (1 - flops) if flops < 1 else None,
        "by_bound": by_bound,
    }


def _flops(graph: TaskGraph, counted: Counted, backward: bool) -> float:
    number = example_number(graph)
    return sum(number(work.flops if backward else work.forward_flops) for work in counted.works.values())


def _by_bound(runs: Sequence[RunProfile], bound: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Seconds of the nodes of each bound; nodes that make no tensors count as memory."""
    found: dict[str, list[float]] = {name: [] for name in (*BOUNDS, BETWEEN)}
    for run in runs:
        seconds = dict.fromkeys(found, 0.0)
        for event in run.events:
            seconds[bound.get(event.place.node, "memory") if event.place else "memory"] += event.seconds
        seconds[BETWEEN] = max(0.0, run.wall - sum(seconds.values()))
        for name, taken in seconds.items():
            found[name].append(taken)
    return {name: spread(taken) for name, taken in found.items()}

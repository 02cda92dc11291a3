"""The planner behind ``shared``: of all plans that thin the tasks alike and meet a FLOPs target, the one that loses least.

Searched: every span ``[a, b)`` that leaves the first and the last block full, every block of it or every second one, and
every keep ratio that all tasks can represent; ``hide``, uniform. FLOPs come from the symbolic cost facts: a block's are a
polynomial in its rows, and what ``exact`` leaves of the rest is known. What a plan loses is attention mass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts, TaskFacts
from tokgraph.ir.plan import DropSite

TOLERANCE = 0.01
"""Relative deviation from the target that a plan may have."""
DIGITS = 9
"""Decimals in which mass is compared: equal sums may differ in their last bits."""
Mass = Mapping[str, Sequence[float]]


def prior_mass(facts: Facts) -> dict[str, tuple[float, ...]]:
    """Attention mass on image keys, by block, assumed for a model that was not calibrated.

    Understanding leans on image tokens early and little in late layers: ``exp(-3 b / L)``. Generation leans on them
    through the whole depth: 0.5. The shapes follow the asymmetry that arXiv 2606.01503 reports, the numbers are ours.
    """
    found = {}
    for name, task in facts.items():
        depth = len(task.blocks)
        generates = task.demand.reads == "visual"
        found[name] = tuple(0.5 if generates else math.exp(-3 * b / depth) for b in range(depth))
    return found


@dataclass(frozen=True)
class Candidate:
    """A plan that was considered.

    Args:
        start: first block of the span.
        end: the block after it.
        stride: 1: every block of the span is thinned; 2: every second one.
        keep: ratio of visual tokens that stay.
        flops: FLOPs of the training step, weighted over tasks, relative to the captured program.
        loss: attention mass lost, weighted over tasks and summed over thinned blocks.
    """

    start: int
    end: int
    stride: int
    keep: float
    flops: float
    loss: float

    @property
    def blocks(self) -> range:
        """The thinned blocks."""
        return range(self.start, self.end, self.stride)

    def sites(self, facts: Facts) -> tuple[DropSite, ...]:
        """Its drop sites, the same on every task."""
        spans = [(self.start, self.end)] if self.stride == 1 and self.blocks else [(b, b + 1) for b in self.blocks]
        return tuple(DropSite(task, start, end, self.keep) for task in facts for start, end in spans)

    def __str__(self) -> str:
        if not self.blocks:
            return f"no site: FLOPs {self.flops:.4f}x"
        shape = f"blocks [{self.start}, {self.end})" + (", every second" if self.stride == 2 else "")
        return f"{shape}, keep {self.keep:.4g}: FLOPs {self.flops:.4f}x, mass lost {self.loss:.4g}"


@dataclass(frozen=True)
class Search:
    """What the planner found.

    Args:
        target: the FLOPs ratio asked for.
        best: the plan chosen.
        others: runners-up, best first: for every span and stride the keep ratio that comes nearest to the target.
        calibrated: whether the attention mass was measured.
    """

    target: float
    best: Candidate
    others: tuple[Candidate, ...]
    calibrated: bool

    def explain(self, most: int = 5) -> list[str]:
        """Lines that say what was chosen, and why the runners-up lost."""
        source = "measured" if self.calibrated else "assumed (no calibration)"
        lines = [
            f"target {self.target:g}x; attention mass {source}; plans that meet it: {len(self.others) + 1}",
            f"chosen: {self.best}",
        ]
        if not self.best.blocks and not self.others:
            lines[1] += ", no more than the target: what no output reads is all that goes"
        for other in self.others[:most]:
            if round(other.loss, DIGITS) == round(self.best.loss, DIGITS):
                why = "loses as much, and is later in the order of spans"
            elif self.best.loss:
                why = f"loses {other.loss / self.best.loss - 1:.1%} more mass"
            else:
                why = "loses mass, the plan chosen none"
            lines.append(f"passed over: {other}: {why}")
        return lines


class Costs:
    """FLOPs of a mix of training steps, as a function of what is thinned.

    Args:
        facts: facts with costs.
        mix: task -> weight; equal weights by default.
        exact: what no demanded output reads is removed.
    """

    def __init__(self, facts: Facts, mix: Mapping[str, float] | None, exact: bool) -> None:
        self.facts = facts
        self.exact = exact
        self.mix = checked_mix(facts, mix)
        self._blocks = {name: _block_polynomials(task) for name, task in facts.items()}
        self._visual = {name: task.visual.count / task.demand.tokens for name, task in facts.items()}

    @cached_property
    def whole(self) -> float:
        """Of the captured program."""
        return sum(w * _total(self.facts[name], exact=False) for name, w in self.mix.items())

    @cached_property
    def unthinned(self) -> float:
        """Of the program without drop sites, relative to the captured one."""
        return sum(w * _total(self.facts[name], self.exact) for name, w in self.mix.items()) / self.whole

    def saved(self, block: int, keep: float) -> float:
        """What thinning a block to ``keep`` saves, relative to the captured program."""
        return sum(w * self._saved(name, block, keep) for name, w in self.mix.items()) / self.whole

    def _saved(self, name: str, block: int, keep: float) -> float:
        _, linear, square = self._blocks[name][block]
        rows = 1 - (1 - keep) * self._visual[name]
        return linear * (1 - rows) + square * (1 - rows**2)


def search(
    facts: Facts,
    target: float,
    *,
    mix: Mapping[str, float] | None = None,
    mass: Mass | None = None,
    exact: bool = True,
) -> Search:
    """The plan that meets a FLOPs target and loses the least attention mass, with sharing index 1.0.

    Where the program without sites costs no more than the target (with ``exact``: without what no demanded output reads),
    the plan has no site.

    Args:
        facts: facts of the program, as :func:`tokgraph.analyze` finds them.
        target: FLOPs of the training step, relative to the captured program.
        mix: task -> weight of its step; default: all alike.
        mass: task -> attention mass on image keys, a number a block; default: :func:`prior_mass`.
        exact: the plan also removes work that no demanded output reads.

    Raises:
        PlanError: the target cannot be met with sharing index 1.0 (the message says what can), or the tasks differ in
            their number of blocks.
    """
    depths = {len(task.blocks) for task in facts.values()}
    if len(depths) != 1 or min(depths) < 3:
        raise PlanError(f"the planner needs tasks over the same three blocks or more; there are {sorted(depths)}")
    (depth,) = depths
    costs = Costs(facts, mix, exact)
    known = _checked_mass(facts, mass)
    weight = [sum(w * known[name][b] for name, w in costs.mix.items()) for b in range(depth)]
    whole = Candidate(1, 1, 1, 1.0, costs.unthinned, 0.0)
    if costs.unthinned <= target:
        return Search(target, whole, (), mass is not None)
    nearest = [_nearest(costs, weight, a, b, stride, target) for a, b, stride in _shapes(depth)]
    found = [whole, *(c for c in nearest if c.keep < 1)]
    met = sorted((c for c in found if abs(c.flops / target - 1) <= TOLERANCE), key=_order)
    if not met:
        low = min(_candidate(costs, weight, a, b, stride, 0.0).flops for a, b, stride in _shapes(depth))
        near = min(found, key=lambda c: (abs(c.flops - target), _order(c)))
        raise PlanError(
            f"no plan with sharing index 1.0 costs {target:g}x within {TOLERANCE:.0%}",
            help=f"what can be had lies between {low:.3f}x and {costs.unthinned:.3f}x; nearest: {near}",
        )
    return Search(target, met[0], tuple(met[1:]), mass is not None)


def _shapes(depth: int) -> list[tuple[int, int, int]]:
    """``(start, end, stride)`` of all spans between the first and the last block; striding ends at a thinned block."""
    return [
        (a, b, stride)
        for a in range(1, depth - 1)
        for b in range(a + 1, depth)
        for stride in (1, 2)
        if stride == 1 or (b - a >= 3 and (b - a) % 2 == 1)
    ]


def _nearest(costs: Costs, weight: Sequence[float], start: int, end: int, stride: int, target: float) -> Candidate:
    """The keep ratio that comes nearest to the target, by bisection: FLOPs grow with it."""
    steps = math.gcd(*(task.visual.step for task in costs.facts.values()))
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        if _candidate(costs, weight, start, end, stride, middle / steps).flops < target:
            low = middle
        else:
            high = middle
    both = [_candidate(costs, weight, start, end, stride, k / steps) for k in (low, high)]
    return min(both, key=lambda c: abs(c.flops - target))


def _candidate(costs: Costs, weight: Sequence[float], start: int, end: int, stride: int, keep: float) -> Candidate:
    blocks = range(start, end, stride)
    flops = costs.unthinned - sum(costs.saved(b, keep) for b in blocks)
    return Candidate(start, end, stride, keep, flops, sum((1 - keep) * weight[b] for b in blocks))


def _order(c: Candidate) -> tuple[float, int, int, int]:
    """Least mass lost first; of equals the later, shorter span."""
    return (round(c.loss, DIGITS), -c.start, c.end, c.stride)


def _total(task: TaskFacts, exact: bool) -> float:
    return float((task.exact_cost if exact else task.cost).at().total().flops)


def _block_polynomials(task: TaskFacts) -> list[tuple[float, float, float]]:
    """For each block its FLOPs in the example batch that do not grow with its rows, that do, and that grow with the square."""
    sums = [[0.0, 0.0, 0.0] for _ in task.blocks]
    for node in task.cost.at().nodes:
        if node.block is not None:
            sums[node.block][node.degree] += float(node.work.flops)
    return [(a, b, c) for a, b, c in sums]


def checked_mix(facts: Facts, mix: Mapping[str, float] | None) -> dict[str, float]:
    """Task -> weight, summing to 1; all alike by default.

    Raises:
        PlanError: a weight is negative, all are 0, or a task is unknown.
    """
    weights = dict.fromkeys(facts, 1.0) if mix is None else dict(mix)
    unknown = sorted(set(weights) - set(facts))
    if unknown or not all(0 <= w < math.inf for w in weights.values()) or not sum(weights.values()):
        raise PlanError(
            f"the mix {weights} does not weigh the tasks {', '.join(facts)}", help="as understanding=0.5,generation=0.5"
        )
    total = sum(weights.values())
    return {name: weights.get(name, 0.0) / total for name in facts}


def _checked_mass(facts: Facts, mass: Mass | None) -> Mass:
    if mass is None:
        return prior_mass(facts)
    for name, task in facts.items():
        numbers = mass.get(name, ())
        if len(numbers) != len(task.blocks) or not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise PlanError(f"the attention mass of task {name!r} is not one number >= 0 for each of its blocks")
    return mass

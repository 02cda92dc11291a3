"""The policy that keeps synergy: both tasks are thinned alike, so they keep running through the same parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import DropSite, Mode, Plan, Ragged

from .policy import Policy, option
from .search import Search, search


@dataclass(frozen=True)
class Shared(Policy):
    """The same span, keep ratio and mode on every task, restored before the last block: sharing index 1.0.

    Args:
        span: ``(start, end)`` blocks; default: all blocks but the first and the last.
        keep: ratio of visual tokens that stay. Tasks with different numbers of visual tokens are thinned alike only at
            ratios that give all of them whole tokens; the nearest such ratio is taken.
        selector: ``"uniform"`` or ``"random"``; ``"norm"`` looks ahead and is refused for tasks that predict visual
            tokens.
        mode: ``"hide"`` or ``"freeze"``.
        seed: seed of the ``"random"`` selector.
        ragged: what sites do where samples hold different numbers of visual tokens; tasks that differ in these numbers are
            alike with ``"pad"`` only, which keeps the same share of every sample.
        exact: also remove work that no demanded output reads.
        target_flops: FLOPs of the training step relative to the captured program; the planner then chooses span,
            alternation and keep ratio (:mod:`tokgraph.planning.search`), and ``span`` and ``keep`` must be left alone.
        mix: task -> weight of its step in the target; default: all alike.
        mass: task -> attention mass on image keys by block, measured; default: the planner's prior.
    """

    name: ClassVar[str] = "shared"

    span: tuple[int, int] | None = option(None, "0 <= span[0] < span[1] < L")
    keep: float = option(0.5, "0 <= keep <= 1")
    selector: str = "uniform"
    mode: Mode = "hide"
    seed: int = option(0, "0 <= seed < 2**63")
    ragged: Ragged = "min"
    exact: bool = True
    target_flops: float | None = option(None, "0 < target_flops <= 1")
    mix: Mapping[str, float] | None = None
    mass: Mapping[str, Sequence[float]] | None = None

    def plan(self, facts: Facts) -> Plan:
        """One site a task, or what the planner finds.

        Raises:
            PlanError: the target cannot be met, the span reaches the last block, or no ratio near ``keep`` thins the
                tasks alike.
        """
        self._check_ragged(facts)
        if self.target_flops is not None:
            found = self.search(facts).best.sites(facts)
            return self.made([replace(site, ragged=self.ragged) for site in found], self.exact)
        if self.mix is not None or self.mass is not None:
            raise PlanError(
                f"{'mass' if self.mix is None else 'mix'} is for the planner, which works towards target_flops",
                help="give target_flops, or leave it out",
            )
        if not 0.0 <= self.keep <= 1.0:
            raise PlanError(f"keep={self.keep} is outside [0, 1]", help="keep is the ratio of visual tokens that stay")
        blocks = min(len(task.blocks) for task in facts.values())
        start, end = self.span if self.span is not None else (1, blocks - 1)
        if not 0 <= start < end <= blocks:
            raise PlanError(
                f"span [{start}, {end}) is out of range: the tasks have {blocks} blocks",
                help=f"give 0 <= start < end <= {blocks - 1}",
            )
        if end == blocks:
            raise PlanError(
                f"span [{start}, {end}) reaches the last block, whose demanded rows differ from task to task",
                help=f"end the span at {blocks - 1} or before: 'shared' restores before the last block, so that both "
                "tasks keep running through the same parameters (sharing index 1.0)",
            )
        keep = self._common_ratio(facts)
        sites = tuple(
            DropSite(name, start, end, keep, self.selector, self.mode, seed=self.seed, ragged=self.ragged)
            for name in facts
        )
        options = {**self.options(), "span": [start, end]}
        return Plan(sites, exact=self.exact, policy=self.name, options=options)

    def search(self, facts: Facts) -> Search:
        """What the planner finds for the target.

        Raises:
            PlanError: there is no target, it cannot be met, or an option contradicts it.
        """
        if self.target_flops is None or not 0.0 < self.target_flops <= 1.0:
            raise PlanError(f"target_flops={self.target_flops} is outside (0, 1]")
        fixed = {"span": None, "keep": 0.5, "selector": "uniform", "mode": "hide"}
        given = [name for name, default in fixed.items() if getattr(self, name) != default]
        if given:
            raise PlanError(
                f"target_flops and {given[0]} exclude each other: the planner chooses the span and the keep ratio of "
                "uniform hide sites",
                help="leave one of them out",
            )
        return search(facts, self.target_flops, mix=self.mix, mass=self.mass, exact=self.exact)

    def _check_ragged(self, facts: Facts) -> None:
        """Raise :class:`PlanError` where to drop as many tokens of every sample leaves the tasks different shares."""
        flows = {name: task.visual for name, task in facts.items()}
        if self.ragged == "pad" or len({(flow.count, flow.mean) for flow in flows.values()}) == 1:
            return
        for name, flow in flows.items():
            if flow.ragged:
                raise PlanError(
                    f"samples of task {name!r} hold {flow.count} to {flow.most} visual tokens: to drop as many of each leaves "
                    "the tasks different shares, and a sharing index below 1",
                    help="use ragged='pad' (--ragged pad), which keeps the same share of every sample",
                )

    def _common_ratio(self, facts: Facts) -> float:
        """The ratio nearest to ``keep`` that leaves every task the same share of its visual tokens."""
        steps = math.gcd(*(task.visual.step for task in facts.values()))
        ratio = Fraction(math.floor(self.keep * steps + 0.5), steps)
        if abs(float(ratio) - self.keep) > 0.05:
            shown = ", ".join(f"{name}: {task.visual.count}" for name, task in facts.items())
            raise PlanError(
                f"no keep ratio near {self.keep} thins all tasks alike (visual tokens per sample: {shown})",
                help=f"the ratios that do are multiples of 1/{steps}; use numbers of visual tokens with a larger common "
                "divisor, or a plan file with one site a task (its sharing index will be below 1)",
            )
        return float(ratio)

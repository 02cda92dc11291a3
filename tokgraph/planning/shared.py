"""The policy that keeps synergy: both tasks are thinned alike, so they keep running through the same parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import Field

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import DropSite, Mode, Plan, Ragged

from .options import Blocks, Kind, L
from .placement import check_read_behind, check_same_layers
from .policy import Exactly, Policy
from .search import Search, search


@dataclass(frozen=True)
class Shared(Policy):
    """The same span, keep ratio and mode on every task, restored before the last block: sharing index 1.0."""

    name: ClassVar[str] = "shared"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding", "generation")

    span: Annotated[
        tuple[int, int] | None,
        Blocks(0, L - 1),
        Field(
            description="blocks start to end - 1; default: all but the first and the last. It ends before the last block, "
            "whose demanded rows differ from task to task: restored there, all tasks keep running through the same parameters"
        ),
    ] = None
    keep: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="ratio of visual tokens that stay; shared takes the nearest one that gives all tasks whole tokens",
        ),
    ] = 0.5
    selector: Annotated[
        str,
        Field(
            description="which visual tokens stay: uniform, random, norm, attention, similarity, or one of your own; tasks "
            "that predict visual tokens refuse those that look ahead"
        ),
    ] = "uniform"
    mode: Annotated[
        Mode,
        Field(
            description="what dropped tokens are inside the span: hidden, or unchanged rows that still serve as keys and values"
        ),
    ] = "hide"
    seed: Annotated[int, Field(ge=0, lt=2**63, description="seed of the random selector")] = 0
    ragged: Annotated[
        Ragged,
        Field(
            description="samples with different numbers of visual tokens: all lose as many as the one with the fewest, or each "
            "its own share, under a padding mask"
        ),
    ] = "min"
    exact: Exactly = True
    target_flops: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="FLOPs of the training step, relative to the captured program, to plan for: the planner then chooses "
            "span, alternation and keep ratio",
        ),
    ] = None
    mix: Annotated[
        Mapping[str, float] | None,
        Field(description="weights of the tasks' steps in the target; default: all alike"),
    ] = None
    mass: Annotated[
        Mapping[str, Sequence[float]] | None,
        Field(description="attention mass on image keys by task and block, measured; default: the planner's prior"),
    ] = None

    def decide(self, facts: Facts) -> Plan:
        """One site a task, or what the planner finds.

        Raises:
            PlanError: the target cannot be met, no ratio near ``keep`` thins the tasks alike, or blocks of one number are
                different layers in different tasks.
        """
        check_same_layers(facts)
        self._check_ragged(facts)
        if self.target_flops is not None:
            found = self.search(facts).best.sites(facts)
            check_read_behind(facts, found)
            return self.made([replace(site, ragged=self.ragged) for site in found], self.exact)
        if self.mix is not None or self.mass is not None:
            raise PlanError(
                f"{'mass' if self.mix is None else 'mix'} is for the planner, which works towards target_flops",
                help="give target_flops, or leave it out",
            )
        blocks = min(len(task.blocks) for task in facts.values())
        start, end = self.span if self.span is not None else (1, blocks - 1)
        if start >= end:
            raise PlanError(
                f"the tasks have {blocks} blocks, and none between the first and the last",
                help="give a span, as (0, 1)",
            )
        keep = self._common_ratio(facts)
        sites = tuple(
            DropSite(name, start, end, keep, self.selector, self.mode, seed=self.seed, ragged=self.ragged)
            for name in facts
        )
        check_read_behind(facts, sites)
        options = {**self.options(), "span": [start, end]}
        return Plan(sites, exact=self.exact, policy=self.name, options=options)

    def search(self, facts: Facts) -> Search:
        """What the planner finds for the target.

        Raises:
            PlanError: there is no target, it cannot be met, or an option contradicts it.
        """
        if self.target_flops is None:
            raise PlanError(
                "the planner works towards target_flops, which is not given", help="give 0 < target_flops <= 1"
            )
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

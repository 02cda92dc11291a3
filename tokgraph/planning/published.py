"""Published token-reduction methods as plans, each with its source and how it departs from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts, TaskFacts
from tokgraph.ir.plan import DropSite, Plan, Projections

from .policy import Policy, option

Task = Literal["understanding", "generation"]


def of_kind(facts: Facts, kind: Task) -> list[TaskFacts]:
    """The tasks that read text (understanding) or predict visual tokens (generation).

    Raises:
        PlanError: the model has none.
    """
    found = [task for task in facts.values() if (task.demand.reads == "visual") == (kind == "generation")]
    if not found:
        raise PlanError(
            f"the model has no {kind} task, and this policy thins {kind} only",
            help="a task is generation where its loss reads visual tokens (reads='visual'), else understanding",
        )
    return found


def ratio(name: str, value: float) -> float:
    """``value``, when it is a ratio.

    Raises:
        PlanError: it is outside ``[0, 1]``.
    """
    if not 0.0 <= value <= 1.0:
        raise PlanError(f"{name}={value} is outside [0, 1]")
    return value


def block(name: str, value: int, task: TaskFacts, least: int = 0) -> int:
    """``value``, when it is a block of the task.

    Raises:
        PlanError: it is not.
    """
    if not least <= value < len(task.blocks):
        raise PlanError(
            f"{name}={value} is out of range: task {task.name!r} has {len(task.blocks)} blocks",
            help=f"give {least} <= {name} < {len(task.blocks)}",
        )
    return value


@dataclass(frozen=True)
class FastV(Policy):
    """Understanding without a part of its visual tokens from block ``k`` on, by what the prompt attends to.

    Source: Chen et al., arXiv 2403.06764. Departures: scores come from the last *prompt* token, in training as well (the
    last token of a teacher-forced row is the answer); rows that the loss demands stay.

    Args:
        k: first block that runs without the dropped tokens, at least 1; the paper's K.
        drop: ratio of visual tokens dropped; the paper's R.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "fastv"

    k: int = option(2, "1 <= k < L")
    drop: float = option(0.5, "0 <= drop <= 1")
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """One site an understanding task."""
        keep = 1.0 - ratio("drop", self.drop)
        sites = [
            DropSite(task.name, block("k", self.k, task, 1), None, keep, "attention", restore=False)
            for task in of_kind(facts, "understanding")
        ]
        return self.made(sites, self.exact)


@dataclass(frozen=True)
class PyramidDrop(Policy):
    """Understanding with fewer visual tokens stage by stage.

    Source: Xing et al., arXiv 2410.17247. Departure: scores as in ``fastv`` (attention weights of the last prompt token,
    not its raw products with the keys).

    Args:
        stages: stages of equal depth; the first is full.
        keep: ratio that each stage keeps of the one before.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "pyramiddrop"

    stages: int = option(4, "2 <= stages <= L")
    keep: float = option(0.5, "0 <= keep <= 1")
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """A nested site a stage but the first."""
        sites = []
        for task in of_kind(facts, "understanding"):
            depth = len(task.blocks)
            if not 2 <= self.stages <= depth:
                raise PlanError(f"stages={self.stages} is outside 2 .. {depth}, the blocks of task {task.name!r}")
            sites += [
                DropSite(
                    task.name, i * depth // self.stages, None, ratio("keep", self.keep) ** i, "attention", restore=False
                )
                for i in range(1, self.stages)
            ]
        return self.made(sites, self.exact)


@dataclass(frozen=True)
class RandomLTD(Policy):
    """Every middle block of every task skips its own random choice of visual tokens.

    Source: Yao et al., arXiv 2211.11586. Departures: visual tokens only (the paper drops any), and a constant ratio
    instead of a schedule. As in the paper, each training step draws anew.

    Args:
        keep: ratio of visual tokens that a middle block computes.
        seed: seed of the choice; block ``b`` takes ``seed + b``.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "random-ltd"

    keep: float = option(0.5, "0 <= keep <= 1")
    seed: int = option(0, "0 <= seed <= 2**63 + 1 - L")
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """One site a middle block and task."""
        short = next((task for task in facts.values() if len(task.blocks) < 3), None)
        if short is not None:
            raise PlanError(
                f"task {short.name!r} has {len(short.blocks)} blocks, and none between the first and the last"
            )
        if self.seed < 0:
            raise PlanError(f"seed={self.seed} is negative")
        sites = [
            DropSite(task.name, b, b + 1, ratio("keep", self.keep), "random", seed=self.seed + b)
            for task in facts.values()
            for b in range(1, len(task.blocks) - 1)
        ]
        return self.made(sites, self.exact)


@dataclass(frozen=True)
class Dart(Policy):
    """Understanding without the visual tokens that repeat others, from block ``k`` on.

    Source: Wen et al., arXiv 2502.11494. Departures: eight pivots, the rows of largest residual norm (the paper: of
    largest key norm, visual and text), and similarity is that of residual rows.

    Args:
        k: first block that runs without the dropped tokens.
        drop: ratio of visual tokens dropped.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "dart"

    k: int = option(2, "0 <= k < L")
    drop: float = option(0.5, "0 <= drop <= 1")
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """One site an understanding task."""
        keep = 1.0 - ratio("drop", self.drop)
        sites = [
            DropSite(task.name, block("k", self.k, task), None, keep, "similarity", restore=False)
            for task in of_kind(facts, "understanding")
        ]
        return self.made(sites, self.exact)


@dataclass(frozen=True)
class TaskSpecific(Policy):
    """Understanding without visual tokens in its late blocks; generation stays whole: cheap, and divergent.

    Source: the asymmetry that arXiv 2606.01503 found, followed to the letter; a baseline that ``shared`` is to beat.

    Args:
        start: where the drop begins, as a share of the depth.
        keep: ratio of visual tokens that stay.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "task-specific"

    start: float = option(0.5, "0 <= start < 1")
    keep: float = option(0.0, "0 <= keep <= 1")
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """One site an understanding task."""
        sites = []
        for task in of_kind(facts, "understanding"):
            first = int(ratio("start", self.start) * len(task.blocks))
            if first == len(task.blocks):
                raise PlanError(
                    f"start={self.start} leaves no block of task {task.name!r} to thin", help="give less than 1"
                )
            sites.append(DropSite(task.name, first, None, ratio("keep", self.keep), restore=False))
        return self.made(sites, self.exact)


def himix_sites(facts: Facts, projections: Projections) -> list[DropSite]:
    """Image rows of understanding are keys and values only, those of the first embeddings, in every block."""
    return [
        DropSite(task.name, 0, None, 0.0, mode="freeze", projections=projections)
        for task in of_kind(facts, "understanding")
    ]


def hmgen_sites(facts: Facts, skipped: int | None, projections: Projections) -> list[DropSite]:
    """Single blocks in the middle of generation run without image rows, alternating with full ones; in the full ones image
    rows may have projections of their own.
    """
    sites = []
    for task in of_kind(facts, "generation"):
        bare = _skipped(task, skipped)
        sites += [DropSite(task.name, b, b + 1, 0.0) for b in bare]
        if projections == "own":
            ends = [*bare, len(task.blocks)]
            spans = zip([0, *(b + 1 for b in bare)], ends, strict=True)
            sites += [DropSite(task.name, a, b, 1.0, projections="own") for a, b in spans if a < b]
    return sites


def _skipped(task: TaskFacts, skipped: int | None) -> range:
    depth = len(task.blocks)
    most = (depth - 1) // 2
    count = depth // 3 if skipped is None else skipped
    if most < 1:
        raise PlanError(f"task {task.name!r} has {depth} blocks, and none between the first and the last")
    if not 1 <= count <= most:
        raise PlanError(
            f"skipped={count} is outside 1 .. {most}: task {task.name!r} has {depth} blocks, and skipped ones alternate "
            "with full ones"
        )
    first = max(1, (depth - 2 * count + 1) // 2)
    return range(first, first + 2 * count, 2)


@dataclass(frozen=True)
class HiMix(Policy):
    """Understanding in which image rows serve as keys and values only, unchanged from the first block to the last.

    Source: Zhang et al., arXiv 2501.10318; the understanding accelerator of arXiv 2606.01503.

    Args:
        projections: ``"own"``: image rows have their own key and value projections, as published; ``"shared"``: the
            model's.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "himix"

    projections: Projections = "own"
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """One ``freeze`` site an understanding task."""
        return self.made(himix_sites(facts, self.projections), self.exact)


@dataclass(frozen=True)
class HMGen(Policy):
    """Generation in which some blocks in the middle run without image rows.

    Source: the generation accelerator of arXiv 2606.01503.

    Args:
        skipped: blocks that run without image rows; default: a third of the depth, ``L // 3``.
        projections: ``"own"``: in the full blocks image rows have their own query, key and value projections, as
            published; ``"shared"``: the model's.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "hmgen"

    skipped: int | None = option(None, "1 <= skipped <= (L - 1) // 2")
    projections: Projections = "own"
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """Single-block ``hide`` sites on every generation task, and sites with own projections between them."""
        return self.made(hmgen_sites(facts, self.skipped, self.projections), self.exact)


@dataclass(frozen=True)
class ShareAll(Policy):
    """HiMix on understanding and HMGen on generation, over shared projections: one of the paper's failing baselines.

    Source: arXiv 2606.01503, "HiMix-HMGen Share All".

    Args:
        skipped: as in ``hmgen``.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "himix-hmgen-share-all"

    skipped: int | None = option(None, "1 <= skipped <= (L - 1) // 2")
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """The sites of both."""
        return self.made([*himix_sites(facts, "shared"), *hmgen_sites(facts, self.skipped, "shared")], self.exact)


@dataclass(frozen=True)
class SharePartial(Policy):
    """HiMix on understanding and HMGen on generation, image rows of each with projections of their own.

    Source: arXiv 2606.01503, "HiMix-HMGen Share Partial": the other failing baseline. The tasks share all but the image
    projections, of which each has a set.

    Args:
        skipped: as in ``hmgen``.
        exact: also remove work that no demanded output reads.
    """

    name: ClassVar[str] = "himix-hmgen-share-partial"

    skipped: int | None = option(None, "1 <= skipped <= (L - 1) // 2")
    exact: bool = True

    def plan(self, facts: Facts) -> Plan:
        """The sites of both."""
        return self.made([*himix_sites(facts, "own"), *hmgen_sites(facts, self.skipped, "own")], self.exact)

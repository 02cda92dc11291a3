"""Published token-reduction methods as plans, each with its source and how it departs from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts, TaskFacts
from tokgraph.ir.plan import DropSite, Plan, Projections

from .options import Blocks, Kind, L, kind_of
from .policy import Exactly, Policy


def of_kind(facts: Facts, kind: Kind) -> list[TaskFacts]:
    """The tasks that read text (understanding) or predict visual tokens (generation).

    Raises:
        PlanError: the model has none.
    """
    found = [task for task in facts.values() if kind_of(task) == kind]
    if not found:
        raise PlanError(
            f"the model has no {kind} task, and this policy thins {kind} only",
            help="a task is generation where its loss reads visual tokens (reads='visual'), else understanding",
        )
    return found


Skipped = Annotated[
    int | None,
    Blocks(1, (L - 1) // 2, "generation"),
    Field(
        description="blocks that run without image rows, alternating with full ones; default: a third of the depth, L // 3"
    ),
]


@dataclass(frozen=True)
class FastV(Policy):
    """Understanding without a part of its visual tokens from block ``k`` on, by what the prompt attends to.

    Departures: scores come from the last *prompt* token, in training as well (the last token of a teacher-forced row is
    the answer); rows that the loss demands stay.
    """

    name: ClassVar[str] = "fastv"
    source: ClassVar[str] = "Chen et al., arXiv 2403.06764"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding",)

    k: Annotated[
        int,
        Blocks(1, L - 1, "understanding"),
        Field(description="first block that runs without the dropped tokens; the paper's K"),
    ] = 2
    drop: Annotated[float, Field(ge=0, le=1, description="ratio of visual tokens dropped; the paper's R")] = 0.5
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """One site an understanding task."""
        keep = 1.0 - self.drop
        sites = [
            DropSite(task.name, self.k, None, keep, "attention", restore=False)
            for task in of_kind(facts, "understanding")
        ]
        return self.made(sites, self.exact)


@dataclass(frozen=True)
class PyramidDrop(Policy):
    """Understanding with fewer visual tokens stage by stage.

    Departure: scores as in ``fastv`` (attention weights of the last prompt token, not its raw products with the keys).
    """

    name: ClassVar[str] = "pyramiddrop"
    source: ClassVar[str] = "Xing et al., arXiv 2410.17247"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding",)

    stages: Annotated[
        int, Blocks(2, L, "understanding"), Field(description="stages of equal depth; the first is full")
    ] = 4
    keep: Annotated[float, Field(ge=0, le=1, description="ratio that each stage keeps of the one before")] = 0.5
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """A nested site a stage but the first."""
        sites = []
        for task in of_kind(facts, "understanding"):
            depth = len(task.blocks)
            sites += [
                DropSite(task.name, i * depth // self.stages, None, self.keep**i, "attention", restore=False)
                for i in range(1, self.stages)
            ]
        return self.made(sites, self.exact)


@dataclass(frozen=True)
class RandomLTD(Policy):
    """Every middle block of every task skips its own random choice of visual tokens.

    Departures: visual tokens only (the paper drops any), and a constant ratio instead of a schedule. As in the paper, each
    training step draws anew.
    """

    name: ClassVar[str] = "random-ltd"
    source: ClassVar[str] = "Yao et al., arXiv 2211.11586"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding", "generation")

    keep: Annotated[float, Field(ge=0, le=1, description="ratio of visual tokens that a middle block computes")] = 0.5
    seed: Annotated[int, Blocks(0, 2**63 + 1 - L), Field(description="seed of the choice; block b takes seed + b")] = 0
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """One site a middle block and task."""
        short = next((task for task in facts.values() if len(task.blocks) < 3), None)
        if short is not None:
            raise PlanError(
                f"task {short.name!r} has {len(short.blocks)} blocks, and none between the first and the last"
            )
        sites = [
            DropSite(task.name, b, b + 1, self.keep, "random", seed=self.seed + b)
            for task in facts.values()
            for b in range(1, len(task.blocks) - 1)
        ]
        return self.made(sites, self.exact)


@dataclass(frozen=True)
class Dart(Policy):
    """Understanding without the visual tokens that repeat others, from block ``k`` on.

    Departures: eight pivots, the rows of largest residual norm (the paper: of largest key norm, visual and text), and
    similarity is that of residual rows.
    """

    name: ClassVar[str] = "dart"
    source: ClassVar[str] = "Wen et al., arXiv 2502.11494"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding",)

    k: Annotated[
        int,
        Blocks(0, L - 1, "understanding"),
        Field(description="first block that runs without the dropped tokens"),
    ] = 2
    drop: Annotated[float, Field(ge=0, le=1, description="ratio of visual tokens dropped")] = 0.5
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """One site an understanding task."""
        keep = 1.0 - self.drop
        sites = [
            DropSite(task.name, self.k, None, keep, "similarity", restore=False)
            for task in of_kind(facts, "understanding")
        ]
        return self.made(sites, self.exact)


@dataclass(frozen=True)
class TaskSpecific(Policy):
    """Understanding without visual tokens in its late blocks; generation stays whole: cheap, and divergent.

    The asymmetry that its source found, followed to the letter; a baseline that ``shared`` is to beat.
    """

    name: ClassVar[str] = "task-specific"
    source: ClassVar[str] = "the asymmetry that arXiv 2606.01503 found"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding",)

    start: Annotated[float, Field(ge=0, lt=1, description="where the drop begins, as a share of the depth")] = 0.5
    keep: Annotated[float, Field(ge=0, le=1, description="ratio of visual tokens that stay")] = 0.0
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """One site an understanding task."""
        sites = []
        for task in of_kind(facts, "understanding"):
            first = int(self.start * len(task.blocks))
            sites.append(DropSite(task.name, first, None, self.keep, restore=False))
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
    count = depth // 3 if skipped is None else skipped
    if depth < 3:
        raise PlanError(f"task {task.name!r} has {depth} blocks, and none between the first and the last")
    first = max(1, (depth - 2 * count + 1) // 2)
    return range(first, first + 2 * count, 2)


@dataclass(frozen=True)
class HiMix(Policy):
    """Understanding in which image rows serve as keys and values only, unchanged from the first block to the last.

    The understanding accelerator of arXiv 2606.01503.
    """

    name: ClassVar[str] = "himix"
    source: ClassVar[str] = "Zhang et al., arXiv 2501.10318"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding",)

    projections: Annotated[
        Projections,
        Field(
            description="own: image rows have their own key and value projections, as published; shared: the model's"
        ),
    ] = "own"
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """One ``freeze`` site an understanding task."""
        return self.made(himix_sites(facts, self.projections), self.exact)


@dataclass(frozen=True)
class HMGen(Policy):
    """Generation in which some blocks in the middle run without image rows."""

    name: ClassVar[str] = "hmgen"
    source: ClassVar[str] = "arXiv 2606.01503"
    thins: ClassVar[tuple[Kind, ...]] = ("generation",)

    skipped: Skipped = None
    projections: Annotated[
        Projections,
        Field(
            description="own: in the full blocks image rows have their own query, key and value projections, as published; "
            "shared: the model's"
        ),
    ] = "own"
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """Single-block ``hide`` sites on every generation task, and sites with own projections between them."""
        return self.made(hmgen_sites(facts, self.skipped, self.projections), self.exact)


@dataclass(frozen=True)
class ShareAll(Policy):
    """HiMix on understanding and HMGen on generation, over shared projections: one of the paper's failing baselines."""

    name: ClassVar[str] = "himix-hmgen-share-all"
    source: ClassVar[str] = "arXiv 2606.01503, HiMix-HMGen Share All"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding", "generation")

    skipped: Skipped = None
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """The sites of both."""
        return self.made([*himix_sites(facts, "shared"), *hmgen_sites(facts, self.skipped, "shared")], self.exact)


@dataclass(frozen=True)
class SharePartial(Policy):
    """HiMix on understanding and HMGen on generation, image rows of each with projections of their own.

    The paper's other failing baseline: the tasks share all but the image projections, of which each has a set.
    """

    name: ClassVar[str] = "himix-hmgen-share-partial"
    source: ClassVar[str] = "arXiv 2606.01503, HiMix-HMGen Share Partial"
    thins: ClassVar[tuple[Kind, ...]] = ("understanding", "generation")

    skipped: Skipped = None
    exact: Exactly = True

    def decide(self, facts: Facts) -> Plan:
        """The sites of both."""
        return self.made([*himix_sites(facts, "own"), *hmgen_sites(facts, self.skipped, "own")], self.exact)

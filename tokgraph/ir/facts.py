"""What analysis finds, as data: visual flow, blocks, attention and demand of each task, and its accounts on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tokgraph.errors import AnalysisError

from .blocks import Between, Block, Unplaced
from .cost import TaskCost
from .program import Dimension, Program


@dataclass(frozen=True)
class VisualFlow:
    """Where the visual tokens of a task are.

    Args:
        kind: ``"ids"``: an id range of ``source``; ``"mask"``: ``source`` is the mask; ``"range"``: a range of positions.
        entry: node at which visual and text rows are together for the first time.
        count: visual tokens of each sample, the fewest in the example batch.
        runs: contiguous runs of visual tokens in a sample, the most in the example batch.
        source: the ids ``[batch, tokens]`` or the mask (``[batch, tokens]``, and trailing axes of size 1).
        low: smallest id (``"ids"``).
        high: largest id, inclusive (``"ids"``).
        start: first position (``"range"``); negative: from the end.
        stop: position after the last (``"range"``); ``None``: the end.
        before: ``(node, axis)`` pairs whose sizes are to be added to ``start`` and ``stop`` (what is put before); of a mask:
            the rows that are joined before those of ``source``.
        after: the same of rows that are joined behind those of ``source``.
        padding: rows of zeros before and behind those of ``source``.
        branch: nodes that make visual rows before ``entry``.
        most: visual tokens of a sample, the most in the example batch; 0: ``count``.
        mean: visual tokens of a sample on average; 0: ``count``.
        step: greatest common divisor of the samples' numbers of visual tokens: every multiple of ``1 / step`` is a whole
            number of tokens in all of them; 0: ``count``.
    """

    kind: Literal["ids", "mask", "range"]
    entry: str
    count: int
    runs: int
    source: str | None = None
    low: int | None = None
    high: int | None = None
    start: int = 0
    stop: int | None = None
    before: tuple[tuple[str, int], ...] = ()
    after: tuple[tuple[str, int], ...] = ()
    padding: tuple[int, int] = (0, 0)
    branch: tuple[str, ...] = ()
    most: int = 0
    mean: float = 0
    step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "most", self.most or self.count)
        object.__setattr__(self, "mean", self.mean or self.count)
        object.__setattr__(self, "step", self.step or self.count)

    @property
    def ragged(self) -> bool:
        """Whether samples hold different numbers of visual tokens."""
        return self.most != self.count


@dataclass(frozen=True)
class Demand:
    """Which rows the task's loss reads.

    Args:
        reads: ``"text"``, ``"visual"`` or ``"all"``.
        rows: demanded rows of a sample, the most in the example batch.
        visual: visual ones among them, the most in the example batch.
        tokens: length of the token axis in the example batch.
        even: every sample has the same number of demanded visual rows.
        free: visual rows of a sample that are not demanded, the fewest in the example batch.
    """

    reads: Literal["text", "visual", "all"]
    rows: int
    visual: int
    tokens: int
    even: bool
    free: int = 0


@dataclass(frozen=True)
class Window:
    """A slice of the token axis that something after the last block reads.

    Args:
        node: the slice.
        length: rows it takes, in the example batch.
        demanded: demanded rows among them, the most in the example batch.
        visual: visual rows among them, the most in the example batch.
    """

    node: str
    length: int
    demanded: int
    visual: int


@dataclass(frozen=True)
class Prompt:
    """Where the labels of a task are: they tell its prompt from its answer.

    Args:
        targets: node of the labels, ``[batch, rows]`` int64, already shifted: row ``i`` says what comes after it.
        ignore_index: the label of rows that have none.
        first: position on the token axis of the labels' first row.
    """

    targets: str
    ignore_index: int
    first: int


class Accounts(Protocol):
    """Pathways and costs of a task. They take longer than all other facts, so they are worked out when first asked for."""

    @property
    def profile(self) -> Mapping[str, float]:
        """Parameter name -> share of the task's demanded-reaching visual tokens that it transforms, in ``[0, 1]``."""

    @property
    def cost(self) -> TaskCost:
        """What a training step of the captured graph costs, symbolic in batch, tokens and visual tokens."""

    @property
    def exact_cost(self) -> TaskCost:
        """The same without work that no demanded output reads."""


@dataclass(frozen=True)
class KnownAccounts:
    """Accounts that were worked out elsewhere.

    Args:
        profile: as in :class:`Accounts`, and so the others.
        cost: the captured graph's.
        exact_cost: that without work that no demanded output reads.
    """

    profile: Mapping[str, float]
    cost: TaskCost
    exact_cost: TaskCost


@dataclass(frozen=True)
class TaskFacts:
    """Everything analysis knows of one task.

    Args:
        name: the task.
        entry: node that is the stream's first value, ``[batch, tokens, hidden]``.
        blocks: decoder blocks in order.
        visual: where visual tokens are.
        demand: which rows are read.
        exits: nodes that read the stream after the last block.
        windows: slices of the token axis after the last block.
        token_axes: node -> its axes that are the token axis (query and key axes alike).
        accounts: pathways and costs; ``None`` for facts without them.
        prompt: where the labels are, ``None`` when no loss over rows of the token axis was recognised.
        dimensions: dimensions asked to be dynamic.
        unruled: ``(node, operator)`` of operators inside blocks that have no rule.
        unplaced: attentions over the token axis whose layers are no blocks. Where there are some, block numbers are no
            layer numbers, and no drop site can be placed by them.
        between: what is added between two blocks and may be part of either; then, too, no drop site can be placed.
        unfound: where ``unplaced`` names attentions: why their layers could not be told apart; empty: it is not known.
    """

    name: str
    entry: str
    blocks: tuple[Block, ...]
    visual: VisualFlow
    demand: Demand
    exits: tuple[str, ...]
    windows: tuple[Window, ...]
    token_axes: Mapping[str, tuple[int, ...]] = field(repr=False)
    accounts: Accounts | None = field(repr=False, compare=False, default=None)
    prompt: Prompt | None = None
    dimensions: tuple[Dimension, ...] = ()
    unruled: tuple[tuple[str, str], ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    between: tuple[Between, ...] = ()
    unfound: str = ""

    @property
    def stream(self) -> tuple[str, ...]:
        """The residual cut points: one before every block and one after the last."""
        return (*(block.start for block in self.blocks), self.blocks[-1].end)

    @property
    def states(self) -> tuple[str, ...]:
        """All values that cross the boundaries of blocks; of one stream these are its cut points."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in (*block.before, *block.after)))

    @property
    def profile(self) -> Mapping[str, float]:
        """As in :class:`Accounts`."""
        return self._accounts().profile

    @property
    def cost(self) -> TaskCost:
        """As in :class:`Accounts`."""
        return self._accounts().cost

    @property
    def exact_cost(self) -> TaskCost:
        """As in :class:`Accounts`."""
        return self._accounts().exact_cost

    def _accounts(self) -> Accounts:
        if self.accounts is None:
            raise AnalysisError(
                f"the facts of task {self.name!r} hold no pathways and costs", help="use those of tokgraph.analyze"
            )
        return self.accounts


class Facts(Mapping[str, TaskFacts]):
    """A captured program and what analysis finds of it: task name -> :class:`TaskFacts`.

    Args:
        tasks: the facts of each task.
        program: the captured program; ``None`` for facts that were made by hand, on which policies can plan.
    """

    def __init__(self, tasks: Mapping[str, TaskFacts], program: Program | None = None) -> None:
        self._tasks = dict(tasks)
        self._program = program

    @property
    def program(self) -> Program:
        """The captured program.

        Raises:
            AnalysisError: the facts were made by hand.
        """
        if self._program is None:
            raise AnalysisError("these facts know no program", help="use those of tokgraph.analyze")
        return self._program

    def of(self, program: Program) -> Facts:
        """The same facts for another program of these graphs, which may have some of the tasks only.

        Raises:
            AnalysisError: the program has other graphs.
        """
        known = self._program
        if known is not None and any(known.get(name) is not graph for name, graph in program.items()):
            raise AnalysisError(
                "these facts are of another program",
                help="analyse the program that you have: tokgraph.analyze(program)",
            )
        return self if program is known else Facts(self._tasks, program)

    def __getitem__(self, task: str) -> TaskFacts:
        return self._tasks[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def shared_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that every task's visual tokens pass."""
        return shared_parameters(self.values())


class _Profiled(Protocol):
    @property
    def profile(self) -> Mapping[str, float]: ...


def shared_parameters(tasks: Iterable[_Profiled]) -> tuple[str, ...]:
    """Names of the parameters that every task's visual tokens pass."""
    names = [{p for p, share in task.profile.items() if share > 0} for task in tasks]
    return tuple(sorted(set.intersection(*names))) if names else ()


def facts_before(program: Program | Facts, facts: Any, rest: Any) -> tuple[Facts, Any]:
    """``(facts, rest)`` of the arguments of a call, where the program may stand before its facts.

    Args:
        program: facts, or the program that they are of.
        facts: the facts, or, where these come first, what follows them.
        rest: what follows the facts.

    Raises:
        TypeError: there are no facts among them.
        AnalysisError: the facts are of another program.
    """
    if isinstance(program, Facts):
        return program, facts if rest is None else rest
    if not isinstance(facts, Facts):
        raise TypeError("give the facts of the program: tokgraph.analyze(program)")
    return facts.of(program), rest

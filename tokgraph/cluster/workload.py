"""What a GPU has to do in a step, as numbers: micro-batches of tasks by part, and the tensors that parts read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from tokgraph.ir.cluster import Cluster
from tokgraph.ir.facts import Facts
from tokgraph.ir.precomputed import called_at
from tokgraph.ir.program import Program
from tokgraph.ir.rates import Rates
from tokgraph.passes.lower.part_costs import PartCost, part_costs


@dataclass(frozen=True)
class TaskWork:
    """A micro-batch of one task.

    Args:
        weight: share of micro-batches that are of it.
        tokens: text and image, of all its samples.
        input_bytes: of the batch.
        parts: before the blocks, each block, after them.
    """

    weight: float
    tokens: int
    input_bytes: int
    parts: tuple[PartCost, ...]


@dataclass(frozen=True)
class Held:
    """A parameter or buffer; tied ones are one.

    Args:
        bytes: of it.
        elements: how many numbers.
        trained: a gradient and an optimizer's states go with it.
        parts: those that read it, in any task; none: it is on every GPU, whole.
    """

    bytes: int
    elements: int
    trained: bool
    parts: frozenset[int]

    @property
    def gradient(self) -> int:
        """Bytes of its gradient."""
        return self.bytes if self.trained else 0

    @property
    def states(self) -> int:
        """Bytes that AdamW keeps: two moments in float32 or wider, and a copy in float32 of what has 16 bits."""
        width = self.bytes // max(self.elements, 1)
        return self.elements * (2 * max(4, width) + (4 if width < 4 else 0)) if self.trained else 0


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Args:
        tasks: by name, all with as many parts.
        held: tensors of the model, and of the plan.
    """

    tasks: Mapping[str, TaskWork]
    held: tuple[Held, ...]

    @property
    def parts(self) -> range:
        """Numbers of the parts."""
        return range(len(next(iter(self.tasks.values())).parts))

    @property
    def blocks(self) -> range:
        """Those that are blocks."""
        return range(1, len(self.parts) - 1)

    @property
    def tokens(self) -> float:
        """Of the mean micro-batch."""
        return sum(task.weight * task.tokens for task in self.tasks.values())

    def mean(self, amount: Callable[[PartCost], float], parts: Iterable[int]) -> float:
        """An amount of some parts, of the mean micro-batch."""
        chosen = tuple(parts)
        return sum(task.weight * sum(amount(task.parts[i]) for i in chosen) for task in self.tasks.values())

    def read(self) -> list[Held]:
        """Tensors that a task reads."""
        return [x for x in self.held if x.parts]

    def unread_bytes(self) -> int:
        """Of all others."""
        return sum(x.bytes for x in self.held if not x.parts)

    def of_block(self, part: int) -> list[Held]:
        """Tensors that one block alone reads: FSDP2 gathers them for it."""
        return [x for x in self.held if x.parts == {part} and part in self.blocks]

    def around(self) -> list[Held]:
        """Tensors that are read around the blocks, or by several parts: the whole module gathers them."""
        return [x for x in self.read() if len(x.parts) > 1 or not x.parts <= set(self.blocks)]


def workload(program: Program, facts: Facts, mix: Mapping[str, float], cluster: Cluster) -> Workload:
    """The workload of a captured or rewritten program.

    Args:
        program: the program.
        facts: of the captured program.
        mix: task -> share of micro-batches.
        cluster: whose rates are the roofline's.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    types = {p.dtype for p in program.model.parameters() if p.is_floating_point()} or {torch.float32}
    rates = Rates("cluster", dict.fromkeys(types, cluster.flops), cluster.bandwidth)
    parts = {name: part_costs(graph, rates) for name, graph in program.items()}
    longest = max(map(len, parts.values()))
    tasks = {name: _task(program, name, facts, mix[name], _padded(found, longest)) for name, found in parts.items()}
    return Workload(tasks, tuple(_held(program, tasks)))


def _padded(parts: tuple[PartCost, ...], length: int) -> tuple[PartCost, ...]:
    """Parts of a task whose decoder is shorter than that of another: what is behind the blocks comes last in all."""
    empty = (PartCost.nothing(f"block {i - 1}") for i in range(len(parts) - 1, length - 1))
    return (*parts[:-1], *empty, parts[-1])


def _task(program: Program, name: str, facts: Facts, weight: float, parts: tuple[PartCost, ...]) -> TaskWork:
    sizes = facts[name].cost.sizes
    assert sizes is not None
    given = [x for x in pytree.tree_leaves(dict(program[name].task.inputs)) if isinstance(x, torch.Tensor)]
    tokens = sizes.example_of("batch") * sizes.example_of("tokens")
    return TaskWork(weight, tokens, sum(x.nbytes for x in given), parts)


def _held(program: Program, tasks: Mapping[str, TaskWork]) -> Iterable[Held]:
    """Every tensor of the model and of the plan, with the parts that read it."""
    model = program.model
    found: dict[int, tuple[torch.Tensor, set[int]]] = {}
    for x in (*model.parameters(), *model.buffers()):
        found[id(x)] = x, set()
    for name, graph in program.items():
        named = graph.named_parameters()
        for i, part in enumerate(tasks[name].parts):
            for read in (named[parameter] for parameter in part.parameters):
                found.setdefault(id(read), (read, set()))[1].add(i)
    for x in _before_the_graph(program):
        if not found[id(x)][1]:
            found[id(x)][1].add(0)
    for x, parts in found.values():
        trained = bool(parts) and x.requires_grad
        yield Held(x.numel() * x.element_size(), x.numel(), trained, frozenset(parts))


def _before_the_graph(program: Program) -> Iterable[torch.Tensor]:
    """Parameters of what is precomputed, or of the module whose method it is."""
    for name in program:
        for path in program.spec.tasks[name].precomputed:
            yield from called_at(program.model, path)[0].parameters()

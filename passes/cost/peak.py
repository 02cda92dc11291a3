"""The most memory that a training step has in use at once, from the graph alone.

A step is replayed as PyTorch runs it: values go when their last reader has run, what autograd keeps goes when it is read
in the backward pass, gradients of parameters stay. A gradient that an operator hands on as it is takes no memory of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from torch import fx

from tokgraph.ir.node import output_args, tensor
from tokgraph.ir.program import TaskGraph, loss_node
from tokgraph.ir.values import plain

from .works import Counted, Held, count_nodes, example_number

Number = Callable[[Any], int]
Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Peak:
    """Bytes in use beyond what was there before the step: parameters, their gradients of steps before, and the batch.

    Args:
        bytes: at most.
        at: the node that runs then.
        phase: ``"forward"`` or ``"backward"``.
        kept: at the end of the forward pass, for the backward pass.
        gradients: of parameters, at the end of the step.
    """

    bytes: int
    at: str
    phase: Phase
    kept: int
    gradients: int


def peak_memory(graph: TaskGraph, counted: Counted | None = None) -> Peak:
    """The peak of one training step on the example batch; ``counted`` spares counting anew.

    What kernels take for themselves while they run is not known, nor what an allocator rounds up. Attention counts as
    its fused kernel.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    memory, kept, gradients = _replayed(graph, counted)
    (phase, node), most = max(memory.most.items(), key=lambda item: item[1])
    return Peak(most, node.name, phase, kept, gradients)


def memory_by_call(graph: TaskGraph, counted: Counted | None = None) -> dict[tuple[Phase, fx.Node], int]:
    """The most bytes in use while each call runs, in either phase, counted as the peak is (:func:`peak_memory`).

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    return _replayed(graph, counted)[0].most


def _replayed(graph: TaskGraph, counted: Counted | None) -> tuple[_Memory, int, int]:
    """A step replayed; bytes kept at the end of the forward pass, and those of gradients at the end."""
    of_example = example_number(graph)

    def number(amount: Any) -> int:
        return int(of_example(amount))

    memory = _Memory()
    held = (counted or count_nodes(graph)).held
    forward = _Forward(graph, held, number, memory)
    forward.run()
    kept = memory.now
    return memory, kept, _Backward(forward, held, number, memory).run(loss_node(graph))


class _Memory:
    """Bytes in use, and the most that there were while each call ran."""

    def __init__(self) -> None:
        self.now = 0
        self.most: dict[tuple[Phase, fx.Node], int] = {}

    def take(self, amount: int, node: fx.Node, phase: Phase, for_now: int = 0) -> None:
        """Allocate; ``for_now`` is given back at once."""
        self.now += amount
        self.most[phase, node] = max(self.most.get((phase, node), 0), self.now + for_now)

    def free(self, amount: int) -> None:
        """Give back."""
        self.now -= amount


class _Forward:
    """Replays the forward pass.

    Args:
        graph: the task graph.
        held: call -> what it holds.
        number: an amount in symbols -> its value.
        memory: what is in use.
    """

    def __init__(self, graph: TaskGraph, held: Mapping[fx.Node, Held], number: Number, memory: _Memory) -> None:
        self._graph, self._held, self._number, self._memory = graph, held, number, memory
        self._sizes = {node: number(x.bytes) for node, x in held.items() if x.storage is node}
        self._holders: Counter[fx.Node] = Counter()  # of a storage: values with readers to come, and backwards to come

    def run(self) -> None:
        """From the first node to the last; only the loss is held then, and what is kept."""
        dying = _last_readers(self._graph.graph)
        outputs = [n for n in output_args(self._graph.graph) if n in self._held and n is not loss_node(self._graph)]
        for node, x in self._held.items():
            size = self._sizes.get(node, 0) + self._number(x.beside)
            self._memory.take(size, node, "forward", for_now=x.workspace[0])
            self._holders[x.storage] += 1
            self._holders.update(x.saved)
            for done in dying[node]:
                if done in self._held:
                    self.release(self._held[done].storage)
        for node in outputs:
            self.release(self._held[node].storage)

    def release(self, storage: fx.Node) -> None:
        """One that held a storage does so no more."""
        self._holders[storage] -= 1
        if not self._holders[storage]:
            self._memory.free(self._sizes.get(storage, 0))


@dataclass
class _Buffer:
    """Memory of a gradient, and how many hold it."""

    bytes: int
    holders: int = 1


class _Backward:
    """Replays the backward pass, in the reverse order of the forward pass, as autograd's engine runs it.

    Args:
        forward: the forward pass, done.
        held: call -> what it holds.
        number: an amount in symbols -> its value.
        memory: what is in use.
    """

    def __init__(self, forward: _Forward, held: Mapping[fx.Node, Held], number: Number, memory: _Memory) -> None:
        self._forward, self._held, self._number, self._memory = forward, held, number, memory
        self._pending: dict[fx.Node, _Buffer] = {}

    def run(self, loss: fx.Node) -> int:
        """From the loss to the parameters, whose gradients stay; returns the bytes of those."""
        self._pending[loss] = self._new(loss, loss)
        for node, x in reversed([*self._held.items()]):
            mine = self._pending.pop(node, None)
            if mine is not None:
                self._step(node, x, mine)
        return sum(buffer.bytes for node, buffer in self._pending.items() if node.op == "get_attr")

    def _step(self, node: fx.Node, x: Held, mine: _Buffer) -> None:
        for i, passed in x.gradients.items():
            if passed:
                mine.holders += 1
            self._give(i, mine if passed else self._new(i, node), node)
        self._memory.take(0, node, "backward", for_now=x.workspace[1])
        self._release(mine)
        for storage in x.saved:
            self._forward.release(storage)
        self._memory.free(self._number(x.beside))

    def _give(self, to: fx.Node, more: _Buffer, node: fx.Node) -> None:
        """Add to a gradient: in place where nobody else holds what is there."""
        there = self._pending.get(to)
        if there is None:
            self._pending[to] = more
            return
        if there.holders > 1:
            self._pending[to] = self._new(to, node)
            self._release(there)
        self._release(more)

    def _new(self, like: fx.Node, node: fx.Node) -> _Buffer:
        found = tensor(like)
        made = _Buffer(0 if found is None else self._number(prod(map(plain, found.shape), start=found.element_size())))
        self._memory.take(made.bytes, node, "backward")
        return made

    def _release(self, buffer: _Buffer) -> None:
        buffer.holders -= 1
        if not buffer.holders:
            self._memory.free(buffer.bytes)


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that nothing after it reads, as ``fx`` deletes them."""
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for read in (node, *node.all_input_nodes):
            if read not in seen:
                seen.add(read)
                found[node].append(read)
    return found

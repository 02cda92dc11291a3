"""What each part of a training step takes: before the blocks, every block, after them; bytes, FLOPs and least seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokgraph.ir.program import TaskGraph
from tokgraph.ir.rates import Rates
from tokgraph.ir.tensors import read, tensor_name

from ..cost.peak import memory_by_call
from ..cost.roofline import NodeTime, roofline
from ..cost.works import Counted, Held, count_nodes, example_number
from .pieces import block_count, floors_of

Number = Callable[[Any], float]


@dataclass(frozen=True)
class PartCost:
    """What a part of one task's training step takes on the example batch.

    Args:
        title: ``"before the blocks"``, ``"block 3"``, ``"after the blocks"``.
        parameters: names of those that it reads.
        gradients: bytes of gradients of parameters that no later part reads.
        forward_flops: of the forward pass.
        backward_flops: of the backward pass.
        forward: seconds of the forward pass by the roofline.
        backward: of the backward pass.
        kept: bytes that it adds to what is kept for the backward pass; what is kept already counts in the part before.
        kept_again: the same where blocks keep what they read only, and compute the rest again (activation checkpointing).
        forward_peak: most bytes in use in its forward pass, beyond what the parts before it keep.
        backward_peak: most in its backward pass, beyond that and the gradients of the parts after it.
        sent: bytes of values, of this part or of one before it, that later parts read.
        sent_back: bytes of their gradients.
    """

    title: str
    parameters: tuple[str, ...]
    gradients: int
    forward_flops: int
    backward_flops: int
    forward: float
    backward: float
    kept: int
    kept_again: int
    forward_peak: int
    backward_peak: int
    sent: int
    sent_back: int

    @property
    def is_block(self) -> bool:
        """Whether it is a decoder block, which can be computed again."""
        return self.title.startswith("block ")

    @classmethod
    def nothing(cls, title: str) -> PartCost:
        """A part in which nothing is done."""
        return cls(title, (), 0, 0, 0, 0.0, 0.0, 0, 0, 0, 0, 0, 0)


def part_costs(graph: TaskGraph, rates: Rates, counted: Counted | None = None) -> tuple[PartCost, ...]:
    """The parts of a captured or rewritten graph, in the order in which they run.

    Bytes that are kept sum to those of :func:`.kept.kept_bytes`, and the highest of the peaks, what is kept before and the
    gradients after it added, is the one of :func:`tokgraph.passes.cost.peak.peak_memory`.

    Args:
        graph: the graph; its calls carry their places.
        rates: of the machine that it runs on.
        counted: spares counting anew.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    counted = counted or count_nodes(graph)
    number, floors = example_number(graph), floors_of(graph.graph)
    last = block_count(graph.graph) + 1
    count = _Parts(graph, counted.held, number, floors, last)
    flops, seconds = count.flops(counted), count.seconds(roofline(graph, rates, counted))
    kept, again = count.kept(checkpoint=False), count.kept(checkpoint=True)
    names, gradients = count.parameters()
    forward, backward = count.peaks(memory_by_call(graph, counted), kept, gradients)
    sent, sent_back = count.sent()
    titles = ["before the blocks", *(f"block {i}" for i in range(last - 1)), "after the blocks"]
    return tuple(
        PartCost(
            title=titles[i],
            parameters=tuple(names[i]),
            gradients=gradients[i],
            forward_flops=round(flops[i][0]),
            backward_flops=round(flops[i][1]),
            forward=seconds[i][0],
            backward=seconds[i][1],
            kept=kept[i],
            kept_again=again[i],
            forward_peak=forward[i],
            backward_peak=backward[i],
            sent=sent[i],
            sent_back=sent_back[i],
        )
        for i in range(last + 1)
    )


class _Parts:
    """Adds amounts of calls up, part by part.

    Args:
        graph: the graph.
        held: call -> what it holds.
        number: an amount in symbols -> its value.
        floors: call -> its part.
        last: number of the last part.
    """

    def __init__(
        self, graph: TaskGraph, held: Mapping[fx.Node, Held], number: Number, floors: Mapping[fx.Node, int], last: int
    ) -> None:
        self._graph, self._held, self._number, self._floors, self._last = graph, held, number, floors, last
        self._bytes = {node: round(number(x.bytes)) for node, x in held.items() if x.storage is node}

    def _sums(self, amounts: Iterable[tuple[int, float]]) -> list[int]:
        found = [0.0] * (self._last + 1)
        for part, amount in amounts:
            found[part] += amount
        return [round(x) for x in found]

    def flops(self, counted: Counted) -> list[tuple[float, float]]:
        """Forward and backward FLOPs."""
        return self._pairs(
            (self._floors[node], self._number(work.forward_flops), self._number(work.backward_flops))
            for node, work in counted.works.items()
        )

    def seconds(self, times: Iterable[NodeTime]) -> list[tuple[float, float]]:
        """Forward and backward seconds."""
        by_name = {node.name: part for node, part in self._floors.items()}
        return self._pairs((by_name[time.node], time.forward, time.backward) for time in times)

    def _pairs(self, amounts: Iterable[tuple[int, float, float]]) -> list[tuple[float, float]]:
        found = [(0.0, 0.0)] * (self._last + 1)
        for part, forward, backward in amounts:
            found[part] = found[part][0] + forward, found[part][1] + backward
        return found

    def kept(self, checkpoint: bool) -> list[int]:
        """Bytes kept for the backward pass, of what no part before keeps."""
        seen: set[fx.Node] = set()

        def new(node: fx.Node, x: Held) -> float:
            part = self._floors[node]
            if checkpoint and 0 < part < self._last:
                entering = (i for i in node.all_input_nodes if i in self._held and self._floors[i] != part)
                storages, beside = {self._held[i].storage for i in entering}, 0.0
            else:
                storages, beside = set(x.saved), self._number(x.beside)
            fresh = {s for s in storages - seen if s in self._bytes}
            seen.update(fresh)
            return beside + sum(self._bytes[s] for s in fresh)

        in_order = sorted(
            self._held.items(), key=lambda item: self._floors[item[0]]
        )  # stable: as the graph within a part
        return self._sums((self._floors[node], new(node, x)) for node, x in in_order)

    def parameters(self) -> tuple[list[list[str]], list[int]]:
        """Names that each part reads, and bytes of the gradients of which it is the last reader."""
        names: list[list[str]] = [[] for _ in range(self._last + 1)]
        gradients = [0] * (self._last + 1)
        module = self._graph.graph_module
        for node in self._graph.graph.find_nodes(op="get_attr"):
            x, parts = read(module, node), {self._floors[user] for user in node.users if user in self._floors}
            if isinstance(x, torch.nn.Parameter) and parts:
                for part in parts:
                    names[part].append(tensor_name(node))
                if x.requires_grad:
                    gradients[max(parts)] += x.numel() * x.element_size()
        return names, gradients

    def peaks(
        self, most: Mapping[tuple[Any, fx.Node], int], kept: list[int], gradients: list[int]
    ) -> tuple[list[int], list[int]]:
        """The most in use in each part, forward and backward, beyond what is kept before it and gradients after it."""
        highest: dict[tuple[str, int], int] = defaultdict(int)
        reached = self._reached()
        for (phase, node), amount in most.items():
            key = phase, reached[node]
            highest[key] = max(highest[key], amount)
        parts = range(self._last + 1)
        return (
            [max(0, highest["forward", i] - sum(kept[:i])) for i in parts],
            [max(0, highest["backward", i] - sum(kept[:i]) - sum(gradients[i + 1 :])) for i in parts],
        )

    def _reached(self) -> dict[fx.Node, int]:
        """Call -> the part that runs when it does: what belongs to an earlier part may stand late in the graph, as a choice of
        rows that the loss reads, and what is made of parameters alone anywhere.
        """
        found: dict[fx.Node, int] = {}
        fixed: set[fx.Node] = set()
        now = 0
        for node in self._graph.graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and fixed.issuperset(node.all_input_nodes)):
                fixed.add(node)
            elif node in self._floors:
                now = max(now, self._floors[node])
            found[node] = now
        return found

    def sent(self) -> tuple[list[int], list[int]]:
        """Bytes that lead over the end of each part, and those of their gradients."""
        until: dict[fx.Node, int] = {}
        learning: set[fx.Node] = set()
        for node, x in self._held.items():
            for i in node.all_input_nodes:
                if i in self._held:
                    storage = self._held[i].storage
                    until[storage] = max(until.get(storage, 0), self._floors[node])
            learning.update(self._held[i].storage for i in x.gradients if i in self._held)
        ends = [
            (part, self._bytes[s], s in learning)
            for s, reader in until.items()
            if s in self._bytes
            for part in range(self._floors[s], reader)
        ]
        return self._sums((p, n) for p, n, _ in ends), self._sums((p, n) for p, n, learns in ends if learns)

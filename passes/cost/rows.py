"""Which rows the axes of values hold: the samples of a batch, rows of the token axis, or both in one axis.

Rows are followed from where visual and text rows are together, forwards through everything that is computed row by row,
and back again to what those values are computed from row by row (a table of positions that is added to the stream).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal

import torch
from torch import fx

from tokgraph.ir.evaluate import evaluate
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import ancestors, argument, axis_argument, by_name, dims, rank, same_size, tensor
from tokgraph.ir.program import TaskGraph

from ..emitter import is_selection, selection
from ..rewrite.pushdown import NARROWED
from ..rules import axis_map
from ..rules.registry import Axis, AxisMap, first_input

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph

SAMPLES: Final = "samples"
_RESTORES = (tokgraph.restore.default, tokgraph.restore_range.default)
_MERGES = (tokgraph.merge.default, tokgraph.merge_range.default, tokgraph.join.default)
Chain = tuple[fx.Node, ...]
"""Rows of the token axis: indices, each relative to the rows that the one before left; ``()`` is all of them."""
Held = tuple[Chain | Literal["samples"], ...]
"""What one axis holds, outermost first: samples, rows of a chain, or both when a reshape merged the two axes."""


def held_rows(graph: fx.Graph, facts: TaskFacts) -> dict[Axis, Held]:
    """What the axes of values hold, for the axes that hold samples or rows of the token axis.

    A convolution over the token axis keeps its rows where it keeps their number: row ``i`` of the output is the window
    around row ``i``. Any other operator that mixes rows ends them, as does one without a rule.
    """
    follow = _Follow(graph, facts)
    follow.forwards()
    follow.backwards()
    follow.forwards()  # what was found on the way back has other readers
    return follow.found


def row_spaces(graph: fx.Graph, facts: TaskFacts) -> dict[Axis, Chain]:
    """The rows that token axes hold, and axes that hold them together with the samples."""
    held = held_rows(graph, facts)
    return {axis: part for axis, parts in held.items() for part in parts if part != SAMPLES}


def visual_rows(
    graph: TaskGraph, visual: torch.Tensor, chains: Iterable[Chain], padding: bool = True
) -> dict[Chain, torch.Tensor]:
    """Which rows of each chain are visual: ``[batch, rows]`` bool, for the task's inputs.

    Args:
        graph: the graph that the chains' indices are of.
        visual: ``[batch, tokens]`` bool, the visual tokens of the task's inputs.
        chains: the chains.
        padding: rows that are there only to make samples equally long count as well.

    Raises:
        AnalysisError: an index depends on values that have no storage.
    """
    chains = set(chains)
    indices = sorted({index for chain in chains for index in chain})
    lost = {} if padding else _lost_rows(graph.graph)
    wanted = [*indices, *sorted(set(lost.values()))]
    values = dict(zip(wanted, evaluate(graph, wanted), strict=True)) if indices else {}
    found = {}
    for chain in chains:
        rows = visual
        for index in chain:
            if index in lost:
                rows = rows & ~values[lost[index]].to(rows.device)
            at = values[index].to(rows.device)
            if at.dtype is torch.bool:  # rows that a mask takes, written in their own places
                rows = rows & at.reshape(-1, rows.shape[1])
                continue
            at = at.unsqueeze(0).flatten(0, -2)  # one row of it may serve all samples; there may be none
            samples = max(rows.shape[0], at.shape[0])
            rows = rows.expand(samples, -1).gather(1, at.expand(samples, -1))
        found[chain] = rows
    return found


def _lost_rows(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Index of a site -> the rows that the site drops, some of which the index keeps as padding."""
    lost = {node.args[:2]: node for node in graph.find_nodes(op="call_function", target=tokgraph.lost_rows.default)}
    kept = graph.find_nodes(op="call_function", target=tokgraph.keep_rows.default)
    return {node: lost[node.args[:2]] for node in kept if node.args[:2] in lost}


def place_rows(node: fx.Node, held: Mapping[Axis, Held], rows: Mapping[Chain, torch.Tensor]) -> torch.Tensor | None:
    """The rows of a node that are visual, as a mask that broadcasts against its value.

    A value with two row axes (scores of queries and keys) goes by the first of them: its rows are those of the queries.

    Args:
        node: the node.
        held: what the axes of its graph hold.
        rows: chain -> ``[batch, rows]`` bool.

    Returns:
        Bool of the value's rank, ``None`` where the value holds no rows, or the rows of no particular sample.
    """
    here = {axis: held[node, axis] for axis in range(rank(node)) if (node, axis) in held}
    along = next((axis for axis, parts in here.items() if set(parts) != {SAMPLES}), None)
    if along is None:
        return None
    (chain,) = (part for part in here[along] if part != SAMPLES)
    mask, shape = rows[chain], [1] * rank(node)
    if SAMPLES in here[along]:
        shape[along] = -1
        return (mask if here[along][0] == SAMPLES else mask.t()).reshape(shape)
    samples = next((axis for axis, parts in here.items() if parts == (SAMPLES,)), None)
    if samples is None:
        return None
    shape[samples], shape[along] = mask.shape
    return (mask if samples < along else mask.t()).reshape(shape)


class _Follow:
    """Finds what the axes of a graph's values hold.

    Args:
        graph: a task graph, rewritten or not.
        facts: the task's facts.
    """

    def __init__(self, graph: fx.Graph, facts: TaskFacts) -> None:
        nodes = by_name(graph)
        entry = nodes.get(facts.visual.entry, nodes.get(facts.entry))
        self.found: dict[Axis, Held] = {}
        self._calls = [node for node in graph.nodes if node.op == "call_function" and tensor(node) is not None]
        self._rules: dict[fx.Node, AxisMap | None] = {}
        # rows of either operand go into the rows of where(mask, image, text), but each is of one kind only
        self._meets = {n for n in ancestors([entry] if entry else []) if n.target is aten.where.self}
        if entry is not None:
            self._samples = dims(entry)[0]
            self.found |= dict.fromkeys(self._whole(entry, 0), (SAMPLES,))
            self.found |= dict.fromkeys(self._whole(entry, 1), ((),))

    def _rule(self, node: fx.Node) -> AxisMap | None:
        if node not in self._rules:
            self._rules[node] = axis_map(node)
        return self._rules[node]

    def _whole(self, entry: fx.Node, axis: int) -> set[Axis]:
        """The nearest axes, at the entry or before it, that hold all rows that the entry's axis is computed from."""
        found: set[Axis] = set()
        stack: list[Axis] = [(entry, axis)]
        while stack:
            node, axis = stack.pop()
            described = self._rule(node)
            if is_selection(node):
                stack.append((selection(node)[0], axis))
            elif described is not None and node.meta.get(NARROWED):
                stack.extend(described.rows[axis] or ())
            else:
                found.add((node, axis))
        return found

    def forwards(self) -> None:
        """From inputs to what is computed from them."""
        for node in self._calls:
            if is_selection(node):
                x, index, dim, _ = selection(node)
                for axis in range(rank(x)):
                    self._note((node, axis), self._narrowed((x, axis), index if axis == dim else None))
            elif node.target in _RESTORES:
                for axis in (0, 1):
                    self._note((node, axis), self.found.get((first_input(node), axis)))
            elif node.target in _MERGES:  # of two selections that part the rows of one chain
                others = first_input(node)
                self._note((node, 0), self.found.get((others, 0)))
                chain = _only_rows(self.found.get((others, 1), (SAMPLES,)))
                order = (node.args[2],) if node.target is tokgraph.join.default else ()
                self._note((node, 1), ((*chain[:-1], *order),) if chain else None)
            else:
                if node.target is aten.index_select.default:
                    self._take(node)
                elif node.target is aten.index_put.default:
                    self._put(node)
                merged, parted = self._regrouped(node)
                for one, two in merged:
                    self._merge(two, one)
                for one, two in parted:
                    self._part(one, two)
                for axis, source in (*self._row_by_row(node), *self._in_place(node)):
                    self._note((node, axis), self.found.get(source))

    def backwards(self) -> None:
        """From values to what they are computed from, row by row."""
        for node in reversed(self._calls):
            if is_selection(node):
                x, index, dim, _ = selection(node)
                for axis in range(rank(x)):
                    self._note((x, axis), self._widened((node, axis), index if axis == dim else None))
            elif node.target not in _RESTORES and node not in self._meets:
                merged, parted = self._regrouped(node)
                for one, two in parted:
                    self._merge(two, one)
                for one, two in merged:
                    self._part(one, two)
                for axis, source in self._row_by_row(node):
                    self._note(source, self.found.get((node, axis)))

    def _note(self, axis: Axis, parts: Held | None) -> None:
        if parts is not None:
            self.found.setdefault(axis, parts)

    def _take(self, node: fx.Node) -> None:
        """Rows that an expert takes: the true places of a mask over samples and rows, or positions in all samples."""
        x, index, axis = first_input(node), argument(node, "index"), axis_argument(node, node)
        parts, mask = self.found.get((x, axis), ()), counted_mask(index)
        if parts.count(SAMPLES) == len(parts) - 1 and (mask is not None or len(parts) == 1):
            taken = mask or index
            self._note((node, axis), tuple(p if p == SAMPLES else (*p, taken) for p in parts))

    def _put(self, node: fx.Node) -> None:
        """The value that an expert puts its rows into."""
        rows, places = argument(node, "values"), argument(node, "indices")
        axis, index = len(places) - 1, places[-1]
        parts = self.found.get((rows, axis), ()) if rank(rows) == rank(node) else ()
        if any(places[:-1]) or not parts:
            return
        taken = counted_mask(index) or index
        if all(p == SAMPLES or p[-1:] == (taken,) for p in parts):
            self._note((node, axis), tuple(p if p == SAMPLES else p[:-1] for p in parts))
            if SAMPLES not in parts:
                self._note((node, 0), self.found.get((rows, 0)))

    def _narrowed(self, axis: Axis, index: fx.Node | None) -> Held | None:
        """What is left of an axis after a selection by ``index``, if it is one along that axis."""
        parts = self.found.get(axis)
        if parts is None or index is None:
            return parts
        chain = _only_rows(parts)
        return None if chain is None else ((*chain, index),)

    def _widened(self, axis: Axis, index: fx.Node | None) -> Held | None:
        """What an axis was before a selection by ``index``, if it is one along that axis."""
        parts = self.found.get(axis)
        if parts is None or index is None:
            return parts
        chain = _only_rows(parts)
        return (chain[:-1],) if chain and chain[-1] is index else None

    def _row_by_row(self, node: fx.Node) -> list[tuple[int, Axis]]:
        described = self._rule(node)
        if described is None:
            return []
        return [(axis, source) for axis, rows in enumerate(described.rows) for source in rows or ()]

    def _in_place(self, node: fx.Node) -> list[tuple[int, Axis]]:
        """Axes whose rows are mixed but keep their places."""
        described = self._rule(node)
        if described is None:
            return []
        windows = [axis for mix in described.mixes if mix.kind == "window" for axis in mix.axes]
        same = [
            (axis, (x, axis))
            for x, axis in windows
            if described.rows[axis] is None and rank(x) == rank(node) and same_size(dims(x)[axis], dims(node)[axis])
        ]
        return [*described.aligned, *same]

    def _regrouped(self, node: fx.Node) -> tuple[list[tuple[Axis, Axis]], list[tuple[Axis, Axis]]]:
        """``(one axis, the first of two)`` where a reshape makes one axis of two, and where it makes two of one."""
        described = self._rule(node)
        groups = described.groups if described is not None else ()
        merged = [g for g in groups if len(g.inputs) == 2]
        parted = sorted((g for g in groups if len(g.outputs) == 2), key=lambda g: g.outputs.start)
        x = first_input(node) if groups else node
        return (
            [((node, g.outputs.start), (x, g.inputs.start)) for g in merged],
            [((x, g.inputs.start), (node, g.outputs.start)) for g in parted],
        )

    def _merge(self, two: Axis, one: Axis) -> None:
        """Samples and rows that a reshape makes one axis of."""
        x, first = two
        parts = (*self.found.get((x, first), ()), *self.found.get((x, first + 1), ()))
        if len(parts) == 2 and parts.count(SAMPLES) == 1:
            self._note(one, parts)

    def _part(self, one: Axis, two: Axis) -> None:
        """Samples and rows that a reshape makes two axes of."""
        y, first = two
        parts = self.found.get(one, ())
        if len(parts) == 2 and same_size(dims(y)[first + parts.index(SAMPLES)], self._samples):
            for offset, part in enumerate(parts):
                self._note((y, first + offset), (part,))


def counted_mask(index: fx.Node) -> fx.Node | None:
    """The mask whose true places an index counts."""
    while index.target in (aten.squeeze.dim, aten.reshape.default):
        index = first_input(index)
    if index.target is not aten.nonzero.default:
        return None
    mask = first_input(index)
    return first_input(mask) if mask.target is aten.reshape.default else mask


def is_routed(chain: Chain) -> bool:
    """Whether rows are missing from a chain for the only reason that an expert does not take them."""
    return all(rank(index) == 1 or index.meta["val"].dtype is torch.bool for index in chain)


def _only_rows(parts: Held) -> Chain | None:
    """The chain of an axis that holds nothing else."""
    (part,) = parts if len(parts) == 1 else (SAMPLES,)
    return None if part == SAMPLES else part

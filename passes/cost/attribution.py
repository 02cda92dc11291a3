"""Whose work it is: every node's cost given to a block, a region, a module and a kind of token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from tokgraph.ir.cost import NodeCost, Region, TaskCost
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import dims, module_path, rank, tensor, tensor_inputs
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.sizes import Sizes, expression

from ..rules import axis_map
from ..rules.registry import Axis
from .known_sizes import CountedRows, EncoderGrowth, WindowRows, task_sizes
from .pathways import visual_counts
from .rows import SAMPLES, Chain, held_rows, is_routed
from .works import count_nodes

aten = torch.ops.aten


def task_cost(graph: TaskGraph, facts: TaskFacts) -> TaskCost:
    """The cost of one training step of a captured or rewritten graph.

    Where its sizes come from, and what is assumed of them: :mod:`.sizes`.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    sizes = task_sizes(graph, facts)
    encoder = EncoderGrowth(graph, facts, sizes)
    rows = CountedRows(graph, sizes)
    counted = count_nodes(graph, lambda node, amount: rows.resize(encoder.resize(node, amount)))
    locate = Locator(graph, facts)
    share = _Shares(graph, facts, sizes, rows)
    nodes = []
    for node, work in counted.works.items():
        region, block = locate.of(node)
        visual, text = share.of(node, region)
        path, op = module_path(node), str(node.target)
        nodes.append(NodeCost(node.name, op, path, region, block, work, visual, text, share.degree(node)))
    assumed = rows.assumed + (
        () if share.planned else encoder.assumed + share.assumed
    )  # a plan fixes the number of visual tokens
    sizes = replace(sizes, planned=share.planned, assumed=assumed)
    return TaskCost(graph.name, tuple(nodes), sizes, counted.uncounted)


class Locator:
    """Finds the region and block of a node; what a rewrite added belongs where the node it serves was."""

    def __init__(self, graph: TaskGraph, facts: TaskFacts) -> None:
        self._blocks = {name: block.index for block in facts.blocks for name in block.nodes}
        self._modules = {block.module: block.index for block in facts.blocks if block.module}
        self._branch = set(facts.visual.branch)
        order = [node.name for node in graph.graph.nodes]
        first = set(facts.blocks[0].nodes)
        ends = [i for i, name in enumerate(order) if name in first][:1]
        self._position = {name: i for i, name in enumerate(order)}
        self._start = ends[0] if ends else 0

    def of(self, node: fx.Node) -> tuple[Region, int | None]:
        """The region, and the block where it is one."""
        if node.name in self._blocks:
            return "block", self._blocks[node.name]
        if node.name in self._branch:
            return "encoder", None
        path = module_path(node)
        while path:
            if path in self._modules:
                return "block", self._modules[path]
            path = path.rpartition(".")[0]
        return ("input" if self._position[node.name] <= self._start else "head"), None


class _Shares:
    """Tells which share of a node's rows is visual, and which is not."""

    def __init__(self, graph: TaskGraph, facts: TaskFacts, sizes: Sizes, counted: CountedRows) -> None:
        held = held_rows(graph.graph, facts)
        self._spaces: dict[Axis, Chain] = {axis: x for axis, parts in held.items() for x in parts if x != SAMPLES}
        self._merged = {axis for axis, parts in held.items() if len(parts) == 2}
        self._known: dict[Any, tuple[Any, Any]] = {}
        counts = visual_counts(graph, facts, set(self._spaces.values()))
        self._counts: dict[Chain, Any] = {chain: sympy.nsimplify(count) for chain, count in counts.items()}
        self._counts[()] = sizes.names["visual"]
        self._sizes, self._resize = sizes, counted.resize
        self.planned = not all(map(is_routed, self._counts))
        if not self.planned:  # experts take the same share of more rows
            grown = sizes.names["visual"] / max(1, sizes.example_of("visual"))
            self._counts |= {chain: count * grown for chain, count in self._counts.items() if chain}
        windows = WindowRows(facts, sizes, self.planned)
        self._spaces |= self._windows(graph.graph, facts, windows)
        self.assumed = windows.assumed

    def _windows(self, graph: fx.Graph, facts: TaskFacts, windows: WindowRows) -> dict[Axis, Chain]:
        """Rows of slices of the token axis after the last block, and of what is computed from them row by row."""
        found: dict[Axis, Chain] = {}
        slices = {window.node: window for window in facts.windows}
        for node in graph.nodes:
            if node.name in slices and (node, 1) not in self._spaces:
                found[node, 1] = (node,)
                self._counts[node,] = windows.visual(node, slices[node.name])
            described = axis_map(node) if found and node.op == "call_function" and tensor(node) is not None else None
            for axis, rows in enumerate(described.rows if described else ()):
                source = next((found[x] for x in rows or () if x in found), None)
                if source is not None:
                    found.setdefault((node, axis), source)
        return found

    def of(self, node: fx.Node, region: Region) -> tuple[Any, Any]:
        """``(visual, text)``; both 0 without a token axis."""
        if region == "encoder":
            return 1, 0
        axis = self._row_axis(node)
        if axis is None:
            return 0, 0
        size, count, merged = dims(axis[0])[axis[1]], self._counts[self._spaces[axis]], axis in self._merged
        key = (size, count, merged)
        if key not in self._known:
            rows = expression(self._resize(expression(size))) / (self._sizes.names["batch"] if merged else 1)
            share = sympy.Min(1, count / sympy.expand(rows)) if rows != 0 else sympy.Integer(0)
            self._known[key] = (share, 1 - share)
        return self._known[key]

    def degree(self, node: fx.Node) -> int:
        """The power of the number of tokens that a node's FLOPs grow with."""
        if node.target is aten.scaled_dot_product_attention.default:
            return 2  # it makes scores on its way
        held = [sum((x, axis) in self._spaces for axis in range(rank(x))) for x in (node, *tensor_inputs(node))]
        return min(2, max(held))

    def _row_axis(self, node: fx.Node) -> Axis | None:
        """The first axis that holds rows of the stream: the node's own, or (a contraction) its inputs'."""
        for x in (node, *tensor_inputs(node)):
            if tensor(x) is not None:
                found = next(((x, a) for a in range(rank(x)) if (x, a) in self._spaces), None)
                if found is not None:
                    return found
        return None

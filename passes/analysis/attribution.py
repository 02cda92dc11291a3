"""Whose work it is: every node's cost given to a block, a region, a module and a kind of token."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from tokgraph.cost import NodeCost, Region, Sizes, TaskCost
from tokgraph.facts import TaskFacts
from tokgraph.fxnode import dims, module_path, rank, tensor, tensor_inputs
from tokgraph.program import TaskGraph

from ..rules import axis_map
from ..rules.registry import Axis
from .cost import example_symbols, node_works, uncounted
from .pathways import visual_counts
from .rows import Chain, row_spaces

VISUAL = sympy.Symbol("visual", integer=True, nonnegative=True)
"""Visual tokens of a sample, where no symbol of the graph says how many there are."""


def task_cost(graph: TaskGraph, facts: TaskFacts) -> TaskCost:
    """The cost of one training step of a captured or rewritten graph.

    Visual tokens whose number the graph's shapes show are symbolic with them. Else (ids or a mask say where they are)
    the number is a symbol of its own, and the encoder's work is taken to grow with it, image by image.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    works = node_works(graph)
    sizes = _sizes(graph, facts)
    locate = _Locator(graph, facts)
    share = _Shares(graph, facts, sizes.names["visual"])
    grows = sizes.names["visual"] / facts.visual.count if facts.visual.kind != "range" else sympy.Integer(1)
    nodes = []
    for node, work in works.items():
        region, block = locate.of(node)
        visual, text = share.of(node, region)
        scaled = work.scaled(grows) if region == "encoder" and grows != 1 else work
        nodes.append(NodeCost(node.name, str(node.target), module_path(node), region, block, scaled, visual, text))
    return TaskCost(graph.name, tuple(nodes), sizes, uncounted(works))


def _sizes(graph: TaskGraph, facts: TaskFacts) -> Sizes:
    nodes = {node.name: node for node in graph.graph.nodes}
    stream = next(n for name in (facts.entry, facts.visual.entry) if (n := nodes.get(name)) is not None)
    batch, tokens = (sympy.sympify(d) for d in dims(stream)[:2])
    example = example_symbols(graph)
    visual: sympy.Expr = sympy.Integer(facts.visual.count)
    if facts.visual.kind == "range":
        visual = _range_length(nodes, facts, tokens)
    else:
        visual, example = VISUAL, {**example, VISUAL: facts.visual.count}
    by_symbol = {str(symbol): symbol for symbol in example}
    named = {name: by_symbol[symbol] for symbol, name in graph.symbol_names().items() if symbol in by_symbol}
    return Sizes(graph.name, {**named, "batch": batch, "tokens": tokens, "visual": visual}, example)


def _range_length(nodes: dict[str, fx.Node], facts: TaskFacts, tokens: sympy.Expr) -> sympy.Expr:
    """Length of a range of positions, as an expression where it reaches the end of the token axis."""
    flow = facts.visual
    if flow.stop is not None or flow.start < 0 or any(name not in nodes for name, _ in flow.before):
        return sympy.Integer(flow.count)
    return sympy.expand(tokens - flow.start - sum(sympy.sympify(dims(nodes[n])[axis]) for n, axis in flow.before))


class _Locator:
    """Finds the region and block of a node; what a rewrite added belongs where the node it serves was."""

    def __init__(self, graph: TaskGraph, facts: TaskFacts) -> None:
        self._blocks = {name: block.index for block in facts.blocks for name in block.nodes}
        self._modules = {block.module: block.index for block in facts.blocks if block.module}
        self._branch = set(facts.visual.branch)
        order = [node.name for node in graph.graph.nodes]
        ends = [order.index(name) for name in (facts.blocks[0].start, facts.entry) if name in order]
        self._position = {name: i for i, name in enumerate(order)}
        self._start = ends[0] if ends else 0

    def of(self, node: fx.Node) -> tuple[Region, int | None]:
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

    def __init__(self, graph: TaskGraph, facts: TaskFacts, visual: sympy.Expr) -> None:
        self._spaces = row_spaces(graph.graph, facts)
        self._known: dict[Any, tuple[Any, Any]] = {}
        counts = visual_counts(graph, facts, set(self._spaces.values()))
        self._counts: dict[Chain, Any] = {chain: sympy.nsimplify(count) for chain, count in counts.items()}
        self._counts[()] = visual
        self._spaces |= self._windows(graph.graph, facts)

    def _windows(self, graph: fx.Graph, facts: TaskFacts) -> dict[Axis, Chain]:
        """Rows of slices of the token axis after the last block, and of what is computed from them row by row."""
        found: dict[Axis, Chain] = {}
        slices = {window.node: window for window in facts.windows}
        for node in graph.nodes:
            if node.name in slices and (node, 1) not in self._spaces:
                found[node, 1] = (node,)
                self._counts[node,] = sympy.Integer(slices[node.name].visual)
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
        rows, count = dims(axis[0])[axis[1]], self._counts[self._spaces[axis]]
        if (rows, count) not in self._known:
            share = sympy.Min(1, count / sympy.sympify(rows)) if rows != 0 else sympy.Integer(0)
            self._known[rows, count] = (share, 1 - share)
        return self._known[rows, count]

    def _row_axis(self, node: fx.Node) -> Axis | None:
        """The first axis that holds rows of the stream: the node's own, or (a contraction) its inputs'."""
        for x in (node, *tensor_inputs(node)):
            if tensor(x) is not None:
                found = next(((x, a) for a in range(rank(x)) if (x, a) in self._spaces), None)
                if found is not None:
                    return found
        return None

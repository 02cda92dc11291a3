"""Whose work it is: every node's cost given to a block, a region, a module and a kind of token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from tokgraph.ir.cost import NodeCost, Region, TaskCost
from tokgraph.ir.facts import TaskFacts, Window
from tokgraph.ir.node import argument, by_name, dims, module_path, rank, tensor, tensor_inputs, value
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.sizes import Sizes, expression

from ..rules import axis_map
from ..rules.registry import Axis
from .pathways import visual_counts
from .rows import SAMPLES, Chain, held_rows
from .works import count_nodes, example_symbols

aten = torch.ops.aten
VISUAL = sympy.Symbol("visual", integer=True, nonnegative=True)
"""Visual tokens of a sample, where no symbol of the graph says how many there are."""


def task_cost(graph: TaskGraph, facts: TaskFacts) -> TaskCost:
    """The cost of one training step of a captured or rewritten graph.

    Visual tokens whose number the graph's shapes show are symbolic with them. Else (ids or a mask say where they are)
    the number is a symbol of its own, and the encoder's work is taken to grow with it, image by image.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
    sizes = _sizes(graph, facts)
    counted = count_nodes(graph, _Encoder(graph, facts, sizes).resize)
    locate = Locator(graph, facts)
    share = _Shares(graph, facts, sizes)
    nodes = []
    for node, work in counted.works.items():
        region, block = locate.of(node)
        visual, text = share.of(node, region)
        path, op = module_path(node), str(node.target)
        nodes.append(NodeCost(node.name, op, path, region, block, work, visual, text, share.degree(node)))
    if share.planned:
        sizes = replace(sizes, planned=True)
    return TaskCost(graph.name, tuple(nodes), sizes, counted.uncounted)


def _sizes(graph: TaskGraph, facts: TaskFacts) -> Sizes:
    nodes = by_name(graph.graph)
    stream = next(n for name in (facts.entry, facts.visual.entry) if (n := nodes.get(name)) is not None)
    batch, tokens = (expression(d) for d in dims(stream)[:2])
    example = example_symbols(graph)
    visual = (
        _range_length(nodes, facts, tokens) if facts.visual.kind == "range" else _images(stream, nodes, facts, example)
    )
    if visual is None:
        visual, example = VISUAL, {**example, VISUAL: facts.visual.count}
    by_symbol = {str(symbol): symbol for symbol in example}
    named = {name: by_symbol[symbol] for symbol, name in graph.symbol_names().items() if symbol in by_symbol}
    return Sizes(graph.name, {**named, "batch": batch, "tokens": tokens, "visual": visual}, example)


def _range_length(nodes: dict[str, fx.Node], facts: TaskFacts, tokens: sympy.Expr) -> sympy.Expr:
    """Length of a range of positions, as an expression where it reaches the end of the token axis."""
    flow = facts.visual
    if flow.stop is not None or flow.start < 0 or any(name not in nodes for name, _ in flow.before):
        return expression(sympy.Integer(flow.count))
    before = sum(expression(dims(nodes[n])[axis]) for n, axis in flow.before)
    return expression(sympy.expand(tokens - flow.start - before))


def _images(
    stream: fx.Node, nodes: dict[str, fx.Node], facts: TaskFacts, example: dict[sympy.Symbol, int]
) -> sympy.Expr | None:
    """Visual tokens of a sample, where the encoder's rows have a symbol of their own (as many images as there are)."""
    entry = nodes.get(facts.visual.entry)
    made = [] if entry is None else [x for x in tensor_inputs(entry) if x.name in facts.visual.branch]
    if not made or rank(stream) != 3:
        return None
    batch, tokens, width = (expression(d) for d in dims(stream))
    rows = sympy.cancel(sympy.prod([expression(d) for d in dims(made[-1])]) / (width * batch))
    own = rows.free_symbols - batch.free_symbols - tokens.free_symbols
    return rows if own and rows.xreplace(example) == facts.visual.count else None


class _Encoder:
    """Lets the encoder grow with the visual tokens where its shapes do not say how many images there are.

    As many images as the batch has samples stand for one image a sample; each brings the example batch's visual tokens.
    Where the batch is fixed, all amounts grow alike.
    """

    def __init__(self, graph: TaskGraph, facts: TaskFacts, sizes: Sizes) -> None:
        branch = {node for node in graph.graph.nodes if node.name in facts.visual.branch}
        pixels = {
            x for node in branch if tensor(node) is not None for x in node.all_input_nodes if x.op == "placeholder"
        }
        self._nodes = branch | pixels if sizes.names["visual"] is VISUAL else set()
        self._grows = VISUAL / facts.visual.count
        self._images = {symbol: symbol * self._grows for symbol in sizes.names["batch"].free_symbols}
        self._known: dict[Any, Any] = {}

    def resize(self, node: fx.Node, amount: Any) -> Any:
        """An amount of the node: FLOPs or bytes."""
        if node not in self._nodes or amount == 0:
            return amount
        if amount not in self._known:
            grown = expression(amount).xreplace(self._images) if self._images else amount * self._grows
            self._known[amount] = grown
        return self._known[amount]


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

    def __init__(self, graph: TaskGraph, facts: TaskFacts, sizes: Sizes) -> None:
        held = held_rows(graph.graph, facts)
        self._spaces: dict[Axis, Chain] = {axis: x for axis, parts in held.items() for x in parts if x != SAMPLES}
        self._merged = {axis for axis, parts in held.items() if len(parts) == 2}
        self._known: dict[Any, tuple[Any, Any]] = {}
        counts = visual_counts(graph, facts, set(self._spaces.values()))
        self._counts: dict[Chain, Any] = {chain: sympy.nsimplify(count) for chain, count in counts.items()}
        self._counts[()] = sizes.names["visual"]
        self._sizes = sizes
        self.planned = any(self._counts)
        self._spaces |= self._windows(graph.graph, facts)

    def _windows(self, graph: fx.Graph, facts: TaskFacts) -> dict[Axis, Chain]:
        """Rows of slices of the token axis after the last block, and of what is computed from them row by row."""
        found: dict[Axis, Chain] = {}
        slices = {window.node: window for window in facts.windows}
        for node in graph.nodes:
            if node.name in slices and (node, 1) not in self._spaces:
                found[node, 1] = (node,)
                self._counts[node,] = self._in_window(node, slices[node.name], facts)
            described = axis_map(node) if found and node.op == "call_function" and tensor(node) is not None else None
            for axis, rows in enumerate(described.rows if described else ()):
                source = next((found[x] for x in rows or () if x in found), None)
                if source is not None:
                    found.setdefault((node, axis), source)
        return found

    def _in_window(self, node: fx.Node, window: Window, facts: TaskFacts) -> sympy.Expr:
        """Visual rows of a slice, where their number grows with the sequence."""
        visual, tokens = self._sizes.names["visual"], self._sizes.names["tokens"]
        length = expression(dims(node)[1])
        if self.planned or not visual.free_symbols or not length.free_symbols:
            return expression(sympy.Integer(window.visual))
        if facts.visual.kind != "range":  # where they are is not known: the slice leaves out as many as in the example
            return sympy.Max(0, visual - (facts.visual.count - window.visual))
        start, end = _bound(argument(node, "start"), 0, tokens), _bound(argument(node, "end"), tokens, tokens)
        return sympy.Max(0, sympy.Min(end, tokens) - sympy.Max(start, tokens - visual))

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
            rows = expression(size) / (self._sizes.names["batch"] if merged else 1)
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


def _bound(bound: Any, default: Any, tokens: sympy.Expr) -> sympy.Expr:
    """A bound of a slice of the token axis as a position."""
    if isinstance(bound, fx.Node):
        bound = value(bound)
    if bound is None or (isinstance(bound, int) and bound >= 2**31):
        return expression(default if bound is None else tokens)
    found = expression(bound.node.expr if isinstance(bound, torch.SymInt) else bound)
    return tokens + found if found.is_negative else found

"""Where a task's sizes come from: what the shapes of its graph show, and what is assumed where they do not.

Known are the batch and the length of the sequence, which are sizes of the residual stream, and the number of visual
tokens where it is the length of a range of positions, or where the rows that the encoder makes have a symbol of their
own. Where ids or a mask say which tokens are visual, no shape shows how many: the number is then a symbol of its own
(:data:`VISUAL`), and what grows with it is assumed. Each assumption is a sentence in ``Sizes.assumed``; none matters at
the sizes of the example batch.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts, Window
from tokgraph.ir.node import argument, by_name, dims, rank, tensor, tensor_inputs, value
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.sizes import Sizes, expression

from .works import example_symbols

VISUAL = sympy.Symbol("visual", integer=True, nonnegative=True)
"""Visual tokens of a sample, where no symbol of the graph says how many there are."""


def task_sizes(graph: TaskGraph, facts: TaskFacts) -> Sizes:
    """A task's named sizes in the symbols of its graph.

    Raises:
        AnalysisError: a size depends on values that have no storage.
    """
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


class EncoderGrowth:
    """Lets the encoder grow with the visual tokens where its shapes do not say how many images there are.

    As many images as the batch has samples stand for one image a sample; each brings the example batch's visual tokens.
    Where the batch is fixed, all amounts grow alike.

    Attributes:
        assumed: what is assumed, in words; ``()`` where shapes tell.
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
        each = f"{facts.visual.count} visual tokens"
        how = f"an image for every {each} of a sample" if self._images else f"in proportion to them, from {each} on"
        self.assumed = (f"the encoder grows with the number of visual tokens: {how}",) if self._nodes else ()

    def resize(self, node: fx.Node, amount: Any) -> Any:
        """An amount of the node: FLOPs or bytes."""
        if node not in self._nodes or amount == 0:
            return amount
        if amount not in self._known:
            grown = expression(amount).xreplace(self._images) if self._images else amount * self._grows
            self._known[amount] = grown
        return self._known[amount]


class CountedRows:
    """Lets rows that are counted on each batch, as those that go to an expert, be as large a share as in the example batch.

    Attributes:
        assumed: what is assumed, in words; ``()`` where no row is counted.
    """

    def __init__(self, graph: TaskGraph, sizes: Sizes) -> None:
        example: dict[Any, Any] = dict(sizes.example)
        self._counted: dict[Any, Any] = {}
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.nonzero.default):
            whole = sympy.prod([expression(size) for size in dims(tensor_inputs(node)[0])])
            for symbol in expression(dims(node)[0]).free_symbols:
                if whole.free_symbols and whole.xreplace(example) > 0:
                    self._counted[symbol] = whole * sympy.Rational(example[symbol], int(whole.xreplace(example)))
        shared = "as large a share of the rows goes to each expert as in the example batch"
        self.assumed = (shared,) if self._counted else ()

    def resize(self, amount: Any) -> Any:
        """An amount without these numbers of rows."""
        return amount.xreplace(self._counted) if self._counted and isinstance(amount, sympy.Basic) else amount


class WindowRows:
    """Tells how many rows of slices of the token axis are visual, also where their number grows with the sequence.

    Args:
        facts: the task's facts.
        sizes: its sizes.
        planned: rows are dropped, for the number of visual tokens of the example batch and no other.

    Attributes:
        assumed: what is assumed, in words, of the slices asked for so far.
    """

    def __init__(self, facts: TaskFacts, sizes: Sizes, planned: bool) -> None:
        self._facts = facts
        self._sizes = sizes
        self._planned = planned
        self.assumed: tuple[str, ...] = ()

    def visual(self, node: fx.Node, window: Window) -> sympy.Expr:
        """Visual rows of a slice."""
        visual, tokens = self._sizes.names["visual"], self._sizes.names["tokens"]
        length = expression(dims(node)[1])
        if self._planned or not visual.free_symbols or not length.free_symbols:
            return expression(sympy.Integer(window.visual))
        if self._facts.visual.kind != "range":  # where they are is not known
            left_out = self._facts.visual.count - window.visual
            self.assumed += (f"slice {node.name} of the sequence leaves out {left_out} visual tokens at any size",)
            return sympy.Max(0, visual - left_out)
        start, end = _bound(argument(node, "start"), 0, tokens), _bound(argument(node, "end"), tokens, tokens)
        return sympy.Max(0, sympy.Min(end, tokens) - sympy.Max(start, tokens - visual))


def _bound(bound: Any, default: Any, tokens: sympy.Expr) -> sympy.Expr:
    """A bound of a slice of the token axis as a position."""
    if isinstance(bound, fx.Node):
        bound = value(bound)
    if bound is None or (isinstance(bound, int) and bound >= 2**31):
        return expression(default if bound is None else tokens)
    found = expression(bound.node.expr if isinstance(bound, torch.SymInt) else bound)
    return tokens + found if found.is_negative else found

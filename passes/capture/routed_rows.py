"""Rows that modules take for themselves, as experts of modalities do, and put back: a choice between values of every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import dims, rank, same_size, same_sizes, tensor, tensor_inputs, value

from ..contract import GraphPass
from ..emitter import Emitter, remove_dead_code
from ..rules import axis_map, traits
from ..rules.registry import first_input
from .routed_masks import Masks
from .routes import Put, Routes, product
from .row_groups import All, regrouped
from .total import is_total

aten = torch.ops.aten
routed = torch.ops.tokgraph.routed.default


@dataclass(frozen=True)
class RoutedRows(GraphPass):
    """``out[rows] = f(x[rows])`` becomes ``routed(rows, f(x), out)``, where ``f`` works row by row.

    Rows that are counted out have no positions that could be followed; rows of which each stands where its token does
    have. Rows are taken and put back by a mask, by the positions of its true places, by a list of positions, or as parts
    of a sequence that are joined again. That only these rows are needed is still said (``tokgraph.routed``), so that they
    may be taken again when a plan is realised. Rows that something else reads as well stay as they are, and so do those of
    which something is computed that other rows may have no value of (``log``).
    """

    name: ClassVar[str] = "routed-rows"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace every such write, those inside of others first."""
        while _Rewrite(Emitter(graph_module.graph, self.name)).run():
            remove_dead_code(graph_module.graph)
        remove_dead_code(graph_module.graph)


class _Rewrite:
    """One walk over a graph.

    Args:
        emit: where nodes go.
    """

    def __init__(self, emit: Emitter) -> None:
        self._emit, self._routes = emit, Routes()
        self._masks = Masks(emit)
        self._wholes: dict[Any, _Whole] = {}
        self._puts: dict[fx.Node, tuple[Put, ...]] = {}

    def run(self) -> bool:
        """Replace what is computed row by row of rows that are taken; whether there was any."""
        nodes = list(self._emit.graph.nodes)
        for node in nodes:
            found = self._routes.puts(node)
            if found and all(self._whole(put).gives(put.rows) and self._masks.can(put) for put in found):
                self._puts[node] = found
        self._keep_closed()
        done: dict[fx.Node, fx.Node] = {}
        for node, puts in self._puts.items():
            done[node] = self._replaced(puts, done)
            node.replace_all_uses_with(done[node])
        return bool(done)

    def _whole(self, put: Put) -> _Whole:
        key = (put.route, put.route.whole(put.into))
        if key not in self._wholes:
            self._wholes[key] = _Whole(self._emit, self._routes, put)
        return self._wholes[key]

    def _keep_closed(self) -> None:
        """Leave out those whose rows are read by something else, one after the other."""
        while True:
            region, ends = set(), set()
            for puts in self._puts.values():
                for put in puts:
                    region |= self._whole(put).region(put.rows)
            ends = {(node, put.rows) for node, puts in self._puts.items() for put in puts}
            open_ = {
                x for x in region if any(u not in region and (u, x) not in ends and not _is_size(u) for u in x.users)
            }
            bad = [n for n, puts in self._puts.items() if any(self._whole(p).region(p.rows) & open_ for p in puts)]
            for node in bad:
                del self._puts[node]
            if not bad:
                return

    def _replaced(self, puts: tuple[Put, ...], done: dict[fx.Node, fx.Node]) -> fx.Node:
        """What stands for a node that puts rows."""
        made = [(put, self._whole(put).rows(put)) for put in puts]
        into = done.get(puts[0].into, puts[0].into)
        if puts[0].joins:
            untouched = [rows for put, rows in made if self._routes.taken(put.rows)]
            first = made[0][1]
            into = untouched[0] if untouched else self._masks.zeros(first)
            if not untouched and all(rows is first for _, rows in made):
                return first
            made = [(put, rows) for put, rows in made if rows is not into]
        else:
            into = self._masks.base(into, puts[0])
        for rows in dict.fromkeys(rows for _, rows in made):
            into = self._routed([put for put, other in made if other is rows], rows, into)
        return into

    def _routed(self, puts: list[Put], rows: fx.Node, into: fx.Node) -> fx.Node:
        """The rows where they are put, else those of ``into``."""
        mask, put = self._masks.of(puts, into), puts[0]
        for axis in range(rank(mask), rank(into) - put.route.before):
            mask = self._emit.call(aten.unsqueeze.default, mask, axis, origin=mask)
        if not put.adds:
            return self._emit.call(routed, mask, rows, into, origin=put.rows)
        zeros = self._emit.call(aten.zeros_like.default, into, origin=put.rows)
        added = self._emit.call(routed, mask, rows, zeros, origin=put.rows)
        return self._emit.call(aten.add.Tensor, into, added, origin=put.rows)


class _Whole:
    """Computes, for all rows of a value, what is computed of those that are taken.

    Args:
        emit: where nodes go.
        routes: reads what is taken.
        put: one of those that put the rows.
    """

    def __init__(self, emit: Emitter, routes: Routes, put: Put) -> None:
        self._emit, self._routes = emit, routes
        self._route, self._size = put.route, put.route.whole(put.into)
        self._found: dict[fx.Node, All | None] = {}

    def gives(self, node: fx.Node) -> bool:
        """Whether a value has one row for each that is taken."""
        found = self.of(node)
        return found is not None and found.times == 1

    def of(self, node: fx.Node) -> All | None:
        """A value of taken rows, for all rows; ``None`` where it is none, or not row by row."""
        if node not in self._found:
            self._found[node] = None
            if self._routes.taken(node) == self._route:
                self._found[node] = self._all(first_input(node))
            elif node.op == "call_function" and tensor(node) is not None:
                self._found[node] = self._computed(node)
        return self._found[node]

    def rows(self, put: Put) -> fx.Node:
        """The rows of a put for all of the value, of its shape."""
        found = self._found[put.rows]
        rows = put.rows if found is None else found.value
        if put.route.axes == 1:
            return rows
        sizes: list[Any] = [self._emit.size(put.into, a) for a in range(put.route.axis + put.route.axes)]
        sizes += [self._emit.size(rows, a) for a in range(put.route.axis + 1, rank(rows))]
        return self._emit.call(aten.reshape.default, rows, sizes, origin=put.rows)

    def region(self, node: fx.Node) -> set[fx.Node]:
        """What rows are computed by, from where they are taken on."""
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            x = stack.pop()
            if x not in found and self._found.get(x) is not None:
                found.add(x)
                stack += [] if self._routes.taken(x) == self._route else x.all_input_nodes
        return found

    def _all(self, x: fx.Node) -> All | None:
        """The value that rows are taken of, its axes that a mask counts merged."""
        axis, axes = self._route.axis, self._route.axes
        if not same_size(product(dims(x)[axis : axis + axes]), self._size):
            return None
        if axes > 1:
            sizes: list[Any] = [self._emit.size(x, a) for a in range(rank(x))]
            x = self._emit.call(aten.reshape.default, x, [*sizes[:axis], -1, *sizes[axis + axes :]], origin=x)
        return All(x, axis)

    def _computed(self, node: fx.Node) -> All | None:
        """A call on rows of which each gives one of its own, or some that stand one after the other."""
        first = next((found for x in node.all_input_nodes if (found := self.of(x)) is not None), None)
        several = regrouped(self._emit, node, first) if first is not None else None
        if several is not None:
            return several
        described = axis_map(node)
        if described is None or not described.rows or _draws(node):
            return None
        whole = {x: found for x in tensor_inputs(node) if (found := self.of(x)) is not None}
        places = [
            a for a, rows in enumerate(described.rows) for x, j in rows or () if x in whole and whole[x].axis == j
        ]
        if not whole or len(set(places)) != 1 or any(described.mixed((x, y.axis)) for x, y in whole.items()):
            return None
        place, here = places[0], described.rows[places[0]] or ()
        times = {y.times for y in whole.values()}
        if {x for x, _ in here} != set(whole) or len(times) != 1 or not is_total(node, whole):
            return None
        new = {x: found.value for x, found in whole.items()}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda x: new.get(x, x))
        if traits(node.target).sized:
            sizes: list[Any] = list(args[1])  # type: ignore[arg-type]
            if not isinstance(sizes[place], int) or sizes[place] != -1:
                sizes[place] = self._emit.size(new[here[0][0]], here[0][1])
            args = (args[0], sizes, *args[2:])
        made = self._emit.call(node.target, *args, origin=node, **kwargs)
        (each,) = times
        expected = [each * self._size if axis == place else size for axis, size in enumerate(dims(node))]
        return All(made, place, each) if same_sizes(dims(made), expected) else None


def _is_size(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymInt)


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags

"""Units: the attentions of one decoder over its token axis, in the order in which they depend on one another.

An attention counts if its queries are rows of the token axis. Attentions that do not depend on one another (experts of
modalities, differences of two) are one unit, and so are those that follow each other in parts of one layer (self- and
cross-attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import fx

from tokgraph.ir.node import ancestors, argument, axis_argument, descendants, module_path, rank, tensor, tensor_inputs
from tokgraph.ir.program import TaskGraph

from ..rules import axis_map
from ..rules.registry import Axis
from .attentions import weighted_sum
from .axes import AxisClasses
from .flow import reads_values
from .meeting import meetings
from .projections import projection_weights

aten = torch.ops.aten
_JOINS = (aten.cat.default, aten.slice.Tensor, aten.pad.default, aten.constant_pad_nd.default)


@dataclass(frozen=True)
class Looking:
    """An attention and the axes of its rows.

    Args:
        node: the fused attention, or the softmax.
        queries: the axis of its queries.
        keys: the axis of its keys.
    """

    node: fx.Node
    queries: Axis
    keys: Axis


@dataclass(frozen=True)
class Unit:
    """The attentions of one layer, in graph order.

    Args:
        nodes: the fused attentions, or their softmaxes.
        weights: the weights of the linear maps before them.
    """

    nodes: tuple[fx.Node, ...]
    weights: frozenset[fx.Node]


@dataclass(frozen=True)
class Units:
    """The attentions of a decoder.

    Args:
        tokens: an axis that indexes its tokens.
        units: its units, in order.
        aside: an attention to something else in a module of its own, between layers; ``None``: there is none.
    """

    tokens: Axis
    units: tuple[Unit, ...]
    aside: fx.Node | None = None


def find_units(graph: TaskGraph, classes: AxisClasses) -> Units | None:
    """The units of the decoder that visual tokens go through, ``None`` where no attention reads their rows."""
    looking = attending(graph)
    family = _family(graph, classes, looking)
    mine = [at for at in looking if any(classes.same(at.queries, axis) for axis in family)]
    if not mine:
        return None
    counts = [sum(classes.same(at.queries, axis) for at in mine) for axis in family]
    tokens = family[counts.index(max(counts))]
    here = [at for at in mine if classes.same(at.queries, tokens)]
    units: list[Unit] = []
    for unit in _levels(graph.graph, [at.node for at in here]):
        if units and _one_layer(units[-1], unit):
            last = units.pop()
            unit = Unit((*last.nodes, *unit.nodes), last.weights | unit.weights)
        units.append(unit)
    inner = {at.node for at in here if classes.same(at.keys, tokens)}
    lists = {list_of(module_path(node)) for node in inner}
    outer = [unit.nodes[0] for unit in units if not inner & set(unit.nodes)]
    aside = next((node for node in outer if list_of(module_path(node)) not in lists - {""}), None)
    return Units(tokens, tuple(units), aside)


def attending(graph: TaskGraph) -> list[Looking]:
    """What the attentions of a graph look from and at."""
    live = ancestors([graph.graph.output_node()])
    return [found for node in graph.graph.nodes if node in live and (found := _looking(node)) is not None]


def without_followers(units: Units) -> Units | None:
    """The units of the layers in one list, without those behind them that are in no list or another one: a layer that
    predicts one more token, from what the last layer of the decoder makes. ``None`` where there are none, or that is not all
    that the others are.
    """
    lists = [{list_of(module_path(node)) for node in unit.nodes} for unit in units.units]
    mine = list(takewhile(lambda found: found == lists[0], lists))
    others = lists[len(mine) :]
    if "" in lists[0] or len(lists[0]) > 1 or len(mine) < 2 or not others or any(lists[0] & found for found in others):
        return None
    return replace(units, units=units.units[: len(mine)])


def _looking(node: fx.Node) -> Looking | None:
    """What an attention looks from and at."""
    described = axis_map(node) if tensor(node) is not None else None
    for mix in described.mixes if described else ():
        if mix.kind == "attention":
            query = argument(node, "query")
            return Looking(node, (query, rank(query) - 2), mix.axes[0])
        if mix.kind == "softmax" and len(mix.axes) == 1:
            ((scores, axis),) = mix.axes
            if axis == rank(scores) - 1 and rank(scores) > 2 and weighted_sum(node, axis) is not None:
                return Looking(node, (scores, rank(scores) - 2), (scores, axis))
    return None


def _family(graph: TaskGraph, classes: AxisClasses, looking: Sequence[Looking]) -> list[Axis]:
    """Axes that index the visual tokens: of the input that says where they are, and what is joined to or cut from them.

    Where no input says it, they are those that are made of text and other content joined, and attend to one another. Where
    nothing is joined, they are those of the first attention of tokens to tokens that the visual inputs and others reach; where
    no input is visual, those of most attentions.
    """
    visual = graph.task.visual
    sources = graph.input_nodes().get(visual.input or "", []) if visual is not None else []
    if len(sources) == 1 and tensor(sources[0]) is not None and rank(sources[0]) == 2:
        return grown(graph.graph, classes, (sources[0], 1))
    inner = [at for at in looking if classes.same(at.queries, at.keys)]
    joined = joined_text(graph, classes, inner)
    if joined:
        return joined
    if graph.task.visual_inputs:
        wanted = set(graph.task.visual_inputs)
        inputs = graph.input_nodes().items()
        seen, others = (
            descendants([n for key, nodes in inputs for n in nodes if (key in wanted) is side])
            for side in (True, False)
        )
        inner = [at for at in inner if at.node in seen and at.node in others][:1]
    if not inner:
        return []
    first = max(inner, key=lambda at: sum(classes.same(at.queries, other.queries) for other in inner))
    return grown(graph.graph, classes, first.queries)


def joined_text(graph: TaskGraph, classes: AxisClasses, looking: Sequence[Looking]) -> list[Axis]:
    """The axes of tokens of which some are text, the first that attend to one another; none where no such tokens do."""
    for axis in meetings(graph.graph):
        found = grown(graph.graph, classes, axis)
        if any(classes.same(at.queries, at.keys) and classes.same(at.queries, a) for at in looking for a in found):
            return found
    return []


def grown(graph: fx.Graph, classes: AxisClasses, axis: Axis) -> list[Axis]:
    """An axis, and those that tokens are on after others were joined to them, or some cut from them."""
    found = [axis]
    for node in graph.nodes:
        if node.target in _JOINS and tensor(node) is not None:
            dim = _joined(node)
            for x in tensor_inputs(node) if dim is not None else ():
                if rank(x) == rank(node) and any(classes.same((x, dim), known) for known in found):  # type: ignore[arg-type]
                    if not any(classes.same((node, dim), known) for known in found):  # type: ignore[arg-type]
                        found.append((node, dim))  # type: ignore[arg-type]
                    break
    return found


def _joined(node: fx.Node) -> int | None:
    """The axis along which a node joins, cuts or pads."""
    if node.target in (aten.cat.default, aten.slice.Tensor):
        return axis_argument(node, node)
    padded = [axis for axis, pads in enumerate(zip(*[iter(argument(node, "pad"))] * 2, strict=False)) if any(pads)]
    return rank(node) - 1 - padded[0] if len(padded) == 1 else None


def _levels(graph: fx.Graph, attentions: Sequence[fx.Node]) -> list[Unit]:
    """Attentions by the number of others that come before them on a path."""
    chosen, everything = set(attentions), set(graph.nodes)
    depth: dict[fx.Node, int] = {}
    levels: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        before = max((depth[x] for x in node.all_input_nodes), default=0) if reads_values(node) else 0
        if node in chosen:
            levels.setdefault(before, []).append(node)
        depth[node] = before + (node in chosen)
    return [
        Unit(tuple(nodes), frozenset().union(*(projection_weights(node, everything) for node in nodes)))
        for _, nodes in sorted(levels.items())
    ]


def _one_layer(a: Unit, b: Unit) -> bool:
    """Whether attentions that follow each other are parts of one layer: with projections of their own, in its modules."""
    return not a.weights & b.weights and all(
        parts_of_one_layer(module_path(x), module_path(y)) for x in a.nodes for y in b.nodes
    )


def list_of(module: str) -> str:
    """The path of the list that a module is in an item of, up to its first number; empty where it is in none."""
    path = module.split(".")
    number = next((i for i, part in enumerate(path) if part.isdigit()), 0)
    return ".".join(path[:number])


def parts_of_one_layer(a: str, b: str) -> bool:
    """Whether two modules are one numbered module, or named parts of one (``layers.0.self_attn``, ``layers.0.cross_attn``);
    layers are numbered (``layers.0``, ``layers.1``), or have their parts below them (``first.attn``, ``second.attn``).
    """
    one, other = a.split("."), b.split(".")
    shared = [x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
    parts = one[len(shared) :], other[len(shared) :]
    named = all(len(part) <= 1 and not any(name.isdigit() for name in part) for part in parts)
    return named and any(name.isdigit() for name in shared)

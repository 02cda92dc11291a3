"""Cuts: the fewest values that carry token content from one unit of attention to the next.

What depends on the first unit and leads to the last, or is added to what it makes, is the *trunk*; what reads it beside
(routers, early exits) and what it reads (positions, image features that come in again) is not. Between two units the trunk
is cut where the fewest values cross; of such cuts the last one is taken, so that what follows a layer (its feed-forward
net, features that are added to it) belongs to that layer, but not what a module of the next layer does.

Source: minimum vertex cuts by maximum flow (Ford and Fulkerson; Menger's theorem), as networkx computes them, with every
value split into two and infinite arcs against the flow, which keep the early side closed under "is computed from".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

from tokgraph.ir.node import ancestors, module_path, tensor, tensor_inputs, value

from ..rules import traits
from ..rules.registry import is_tagged_pointwise
from .axes import AxisClasses
from .units import Unit, Units, computed_from

aten = torch.ops.aten
State = tuple[fx.Node, ...]
_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class Trunk:
    """The values that lead from a decoder's first unit to its last.

    Args:
        nodes: they, in graph order.
        joins: those that add what bypasses the last unit to what it makes, in graph order.
    """

    nodes: tuple[fx.Node, ...]
    joins: tuple[fx.Node, ...]


def pointwise(node: fx.Node) -> bool:
    """Whether a call works element by element, or copies, or drops out elements."""
    return node.op == "call_function" and (
        is_tagged_pointwise(node.target) or traits(node.target).copies or node.target is aten.dropout.default
    )


def find_trunk(graph: fx.Graph, units: Units, classes: AxisClasses) -> Trunk:
    """The trunk of a decoder of at least two units."""
    first, last = units.units[0], units.units[-1]
    below, after = computed_from(first.nodes), computed_from(last.nodes)
    inner = below & ancestors(last.nodes)
    past = {
        node for node in inner if node not in after
    }  # what may bypass the last unit, through element-wise operators
    joins = []
    for node in graph.nodes:
        if node in below and node not in past and pointwise(node):
            bypassing = [x for x in node.all_input_nodes if x in past]
            if node not in after:
                past |= {node} if bypassing else set()
            elif bypassing and classes.of(node, units.tokens):
                joins.append(node)
    kept = below & ancestors([*last.nodes, *joins])
    return Trunk(tuple(node for node in graph.nodes if node in kept), tuple(joins))


def boundary(trunk: Trunk, units: Sequence[Unit], number: int, classes: AxisClasses, tokens: Any) -> State | None:
    """The values that cross from units before ``number`` to those from there on, in graph order.

    ``None`` where something must cross that is no value of tokens: it has no token axis, or is no float.
    """
    before = [node for unit in units[:number] for node in unit.nodes]
    after = [node for unit in units[number:] for node in unit.nodes]
    early, late = ancestors(before), computed_from([*after, *trunk.joins])
    middle = [node for node in trunk.nodes if node not in early and node not in late]
    free = _cut(trunk, early, late, (), (), classes, tokens)
    if free is None or len(middle) == 0:
        return free
    mine, following = layer_modules(units[number - 1], units[number])
    if not mine:
        return free
    mine_nodes = [node for node in middle if within(node, mine)]
    others = [node for node in middle if within(node, following)]
    told = _cut(trunk, early, late, mine_nodes, others, classes, tokens)
    return told if told is not None and len(told) == len(free) else free


def _cut(
    trunk: Trunk,
    early: Collection[fx.Node],
    late: Collection[fx.Node],
    before: Collection[fx.Node],
    after: Collection[fx.Node],
    classes: AxisClasses,
    tokens: Any,
) -> State | None:
    """The latest minimum cut between early values and late ones.

    Args:
        trunk: the trunk.
        early: values that are computed before the cut.
        late: values that are computed behind it.
        before: others that are to be computed before it.
        after: others that are to be computed behind it.
        classes: the graph's axes.
        tokens: the token axis.
    """
    known = set(trunk.nodes)
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, _SINK))
    for node in trunk.nodes:
        readers = [user for user in node.users if user in known and (user not in early)]
        if node in late or not readers:
            continue
        capacity = {"capacity": 1} if _carries(node, classes, tokens) else {}
        graph.add_edge((node, 0), (node, 1), **capacity)
        if node in early or node in before:
            graph.add_edge(_SOURCE, (node, 0))
        else:
            for x in node.all_input_nodes:
                if x in known and x not in early:
                    graph.add_edge((node, 0), (x, 0))
        if node in after:
            graph.add_edge((node, 0), _SINK)
        for user in readers:
            graph.add_edge((node, 1), _SINK if user in late else (user, 0))
    try:
        size, (sources, _) = nx.minimum_cut(graph, _SOURCE, _SINK)
    except nx.NetworkXUnbounded:
        return None
    if size == 0:
        return None
    return tuple(
        node for node in trunk.nodes if (node, 0) in sources and (node, 1) not in sources and (node, 1) in graph
    )


def _carries(node: fx.Node, classes: AxisClasses, tokens: Any) -> bool:
    """Whether a value can be part of a state: one float tensor with one token axis."""
    val = value(node)
    return isinstance(val, torch.Tensor) and val.is_floating_point() and len(classes.of(node, tokens)) == 1


def layer_modules(a: Unit, b: Unit) -> tuple[str, str]:
    """The modules of two layers: the paths of their attentions as far as the first part in which they differ."""
    one, other = (module_path(unit.nodes[0]).split(".") for unit in (a, b))
    for at, (x, y) in enumerate(zip(one, other, strict=False)):
        if x != y:
            return ".".join(one[: at + 1]), ".".join(other[: at + 1])
    return "", ""


def within(node: fx.Node, module: str) -> bool:
    """Whether a node was made in a module, or in one inside of it."""
    return (module_path(node) + ".").startswith(module + ".")


def earlier(trunk: Trunk, state: State) -> State | None:
    """The one value before an element-wise operator that makes a state of one value, if nothing else reads it."""
    known = set(trunk.nodes)
    (node,) = state
    inputs = [x for x in tensor_inputs(node) if x in known]
    if not pointwise(node) or len(inputs) != 1 or [u for u in inputs[0].users if u in known] != [node]:
        return None
    return (inputs[0],) if tensor(inputs[0]) is not None else None

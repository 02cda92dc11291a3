"""Cuts: the fewest values that carry token content from one unit of attention to the next.

What depends on the first unit and leads to the last, or is added to what it makes, is the *trunk*; what reads it beside
(routers, early exits) and what it reads (positions, image features that come in again) is not. Between two units the trunk
is cut where the fewest values cross; of such cuts the last one is taken, so that what follows a layer (its feed-forward
net, features that are added to it) belongs to that layer, but not what a module of the next layer does.

Source: minimum vertex cuts by maximum flow (Ford and Fulkerson; Menger's theorem), as networkx computes them, with every
value split into two and infinite arcs against the flow, which keep the early side closed under "is computed from".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import fx

from tokgraph.ir.node import ancestors, argument, module_call, module_path, tensor, tensor_inputs, value
from tokgraph.ir.tensors import tensor_name

from ..rules import traits
from ..rules.registry import Axis, is_tagged_pointwise
from .axes import AxisClasses
from .flow import computed_from, reads_values
from .units import Unit, Units

aten = torch.ops.aten
State = tuple[fx.Node, ...]
_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class Trunk:
    """The values that lead from a decoder's first unit to its last.

    Args:
        nodes: they, in graph order.
        joins: those that add what bypasses the last unit to what it makes, in graph order.
        reaches: value -> the first unit that depends on it; past the last: none does.
        follows: value -> the last unit that it depends on; past the last: it is a join, or depends on one.
        meets: the first that reads what bypasses the last unit and what it makes, and does not work element by element.
    """

    nodes: tuple[fx.Node, ...]
    joins: tuple[fx.Node, ...]
    reaches: Mapping[fx.Node, int]
    follows: Mapping[fx.Node, int]
    meets: fx.Node | None = None


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
    joins, meets = [], None
    for node in graph.nodes:
        if node not in below or node in past or node in last.nodes:
            continue
        bypassing = [x for x in node.all_input_nodes if x in past]
        if not (pointwise(node) or node.target is aten.permute.default):
            meets = meets or (node if bypassing and after.intersection(node.all_input_nodes) else None)
        elif node not in after:
            past |= {node} if bypassing else set()
        elif bypassing and classes.of(node, units.tokens):
            joins.append(node)
    kept = below & ancestors([*last.nodes, *joins])
    nodes = tuple(node for node in graph.nodes if node in kept)
    return Trunk(nodes, tuple(joins), *_depths(nodes, joins, units.units), meets)


def _depths(
    nodes: Sequence[fx.Node], joins: Sequence[fx.Node], units: Sequence[Unit]
) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    number = {node: i for i, unit in enumerate(units) for node in unit.nodes}
    reaches: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        behind = [reaches[user] for user in node.users if user in reaches]
        reaches[node] = min([number.get(node, len(units)), *behind])
    follows = dict.fromkeys(joins, len(units))
    for node in nodes:
        before = [follows[x] for x in node.all_input_nodes if x in follows and reads_values(node)]
        follows[node] = max([number.get(node, 0), follows.get(node, 0), *before])
    return reaches, follows


def regions(trunk: Trunk, units: int) -> list[list[fx.Node]]:
    """For each number of a unit, what may cross to it and those behind it: what they read of the units before, and what lies
    between, in graph order.
    """
    found: list[list[fx.Node]] = [[] for _ in range(units)]
    for node in trunk.nodes:
        farthest = max((trunk.reaches[user] for user in node.users if user in trunk.reaches), default=-1)
        # early or between for these numbers, and read by something that is not early
        for number in range(trunk.follows[node] + 1, min(max(farthest, trunk.reaches[node]), units - 1) + 1):
            found[number].append(node)
    return found


@dataclass(frozen=True)
class Between:
    """What lies between the modules of two layers and has parameters of its own.

    Args:
        before: what belongs to the layer before, by its number.
        after: what belongs to the layer behind.
        neither: what has the number of another layer.
        unknown: what has no number.
    """

    before: tuple[fx.Node, ...] = ()
    after: tuple[fx.Node, ...] = ()
    neither: tuple[fx.Node, ...] = ()
    unknown: tuple[fx.Node, ...] = ()


def between(trunk: Trunk, region: Sequence[fx.Node], units: Sequence[Unit], number: int) -> Between:
    """What lies between the modules of the layers beside a boundary, in graph order; nothing where there are no modules."""
    modules = layer_modules(units[number - 1], units[number])
    found: dict[str, list[fx.Node]] = {}
    for node in region if modules[0] else ():
        names = [tensor_name(x) for x in node.all_input_nodes if x.op == "get_attr"]
        if names and trunk.reaches[node] >= number and not any(in_call(node, module) for module in modules):
            mine, before, after = (_numbers(path) for path in (names[0], *modules))
            sides = [bool(mine) and mine[: len(of)] == of for of in (before, after)]
            side = {(True, False): "before", (False, True): "after", (False, False): "neither"}.get(
                (sides[0], sides[1])
            )
            found.setdefault(side if mine and side is not None else "unknown", []).append(node)
    return Between(**{side: tuple(nodes) for side, nodes in found.items()})


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in map(plain, path.split(".")) if part.isdigit())


def boundary(
    trunk: Trunk,
    region: Sequence[fx.Node],
    units: Sequence[Unit],
    number: int,
    classes: AxisClasses,
    tokens: Axis,
    early: bool = False,
) -> State | None:
    """The values that cross from units before ``number`` to those from there on, in graph order.

    Args:
        trunk: the trunk.
        region: its values among which the cut lies.
        units: the units.
        number: the first unit behind the cut.
        classes: the graph's axes.
        tokens: the token axis.
        early: what lies between the modules of two layers is to lie behind the cut, where neither number nor name says
            otherwise; else before it.

    Returns:
        ``None`` where something must cross that is no value of tokens: it has no token axis, or is no float.
    """
    cut = partial(_cut, trunk, region, number, classes, tokens)
    mine, following = layer_modules(units[number - 1], units[number])
    if not mine:
        return None if early else cut((), ())
    aside = between(trunk, region, units, number)
    before = {node for node in region if in_call(node, mine)} | set(aside.before)
    after = {node for node in region if in_call(node, following)} | set(aside.after)
    if early:
        after |= {node for node in region if trunk.reaches[node] >= number and node not in before}
    told = cut(before, after)
    return told if told is not None or early or aside.before or aside.after else cut((), ())


def _cut(
    trunk: Trunk,
    region: Sequence[fx.Node],
    number: int,
    classes: AxisClasses,
    tokens: Axis,
    before: Collection[fx.Node],
    after: Collection[fx.Node],
) -> State | None:
    """The latest minimum cut between early values and late ones, among those of a region.

    Args:
        trunk: the trunk.
        region: values that lie between, and early ones that others than these read.
        number: the first unit that is late.
        classes: the graph's axes.
        tokens: the token axis.
        before: values that are to be computed before the cut.
        after: values that are to be computed behind it.
    """
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, _SINK))
    early = {node for node in region if trunk.reaches[node] < number}
    for node in region:
        graph.add_edge((node, 0), (node, 1), **({"capacity": 1} if _carries(node, classes, tokens) else {}))
        if node in early or node in before:
            graph.add_edge(_SOURCE, (node, 0))
        if node not in early:
            graph.add_edges_from(
                ((node, 0), (x, 0)) for x in node.all_input_nodes if (x, 0) in graph and x not in early
            )
        if node in after:
            graph.add_edge((node, 0), _SINK)
        for user in node.users:
            if trunk.reaches.get(user, -1) >= number:
                graph.add_edge((node, 1), _SINK if trunk.follows[user] >= number else (user, 0))
    try:
        size, (sources, _) = nx.minimum_cut(graph, _SOURCE, _SINK)
    except nx.NetworkXUnbounded:
        return None
    crossing = tuple(node for node in region if (node, 0) in sources and (node, 1) not in sources)
    return crossing if size else None


def _carries(node: fx.Node, classes: AxisClasses, tokens: Axis) -> bool:
    """Whether a value can be part of a state: one float tensor with one token axis. Of a value that stands there batch first as
    well, that one is meant.
    """
    val = value(node)
    if not isinstance(val, torch.Tensor) or not val.is_floating_point() or len(classes.of(node, tokens)) != 1:
        return False
    return classes.of(node, tokens) == (1,) or not any(_turns(x) for x in (node, *node.users))


def _turns(node: fx.Node) -> bool:
    """Whether a node moves the samples to the first axis of a value, or away from it."""
    return node.target is aten.permute.default and argument(node, "dims")[0] != 0


def layer_modules(a: Unit, b: Unit) -> tuple[str, str]:
    """The modules of two layers, or the calls of one: the paths of their attentions as far as the first part in which they
    differ; where only calls do, the last numbered part of these, else the first.
    """
    one, other = (module_call(unit.nodes[0]).split(".") for unit in (a, b))
    calls: list[int] = []
    for at, (x, y) in enumerate(zip(one, other, strict=False)):
        if plain(x) != plain(y):
            return ".".join(one[: at + 1]), ".".join(other[: at + 1])
        calls += [at] if x != y else []
    numbered = [at for at in calls if plain(one[at]).isdigit()]
    for at in (*numbered[-1:], *calls):
        return ".".join(one[: at + 1]), ".".join(other[: at + 1])
    return "", ""


def plain(part: str) -> str:
    """A part of a path without the number of its call."""
    return part.partition("@")[0]


def within(node: fx.Node, module: str) -> bool:
    """Whether a node was made in a module, or in one inside of it."""
    return (module_path(node) + ".").startswith(module + ".")


def in_call(node: fx.Node, module: str) -> bool:
    """Whether a node was made in a call of a module, or in one inside of it."""
    return (module_call(node) + ".").startswith(module + ".")


def earlier(trunk: Trunk, state: State) -> State | None:
    """The one value before an element-wise operator that makes a state of one value, if nothing else reads it."""
    known = set(trunk.nodes)
    (node,) = state
    inputs = [x for x in tensor_inputs(node) if x in known]
    if not pointwise(node) or len(inputs) != 1 or [u for u in inputs[0].users if u in known] != [node]:
        return None
    return (inputs[0],) if tensor(inputs[0]) is not None else None

"""States: what crosses the boundaries of a decoder's layers, before the first to after the last.

Between two layers it is a cut (:mod:`.cuts`). The first state is what plays the role before the first layer that later
states play before theirs; the last one is what the last layer makes as layers before it made theirs (:mod:`.likeness`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from tokgraph.ir.node import dims, module_path, same_sizes

from ..rules.registry import Axis
from .axes import AxisClasses
from .cuts import (
    Between,
    State,
    Trunk,
    between,
    boundary,
    earlier,
    find_trunk,
    in_call,
    layer_modules,
    plain,
    pointwise,
    regions,
)
from .flow import computed_from, reads_values
from .likeness import alike, pairs
from .units import Unit, Units


@dataclass(frozen=True)
class Layers:
    """A decoder's layers.

    Args:
        tokens: an axis that indexes its tokens.
        units: the attentions of each layer.
        states: the state before each layer, and that after the last; values of one role stand at the same place.
        born: values that cross boundaries and have no predecessor: number of the layer that makes them -> they.
    """

    tokens: Axis
    units: tuple[Unit, ...]
    states: tuple[State, ...]
    born: dict[int, State]


@dataclass(frozen=True)
class Unfound:
    """Why no layers were found, as the end of a sentence, and where.

    Args:
        why: the reason.
        node: where.
    """

    why: str
    node: fx.Node


def find_layers(graph: fx.Graph, units: Units, classes: AxisClasses) -> Layers | Unfound:
    """The layers of a decoder of at least two units."""
    again = next((unit for i, unit in enumerate(units.units) if any(_is(unit, one) for one in units.units[:i])), None)
    if again is not None and not _called_again(units.units):
        return _used_again(again)
    if units.aside is not None:
        return Unfound("an attention to something else lies between layers, in no module of either", units.aside)
    trunk = find_trunk(graph, units, classes)
    if not trunk.joins:
        return _without_joins(trunk, units.units[-1])
    found = regions(trunk, len(units.units))
    beside = [between(trunk, region, units.units, number) for number, region in enumerate(found) if number]
    if again is not None and any(one != Between() for one in beside):
        return _used_again(again)  # numbers of layers say nothing
    unsure = next((node for one in beside for node in one.neither), None)
    if unsure is not None:
        return _unplaced(unsure)
    cuts = [
        [boundary(trunk, region, units.units, i, classes, units.tokens, early) for i, region in enumerate(found) if i]
        for early in (False, True)
    ]
    lost = next((unit for cut, unit in zip(cuts[0], units.units[1:], strict=True) if cut is None), None)
    if lost is not None:
        return Unfound("values without a token axis lead from the layer before to this one", lost.nodes[0])
    parts = [len(one.unknown) for one in beside]
    latest, earliest = ([cut for cut in one if cut is not None] for one in cuts)
    layers = _alike(graph, trunk, units, latest, earliest, begins=any(parts))
    if any(parts) and (len(set(parts)) > 1 or isinstance(layers, Unfound)):
        return _unplaced(next(node for one in beside for node in one.unknown))
    if isinstance(layers, Layers):
        return layers
    return _with_ends(graph, trunk, units, latest, _own_end)


def _is(unit: Unit, other: Unit) -> bool:
    """Whether an attention has no projections but those of another one."""
    return bool(unit.weights) and unit.weights <= other.weights


def _called_again(units: Sequence[Unit]) -> bool:
    """Whether attentions of the same projections lie in calls of whole layers, one after the other."""
    for i, unit in enumerate(units):
        for other in units[:i]:
            if _is(unit, other):
                module, call = layer_modules(other, unit)
                inner = plain(call.rpartition(".")[2])
                outer = map(plain, call.split(".")[:-1])
                if not call or not (inner.isdigit() or not any(part.isdigit() for part in outer)):
                    return False
                if [*map(plain, module.split("."))] != [*map(plain, call.split("."))]:
                    return False
    return True


def _without_joins(trunk: Trunk, last: Unit) -> Unfound:
    if trunk.meets is None:
        return Unfound("nothing is added to what the last attention makes: there is no stream", last.nodes[0])
    why = f"{trunk.meets.target} joins what the last attention makes to what goes past it, and is no addition"
    return Unfound(why, trunk.meets)


def _used_again(unit: Unit) -> Unfound:
    return Unfound("one module is used for several layers", unit.nodes[0])


def _unplaced(node: fx.Node) -> Unfound:
    return Unfound(f"nothing tells to which of two layers {module_path(node) or node.name} belongs, between them", node)


def _alike(
    graph: fx.Graph, trunk: Trunk, units: Units, latest: Sequence[State], earliest: Sequence[State], begins: bool
) -> Layers | Unfound:
    """The layers, all of which end alike, the last one too: with what lies between them at their ends, or else at the
    beginnings of those behind.

    Args:
        graph: the graph.
        trunk: its trunk.
        units: the attentions of its layers.
        latest: the states between layers, behind what lies there.
        earliest: those before it, where there are any.
        begins: whether what lies there is rather the beginning of a layer: a module that is used before each of them.
    """
    found = (_with_ends(graph, trunk, units, cuts) for cuts in _readings(trunk, units, latest, earliest, begins))
    first = next(found)
    return first if isinstance(first, Layers) else next((one for one in found if isinstance(one, Layers)), first)


def _readings(
    trunk: Trunk, units: Units, latest: Sequence[State], earliest: Sequence[State], begins: bool
) -> Iterator[Sequence[State]]:
    """The cuts that may be those between layers, the likelier ones first; arguments as of :func:`_alike`."""
    some = len(earliest) == len(latest)
    if some and begins:
        yield earliest
    yield (here := latest)
    while (back := _stepped_back(trunk, units, here)) is not None and _begin_alike(units, here):
        yield (here := back)
    if some and not begins and _begin_alike(units, latest):
        yield earliest


def _stepped_back(trunk: Trunk, units: Units, cuts: Sequence[State]) -> list[State] | None:
    """All cuts before the operator that makes them, if it is element-wise: it may begin a layer instead of ending one."""
    before = [earlier(trunk, cut) if len(cut) == 1 else None for cut in cuts]
    found = [cut for cut in before if cut is not None]
    if len(found) < len(cuts):
        return None
    reached = any(cut[0] not in computed_from(unit.nodes) for cut, unit in zip(found, units.units, strict=False))
    return None if reached else found


def _begin_alike(units: Units, cuts: Sequence[State]) -> bool:
    """Whether the operator that makes each cut may begin the layer behind it, by the lines of code: what stands in its place
    before the first layer is of their line, if they are of one, as in a loop. Positions that are added once are not.
    """
    rows = _by_role(units.units, cuts)
    if isinstance(rows, Unfound):
        return True
    first, *later = (row[0].meta.get("stack_trace") for row in rows)
    return None in (first, *later) or len(set(later)) > 1 or first == later[0]


def _with_ends(
    graph: fx.Graph,
    trunk: Trunk,
    units: Units,
    cuts: Sequence[State],
    otherwise: Callable[[fx.Graph, Trunk, Units, Sequence[State]], State | None] | None = None,
) -> Layers | Unfound:
    """The layers between given cuts, with the states before the first and after the last.

    Args:
        graph: the graph.
        trunk: its trunk.
        units: the attentions of its layers.
        cuts: the states between layers.
        otherwise: tells the state after a last layer that is not made as those before it.
    """
    rows = _by_role(units.units, cuts)
    if isinstance(rows, Unfound):
        return rows
    last = _last(graph, units, rows)
    if last is None and otherwise is not None:
        last = otherwise(graph, trunk, units, rows)
    if last is None:
        return Unfound(
            "the last layer adds to the stream in another way than those before it", units.units[-1].nodes[0]
        )
    states = (*rows, last)
    if set(states[0]) & computed_from(units.units[0].nodes):
        return Unfound("what the first layer reads depends on its own attention", units.units[0].nodes[0])
    passing = _passing(units.units, cuts, states)
    if passing is not None:
        return passing
    born = _born(trunk, cuts, states)
    around = _around(units.units, states, born)
    return Layers(units.tokens, units.units, states, born) if around is None else around


def _born(trunk: Trunk, cuts: Sequence[State], states: Sequence[State]) -> dict[int, State]:
    """Number of a layer -> the values that it makes beside its state and that later layers read."""
    known = {node for state in states for node in state}
    found: dict[int, State] = {}
    for number, cut in enumerate(cuts):
        if set(states[number + 1]) <= set(cut):
            new = tuple(node for node in trunk.nodes if node in cut and node not in known)
            known.update(new)
            found |= {number: new} if new else {}
    return found


def _passing(units: Sequence[Unit], cuts: Sequence[State], states: Sequence[State]) -> Unfound | None:
    """States of earlier layers that cross boundaries one after the other: a layer reads what those before it left.

    A memory that all later layers read, or skips that are read once, do not give way to another one.
    """
    old: list[set[fx.Node]] = []
    for number, cut in enumerate(cuts):
        earlier_states = {node for state in states[1 : number + 1] for node in state}
        old.append(set(cut) & earlier_states - set(states[number + 1]))
    for number, (before, here) in enumerate(pairwise(old), 2):
        if before - here and here - before:
            return Unfound("it reads states of two layers before it, as the layer before does", units[number].nodes[0])
    return None


def _around(units: Sequence[Unit], states: Sequence[State], born: dict[int, State]) -> Unfound | None:
    """What leads from a layer to later ones around the state between them."""
    crossing: set[fx.Node] = set()
    for number, unit in enumerate(units[:-1]):
        crossing |= set(born.get(number, ()))
        stops = crossing | set(states[number + 1])
        wanted = {node for later in units[number + 1 :] for node in later.nodes}
        wanted |= {node for state in states[number + 2 :] for node in state} - stops
        seen, stack = set(stops), list(unit.nodes)
        while stack:
            node = stack.pop()
            if node in wanted:
                return Unfound("values of an earlier layer reach it around the state between them", node)
            if node not in seen:
                seen.add(node)
                stack.extend(user for user in node.users if reads_values(user))
    return None


def _by_role(units: Sequence[Unit], cuts: Sequence[State]) -> list[State] | Unfound:
    """The state before every layer, values of one role at the same place."""
    rest = [cuts[0], *(tuple(x for x in cut if x not in before) for before, cut in pairwise(cuts))]
    rows: list[State] = [rest[-1]]
    for number in range(len(cuts) - 1, -1, -1):
        # from the state before layer number + 1 to the one before layer number
        found = _predecessors(units, rows, number)
        # streams that begin as copies of one value make the first cuts smaller than they are
        full = number > 0 and len(rest[number - 1]) >= len(rows[0])
        candidates = set(rest[number - 1]) if full else None
        kept = [x for x in rows[0] if found.get(x) != {x}]
        if len(kept) < len(rows[0]):
            rows = [tuple(x for x, y in zip(row, rows[0], strict=True) if y in kept) for row in rows]
        before: list[fx.Node | None] = []
        for x in kept:
            at = {y for y in found.get(x, ()) if candidates is None or y in candidates}
            before.append(next(iter(at)) if len(at) == 1 else None)
        if candidates is not None and before.count(None) == 1:
            left = candidates - set(before)
            before = [next(iter(left)) if y is None and len(left) == 1 else y for y in before]
        known = {y for y in before if y is not None}
        if (
            len(cuts) == 1 and len(known) == 1
        ):  # if they begin otherwise, the second of two layers is not like the first
            before = [*known] * len(kept)
        if None in before or not kept:
            return Unfound("its layer reads other values than the layers behind it", units[number].nodes[0])
        rows.insert(0, tuple(y for y in before if y is not None))
    return rows


def _predecessors(units: Sequence[Unit], rows: Sequence[State], number: int) -> dict[fx.Node, set[fx.Node]]:
    """Value of the state before layer ``number + 1`` -> what plays its role before layer ``number``.

    Args:
        units: the attentions of all layers.
        rows: the states before layer ``number + 1`` and the layers behind it.
        number: a layer.
    """
    found: dict[fx.Node, set[fx.Node]] = {}
    for behind, state in enumerate(rows):
        later = units[number + 1 + behind]
        region = computed_from(state, later.nodes[-1])
        looked: dict[fx.Node, set[fx.Node]] = {}
        for a, b in zip(units[number].nodes, later.nodes, strict=False):
            _merge(looked, pairs(a, b, set(state), region))
        for x, y in zip(state, rows[0], strict=True):
            if len(looked.get(x, ())) == 1:
                found.setdefault(y, looked[x])
        if len(found) == len(rows[0]):
            return found
    for state, after in pairwise(rows):
        region = computed_from(state, max(after))
        made: dict[fx.Node, set[fx.Node]] = {}
        for a, b in zip(rows[0], after, strict=True):
            _merge(made, pairs(a, b, set(state), region))
        for x, y in zip(state, rows[0], strict=True):
            if len(made.get(x, ())) == 1:
                found.setdefault(y, made[x])
    return found


def _merge(into: dict[fx.Node, set[fx.Node]], more: dict[fx.Node, set[fx.Node]]) -> None:
    for x, found in more.items():
        into.setdefault(x, set()).update(found)


def _last(graph: fx.Graph, units: Units, rows: Sequence[State]) -> State | None:
    """The state after the last layer: made of the one before it as an earlier layer's was made of its own."""
    before = {x: role for role, x in enumerate(rows[-1])}
    after = computed_from(rows[-1])
    behind = computed_from(units.units[-1].nodes)
    candidates = [node for node in graph.nodes if node in after]
    for number in range(len(rows) - 1, 0, -1):
        state = rows[number - 1]
        stops = {x: [role for role, y in enumerate(state) if y is x] for x in state}
        region = computed_from(rows[number - 1])
        found: list[fx.Node] = []
        for x in rows[number]:
            alikes = (c for c in candidates if c not in found and c.target is x.target)
            found += [c for c in alikes if alike(c, x, before, stops, region)][:1]
        if len(found) == len(before) and any(node in behind for node in found):
            return tuple(found)
    return None


def _own_end(graph: fx.Graph, trunk: Trunk, units: Units, rows: Sequence[State]) -> State | None:
    """The end of a last layer behind which nothing is added, as something is behind those before it."""
    back = _stepped_back(trunk, units, rows[1:])
    last = _last(graph, units, back) if back is not None else None
    return last or _residual_end(trunk, units.units, rows)


def _residual_end(trunk: Trunk, units: Sequence[Unit], rows: Sequence[State]) -> State | None:
    """The end of the last layer's own additions to what is added to its attention; needs layers that are modules.

    Nothing is told where the layer before goes on behind its module, and something is added behind that of the last.
    """
    before, module = layer_modules(units[-2], units[-1])
    end = trunk.joins[-1]
    if len(rows[-1]) != 1 or not module or not in_call(end, module):
        return None
    direct, made = {end}, computed_from([end])
    for node in end.graph.nodes:
        if node in made and node is not end and pointwise(node) and in_call(node, module):
            inputs = [x for x in node.all_input_nodes if x in made]
            if any(x in direct for x in inputs):
                others = [x for x in inputs if x not in direct]
                if any(same_sizes(dims(x), dims(node)) for x in others):  # not what a norm divides by
                    end = node
                    direct, made = {end}, computed_from([end])
                elif not others:
                    direct.add(node)
    goes_on = any(pointwise(user) and len(user.all_input_nodes) > 1 for user in end.users if not in_call(user, module))
    return None if goes_on and not in_call(rows[-1][0], before) else (end,)

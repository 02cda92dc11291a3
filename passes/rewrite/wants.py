"""Selections that every reader of a value applies: one reverse pass over a graph, changing nothing.

A *chain* is a sequence of indices, each relative to the rows that the one before left. What all users of a value want is
the longest common prefix of their chains, axis by axis. A chain moves from an operator's output to its inputs when the
operator's rule says that the axis is computed row by row; a selection disappears in the restore that it inverts
(``select(restore(h, y, i), i) = y``).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from tokgraph.ir.node import argument, is_write, rank, same_sizes, sizes_of, tensor, value

from ..emitter import is_check, is_selection, selection
from ..rules import axis_map, traits
from ..rules.registry import first_input, is_one
from ..simplify.complements import are_complements
from .checks import followers, told

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
Chain = tuple[fx.Node, ...]


@dataclass(frozen=True, order=True)
class Along:
    """An axis to select along.

    Args:
        dim: the token axis.
        batch: the batch axis.
        ndim: rank at which the axes are meant: a value of lower rank, or with a batch axis of size 1, is to be given a
            batch axis first; ``None``: the value has both axes.
    """

    dim: int
    batch: int
    ndim: int | None = None


Want = dict[Along, Chain]
Uses = dict[fx.Node, list[tuple[fx.Node, Want]]]
STREAM = Along(1, 0)


@dataclass(frozen=True)
class Declined:
    """Why an operator does not pass a selection of its result on to its inputs.

    Args:
        node: the value's name.
        reason: what the operator does.
        end: there is nothing to pass it on to: what is selected begins here.
    """

    node: str
    reason: str
    end: bool = False


@dataclass
class Selections:
    """What :func:`selections` finds.

    Args:
        uses: value -> who reads it, through whatever selections and restores, and the chains that it wants.
        own: value -> chains applied inside it (what all its users want and its operator commutes with).
        inputs: node -> input -> chains it then wants of that input.
        live: values that are needed at all.
        kept_restores: restores that some user reads whole.
        followers: what is computed on the rows that its inputs have in the end (:mod:`~tokgraph.passes.rewrite.checks`).
        declined: what operators did not pass on (:func:`~tokgraph.passes.rewrite.stops.stops` has all that stopped).
    """

    uses: Uses = field(default_factory=lambda: defaultdict(list))
    own: dict[fx.Node, Want] = field(default_factory=dict)
    inputs: dict[fx.Node, dict[fx.Node, Want]] = field(default_factory=dict)
    live: set[fx.Node] = field(default_factory=set)
    kept_restores: set[fx.Node] = field(default_factory=set)
    followers: set[fx.Node] = field(default_factory=set)
    declined: list[Declined] = field(default_factory=list)


def common(wants: Iterable[Mapping[Along, Chain]]) -> Want:
    """The longest common prefix of every axis' chains."""
    first, *others = list(wants)
    shared = dict(first)
    for want in others:
        for along in list(shared):
            prefix = _prefix(shared[along], want.get(along, ()))
            if prefix:
                shared[along] = prefix
            else:
                del shared[along]
    return shared


def _prefix(a: Chain, b: Chain) -> Chain:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x is not y), min(len(a), len(b)))
    return a[:length]


def through_selection(node: fx.Node, want: Mapping[Along, Chain]) -> tuple[fx.Node, Want]:
    """What a selection's input is wanted for: the selection's own index first."""
    x, index, dim, batch = selection(node)
    along = Along(dim, batch)
    return x, {**want, along: (index, *want.get(along, ()))}


def through_restore(node: fx.Node, want: Mapping[Along, Chain]) -> tuple[fx.Node, Want] | None:
    """The rows that a restore puts back, when the want begins with the restore's own index; what it puts them into, when the
    want begins with an index of other rows.
    """
    x, rows, index = node.args
    chain = want.get(STREAM, ())
    if chain and are_complements(chain[0], index):  # type: ignore[arg-type]
        return x, dict(want)  # type: ignore[return-value]
    if chain[:1] != (index,):
        return None
    rest = {**want, STREAM: chain[1:]}
    return rows, {along: c for along, c in rest.items() if c}  # type: ignore[return-value]


def selections(graph: fx.Graph) -> Selections:
    """Find what selections every value's users share, and where each stops."""
    found = Selections(followers=followers(graph))
    for node in reversed(graph.nodes):
        if node in found.followers:
            for x in told(node):
                found.uses[x].append((node, {}))
            continue
        if node.op == "output" or is_check(node) or is_write(node):  # a buffer is written from all rows
            for x in node.all_input_nodes:
                found.uses[x].append((node, {}))
            continue
        if node not in found.uses and (check := next((x for x in node.users if x in found.followers), None)):
            found.uses[node].append((check, {}))  # nothing else reads it
        if node not in found.uses:
            continue
        found.live.add(node)
        if is_selection(node):
            _visit_selection(node, found.uses)
        elif node.target is tokgraph.restore.default:
            _visit_restore(node, found)
        else:
            _visit_operator(node, found)
    return found


def _visit_selection(node: fx.Node, uses: Uses) -> None:
    for reader, want in uses[node]:
        x, inner = through_selection(node, want)
        uses[x].append((reader, inner))
    uses[selection(node)[1]].append((node, {}))


def _visit_restore(node: fx.Node, found: Selections) -> None:
    for reader, want in found.uses[node]:
        passed = through_restore(node, want)
        if passed is not None:
            found.uses[passed[0]].append((reader, passed[1]))
        else:
            found.kept_restores.add(node)
    if node in found.kept_restores:
        for x in node.all_input_nodes:
            found.uses[x].append((node, {}))


def _visit_operator(node: fx.Node, found: Selections) -> None:
    own: Want = {}
    inputs: dict[fx.Node, Want] = {x: {} for x in node.all_input_nodes}
    for along, chain in sorted(common(want for _, want in found.uses[node]).items()):
        passed = commute(node, along, one_sample=is_one(chain[0], 0))
        if isinstance(passed, Declined):
            found.declined.append(passed)
        elif any(chain != inputs[x].get(a, chain) for x, a in passed):
            found.declined.append(Declined(node.name, "an input is wanted for two different selections"))
        else:
            own[along] = chain
            for x, a in passed:
                inputs[x][a] = chain
    found.own[node], found.inputs[node] = own, inputs
    for x, want in inputs.items():
        found.uses[x].append((node, want))
    if isinstance(value(node), (list, tuple)):
        for result, _ in found.uses[node]:  # rows are taken of each result, never of all of them at once
            found.own[result], found.inputs[result] = own, {node: own}


def commute(node: fx.Node, along: Along, one_sample: bool = False) -> list[tuple[fx.Node, Along]] | Declined:
    """Where a selection along an axis of ``node`` goes among its inputs, or why it stays.

    Args:
        node: the operator.
        along: the axis.
        one_sample: the selection is for a batch of one sample, in which an axis of size 1 is a batch axis.
    """
    described = axis_map(node) if tensor(node) is not None else None
    if node.op != "call_function" or described is None:
        return _without_rule(node)
    if node.target is operator.getitem and not _alike(first_input(node)):
        return Declined(node.name, "one result of several, of different shapes, cannot be narrowed alone")
    if along.ndim is not None or (is_one(node, along.batch) and not one_sample):
        return Declined(node.name, "the value has no batch axis of its own")
    rows, samples = described.rows[along.dim], described.rows[along.batch]
    if rows is None or samples is None:
        return Declined(node.name, f"{node.target} mixes rows")
    if not rows and not traits(node.target).sized:
        return Declined(node.name, f"{node.target} makes the axis", end=True)
    batch_of = dict(samples)
    passed = []
    for x, dim in rows:
        if x in batch_of:
            passed.append((x, Along(dim, batch_of[x])))
        elif _may_lift(node, x):
            passed.append((x, Along(along.dim, along.batch, rank(node))))
        else:
            return Declined(node.name, f"an input of {node.target} has no batch axis")
    if any(_occurrences(node, x) > sum(x is y for y, _ in rows) for x, _ in passed):
        return Declined(node.name, f"{node.target} reads one value along two axes")
    return passed


def _alike(node: fx.Node) -> bool:
    """Whether the results of an operator with several have one shape, so that its rule speaks of all of them."""
    first, *others = [sizes_of(x) for x in value(node) if isinstance(x, torch.Tensor)]
    return all(same_sizes(sizes, first) for sizes in others)


def _without_rule(node: fx.Node) -> Declined:
    if node.op == "call_function":
        return Declined(node.name, f"{node.target} has no token-axis rule")
    return Declined(node.name, "an input of the task" if node.op == "placeholder" else "held by the model", end=True)


def _may_lift(node: fx.Node, x: fx.Node) -> bool:
    if node.target is aten.scaled_dot_product_attention.default:
        return x is argument(node, "attn_mask")
    return traits(node.target).broadcasts


def _occurrences(node: fx.Node, x: fx.Node) -> int:
    count = 0

    def visit(n: fx.Node) -> fx.Node:
        nonlocal count
        count += n is x
        return n

    fx.node.map_arg((node.args, node.kwargs), visit)
    return count

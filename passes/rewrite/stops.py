"""What keeps selections from moving further towards the inputs: every value at which one stops, and why.

A selection stops at a value because the value's operator does not pass it on, because the value's readers want different
rows of it, or because it meets a restore that puts other rows back. All of it is read off what the reverse pass found
(:func:`~tokgraph.passes.rewrite.wants.selections`); nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.ir.node import is_write, rank, tensor
from tokgraph.ir.printer import operator_name

from ..emitter import is_selection, selection
from ..rules import axis_map
from .wants import Along, Chain, Selections, common, selections, through_restore

tokgraph = torch.ops.tokgraph


@dataclass(frozen=True)
class Stop:
    """A value from which rows are selected, since the selection does not move further up.

    Args:
        value: the value.
        blockers: nodes that keep the selection here, the nearest to letting it pass first: the value itself, or those
            that need more rows of it than others.
        reason: what the first of them does.
        end: nothing lies further up: the rows begin here.
    """

    value: fx.Node
    blockers: tuple[fx.Node, ...]
    reason: str
    end: bool = False


def stops(graph: fx.Graph) -> list[Stop]:
    """Every value at which a selection stops, in graph order; one entry a reason.

    Args:
        graph: a seeded graph, before or after push-down.
    """
    found = selections(graph)
    declined = {d.node: d for d in found.declined}
    stopped: list[Stop] = []
    for node in graph.nodes:
        if node not in found.live or is_selection(node) or is_write(node):
            continue
        if node.target is tokgraph.restore.default:
            if any(want and through_restore(node, want) is None for _, want in found.uses[node]):
                stopped.append(Stop(node, (node,), "it does not put the selected rows back, but others"))
            continue
        if node.name in declined:
            stopped.append(Stop(node, (node,), declined[node.name].reason, declined[node.name].end))
        stopped += dict.fromkeys(_disagreements(node, found))
    return stopped


def _disagreements(node: fx.Node, found: Selections) -> Iterator[Stop]:
    """Where some readers of a value want fewer rows than all its readers want."""
    uses = found.uses[node][::-1]  # in graph order
    shared = common(want for _, want in uses)
    for along in sorted({along for _, want in uses for along in want}, key=lambda a: (a.dim, a.batch, a.ndim or 0)):
        longest = max((want.get(along, ()) for _, want in uses), key=len)
        if len(longest) == len(shared.get(along, ())):
            continue
        others = [(reader, want) for reader, want in uses if _agreed(want.get(along, ()), longest) < len(longest)]
        others.sort(key=lambda use: -_agreed(use[1].get(along, ()), longest))
        causes = [
            _cause(node, reader, _axis(along, node), found) if not want.get(along) else reader
            for reader, want in others
        ]
        (reader, want), cause = others[0], _name(causes[0])
        yield Stop(node, tuple(dict.fromkeys(causes)), _reads(node, reader, want.get(along, ()), longest, cause, found))


def _axis(along: Along, node: fx.Node) -> int:
    """The axis of a value itself: that of one to be given more axes first is counted with them."""
    return along.dim if along.ndim is None else along.dim - (along.ndim - rank(node))


def _agreed(chain: Chain, other: Chain) -> int:
    """How many indices two chains begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(chain, other, strict=False)) if a is not b), min(map(len, (chain, other)))
    )


def _reads(node: fx.Node, reader: fx.Node, chain: Chain, longest: Chain, cause: str, found: Selections) -> str:
    """What a reader takes of a value that others want fewer rows of.

    Args:
        node: the value.
        reader: the reader.
        chain: the selections that it applies.
        longest: those that others apply.
        cause: name of what needs the rows in the end.
        found: what the reverse pass found.
    """
    if chain:
        return f"{cause} reads {'more' if _agreed(chain, longest) == len(chain) else 'other'} rows of it"
    if is_selection(reader) and selection(reader)[1] is node:
        return "it says which rows a selection takes"
    if reader in found.kept_restores and reader.args[2] is node:
        return "it says where a restore puts rows"
    if reader in found.kept_restores:
        return f"a restore puts {'its rows back' if reader.args[1] is node else 'rows back into it'}, for {cause}"
    return f"{cause} needs all its rows"


def _cause(node: fx.Node, reader: fx.Node, dim: int, found: Selections) -> fx.Node:
    """Why a reader needs all rows of a value: itself, or what follows it row by row up to where rows are mixed or leave.

    Args:
        node: the value.
        reader: who reads it whole.
        dim: the axis of the value that indexes the rows.
        found: what the reverse pass found.
    """
    while (axis := _followed(node, reader, dim, found)) is not None:
        needs = [r for r, want in found.uses[reader] if not any(_axis(along, reader) == axis for along in want)]
        if not needs:
            return _keeper(reader, found) if reader in found.kept_restores else reader
        node, reader, dim = reader, needs[-1], axis
    return reader


def _keeper(restore: fx.Node, found: Selections) -> fx.Node:
    """Who reads other rows of a restore than it put back."""
    return next(r for r, want in reversed(found.uses[restore]) if through_restore(restore, want) is None)


def _followed(node: fx.Node, reader: fx.Node, dim: int, found: Selections) -> int | None:
    """The axis of a reader's result whose rows are computed from the rows of a value, one from one."""
    if reader in found.kept_restores:
        return dim if node in reader.args[:2] else None
    described = axis_map(reader) if node in reader.all_input_nodes and not is_selection(reader) else None
    if described is None or tensor(reader) is None:
        return None
    return next((axis for axis, rows in enumerate(described.rows) if rows and (node, dim) in rows), None)


def _name(node: fx.Node) -> str:
    return "the task's output" if node.op == "output" else operator_name(node.target)

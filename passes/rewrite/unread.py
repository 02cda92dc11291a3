"""Rows that are gone for good are not read: shown once, or checked on each batch, for every reader of the stream.

Values are followed row by row from the stream to the outputs. With each goes a mask of the rows that may be read: those
that are demanded, and those that do not depend on the stream. A row does not where its label is the one that the loss
ignores, where a weight of 0 multiplies it, or where a mask puts something else in its place; labels, weights and masks
are values without rows of the stream themselves, so the mask is known in each batch. Where an operator mixes rows, and
where rows leave the graph, all rows of the mask must be true.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.errors import IllegalRewriteError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, axis_argument, output_args, rank, tensor, tensor_inputs, where

from ..emitter import Emitter
from ..rules import AxisMap, Group, axis_map, traits
from ..rules.registry import first_input, is_one
from .checks import followers

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph

_LOSSES = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default)
_SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)
_PRODUCTS = (
    aten.mul.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor,
)  # fmt: skip
"""Operators whose result is 0 where one operand is."""
_SUMS = (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)
"""Operators whose result is true where one of two masks is."""
_WHERE = {
    aten.where.self: (1, 2), aten.where.ScalarOther: (1, None), aten.where.ScalarSelf: (None, 2),
}  # fmt: skip
"""Operator -> position of the operand that is taken where the mask is true, and where it is false."""


@dataclass(frozen=True)
class Rows:
    """Axes of a value that hold rows of the stream, and which of these may be read.

    Args:
        axes: the axes, ascending; axes of size 1 are left out.
        allowed: bool, one axis for each of ``axes``.
        varies: whether there may be a batch in which all rows are allowed.
    """

    axes: tuple[int, ...]
    allowed: fx.Node
    varies: bool = False


@dataclass(frozen=True)
class Check:
    """What must hold in each batch.

    Args:
        reader: who reads the rows.
        allowed: bool, true for rows that may be read.
    """

    reader: fx.Node
    allowed: fx.Node


class RowReaders:
    """Follows rows of the stream through a task's graph.

    Args:
        emit: where nodes go.
        facts: the task's facts.
        demanded: ``[batch, tokens]`` bool.
        narrowed: losses that will read the demanded rows only, and check their labels themselves.
    """

    def __init__(self, emit: Emitter, facts: TaskFacts, demanded: fx.Node, narrowed: Collection[fx.Node]) -> None:
        self._emit = emit
        self._facts = facts
        self._demanded = demanded
        self._narrowed = narrowed
        self._rows: dict[fx.Node, Rows] = {}
        self.checks: list[Check] = []

    def follow(self, sources: Mapping[fx.Node, tuple[int, int] | None], inside: Collection[str]) -> None:
        """Follow rows from ``sources``: value -> its batch and token axes, ``None`` where it has no such pair.

        Args:
            sources: values of the stream, or of blocks, that something outside of the blocks reads.
            inside: names of the nodes in blocks, which are not followed.

        Raises:
            IllegalRewriteError: an operator reads all rows, whatever the batch.
        """
        passed_over = {*self._narrowed, *followers(self._emit.graph)}
        for node in list(self._emit.graph.nodes):
            if node.name not in inside and node.op == "call_function" and node not in passed_over:
                self._visit(node, [x for x in node.all_input_nodes if x in sources and sources[x] is None])
            if (axes := sources.get(node)) is not None:
                self._rows[node] = self._begin(node, *axes)

    def leave(self, leaves: Iterable[fx.Node]) -> None:
        """The values leave the graph with all their rows.

        Raises:
            IllegalRewriteError: a value holds rows that are not demanded, whatever the batch.
        """
        for node in leaves:
            if node in self._rows:
                self._read_all(node, self._rows[node])

    def _begin(self, node: fx.Node, batch: int, tokens: int) -> Rows:
        allowed = self._demanded if batch < tokens else self._call(aten.transpose.int, self._demanded, 0, 1)
        return self._without_ones(node, Rows(tuple(sorted((batch, tokens))), allowed))

    def _visit(self, node: fx.Node, unknown: list[fx.Node]) -> None:
        read = {x: self._rows[x] for x in tensor_inputs(node) if x in self._rows}
        if traits(node.target).shape_only or node.target in _SIZES:
            return
        if unknown:
            raise self._refusal(node)
        if node.target in _LOSSES and read:
            self._read_by_loss(node, read)
            return
        described = axis_map(node) if read else None
        passed = []
        for x, rows in read.items():
            moved = None if described is None or tensor(node) is None else self._moved(node, x, rows, described)
            if moved is None:
                self._read_all(node, self._picked(node, rows) if x is node.args[0] else rows)
            else:
                passed.append(self._excused(node, x, moved, read))
        if passed:
            self._rows[node] = self._joined(node, passed)

    def _read_all(self, reader: fx.Node, rows: Rows) -> None:
        if not rows.varies:
            raise self._refusal(reader)
        self.checks.append(Check(reader, rows.allowed))

    def _refusal(self, reader: fx.Node) -> IllegalRewriteError:
        reads = self._facts.demand.reads
        return IllegalRewriteError(
            f"task {self._facts.name!r}: a site without restore drops rows for good, and {reader.target} reads rows that "
            f"reads={reads!r} rules out, or cannot be shown not to",
            where=where(reader),
            help="use restore=True, or reads='all' with sites that restore; or let the loss leave other rows out: by the "
            "ignore index as label, or a weight of 0 that is computed from the task's inputs",
        )

    # -------------------------------------------------------------- where rows go

    def _moved(self, node: fx.Node, x: fx.Node, rows: Rows, described: AxisMap) -> Rows | None:
        """The rows of ``x`` in the value of ``node``, ``None`` where it mixes them."""
        if described.groups:
            return self._reshaped(node, x, rows, described.groups)
        if node.target is aten.index.Tensor and x is first_input(node):
            return self._indexed(node, rows)
        cut = axis_argument(node, x) if node.target in (aten.slice.Tensor, aten.select.int) else None
        if cut is not None and cut in rows.axes:
            at = rows.axes.index(cut)
            allowed = self._call(node.target, rows.allowed, at, *node.args[2:])
            if node.target is aten.slice.Tensor:
                return Rows(rows.axes, allowed, varies=True)
            return Rows(tuple(a - (a > cut) for a in rows.axes if a != cut), allowed, varies=True)
        to = [[axis for axis, follows in enumerate(described.rows) if (x, a) in (follows or ())] for a in rows.axes]
        if any(len(found) != 1 for found in to) or len({found[0] for found in to}) < len(to):
            return None
        axes = [found[0] for found in to]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        moved = order != list(range(len(axes)))
        allowed = self._call(aten.permute.default, rows.allowed, order) if moved else rows.allowed
        return Rows(tuple(sorted(axes)), allowed, rows.varies)

    def _indexed(self, node: fx.Node, rows: Rows) -> Rows | None:
        """Rows that are looked up by number, as that of each sample's last token."""
        indices = list(argument(node, "indices"))
        given = [i for i in indices if i is not None]
        leading = rows.axes == tuple(range(len(rows.axes))) and len(indices) <= len(rows.axes)
        if not leading or any(i in self._rows or tensor(i).dtype in (torch.bool, torch.uint8) for i in given):  # type: ignore[union-attr]
            return None
        allowed = self._call(aten.index.Tensor, rows.allowed, indices)
        return Rows(tuple(range(rank(allowed))), allowed, varies=True)

    def _picked(self, node: fx.Node, rows: Rows) -> Rows:
        """The rows of a node's first operand, of which it may read those only at which a mask is true."""
        indices = argument(node, "indices") if node.target is aten.index.Tensor else []
        mask = indices[0] if len(indices) == 1 else None
        if mask is None or mask in self._rows or not _is_bool(mask) or rows.axes != tuple(range(rank(mask))):
            return rows
        unread = self._call(aten.logical_not.default, mask)
        return Rows(rows.axes, self._call(aten.logical_or.default, rows.allowed, unread), True)

    def _reshaped(self, node: fx.Node, x: fx.Node, rows: Rows, groups: tuple[Group, ...]) -> Rows | None:
        """Rows whose axes are merged, with one another or with others, or split."""
        chosen: dict[Group, None] = {}
        for axis in rows.axes:
            mine = [group for group in groups if axis in group.inputs]
            if not mine:
                return None
            chosen[min(mine, key=lambda group: len(group.inputs) + len(group.outputs))] = None
        taken = sorted(axis for group in chosen for axis in group.inputs)
        axes = tuple(sorted(axis for group in chosen for axis in group.outputs))
        if len(set(taken)) < len(taken) or len(set(axes)) < len(axes):
            return None
        allowed = rows.allowed
        for at, axis in enumerate(taken):
            if axis not in rows.axes:
                allowed = self._call(aten.unsqueeze.default, allowed, at)
                sizes = [self._emit.size(x, a) if a == axis else -1 for a in taken[: at + 1]]
                allowed = self._call(aten.expand.default, allowed, [*sizes, *[-1] * (rank(allowed) - at - 1)])
        if any(len(group.inputs) + len(group.outputs) > 2 for group in chosen):
            sizes = [self._emit.size(node, axis) for axis in axes[1:]]
            allowed = self._call(aten.reshape.default, allowed, [-1, *sizes])
        return self._without_ones(node, Rows(axes, allowed, rows.varies))

    def _without_ones(self, node: fx.Node, rows: Rows) -> Rows:
        """The rows without axes of size 1."""
        allowed = rows.allowed
        for at, axis in reversed(list(enumerate(rows.axes))):
            if is_one(node, axis):
                allowed = self._call(aten.squeeze.dim, allowed, at)
        return Rows(tuple(axis for axis in rows.axes if not is_one(node, axis)), allowed, rows.varies)

    def _joined(self, node: fx.Node, parts: list[Rows]) -> Rows:
        """The rows of a value that is computed from the rows of several."""
        axes = tuple(sorted({axis for part in parts for axis in part.axes}))
        masks = []
        for part in parts:
            mask = part.allowed
            for at, axis in enumerate(axes):
                if axis not in part.axes:
                    mask = self._call(aten.unsqueeze.default, mask, at)
            masks.append(mask)
        allowed, *others = dict.fromkeys(masks)
        for mask in others:
            allowed = self._call(aten.logical_and.default, allowed, mask)
        return Rows(axes, allowed, all(part.varies for part in parts))

    # -------------------------------------------------------------- rows that do not depend on the stream

    def _excused(self, node: fx.Node, x: fx.Node, rows: Rows, read: Mapping[fx.Node, Rows]) -> Rows:
        """The rows of ``x`` in the value of ``node``, those too that the node gives another value than one of ``x``."""
        mask = self._excuse(node, x, read)
        if mask is None or not _along(mask, node, rows):
            return rows
        return Rows(rows.axes, self._call(aten.logical_or.default, rows.allowed, self._by_row(mask, node, rows)), True)

    def _excuse(self, node: fx.Node, x: fx.Node, read: Mapping[fx.Node, Rows]) -> fx.Node | None:
        """Bool that broadcasts to the node's value, true where that does not depend on ``x``."""
        target = node.target
        others = [y for y in node.args if isinstance(y, fx.Node) and y is not x and y not in read]
        if target in _PRODUCTS and others:
            return self._call(aten.eq.Scalar, others[0], 0)
        if target in _SUMS and others and _is_bool(others[0]):
            return others[0]
        if target in _WHERE and node.args[0] not in read:
            mask, (taken, left) = node.args[0], _WHERE[target]
            sides = [side is not None and node.args[side] is x for side in (taken, left)]
            if sides == [True, False]:
                return self._call(aten.logical_not.default, mask)
            return mask if sides == [False, True] else None  # type: ignore[return-value]
        if (
            target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
            and x is node.args[0]
            and node.args[1] not in read
        ):
            return node.args[1]  # type: ignore[return-value]
        if target is aten.eq.Tensor and others and _counts_from_zero(x) and not _is_float(others[0]):
            return self._call(aten.lt.Scalar, others[0], 0)  # no class has a negative number, as ignored labels have
        return None

    def _by_row(self, mask: fx.Node, node: fx.Node, rows: Rows) -> fx.Node:
        """A mask that broadcasts to a value, as one over its rows: true where all elements of a row are."""
        while rank(mask) < rank(node):
            mask = self._call(aten.unsqueeze.default, mask, 0)
        for axis in reversed(range(rank(node))):
            if axis not in rows.axes:
                mask = self._call(aten.squeeze.dim if is_one(mask, axis) else aten.all.dim, mask, axis)
        return mask

    def _read_by_loss(self, node: fx.Node, read: Mapping[fx.Node, Rows]) -> None:
        """A loss over rows, which does not read those whose label is ignored."""
        x, targets = argument(node, "self"), argument(node, "target")
        classes = 1 if rank(x) > 1 else 0
        rows = read.get(x)
        if rows is None or len(read) > 1 or classes in rows.axes or _is_float(targets):
            for found in read.values():
                self._read_all(node, found)
            return
        ignored = self._call(aten.eq.Scalar, targets, argument(node, "ignore_index", -100))
        mine = Rows(tuple(axis - (axis > classes) for axis in rows.axes), rows.allowed, True)
        allowed = self._call(aten.logical_or.default, rows.allowed, self._by_row(ignored, targets, mine))
        self._read_all(node, Rows(mine.axes, allowed, True))

    def _call(self, target: object, *args: object) -> fx.Node:
        return self._emit.call(target, *args, origin=self._demanded)


def pass_through_checks(emit: Emitter, graph: fx.Graph, checks: Iterable[Check]) -> None:
    """Let the loss pass through the checks, so that no batch that fails one has a loss.

    Args:
        emit: where nodes go.
        graph: the graph, whose first scalar output is the loss.
        checks: the checks.
    """
    results = output_args(graph)
    leaf = next(i for i, node in enumerate(results) if _is_float(node) and rank(node) == 0)
    for check in dict.fromkeys(checks):
        place = where(check.reader)
        text = [place.node or "", place.op or "", place.module or "", place.source or ""]
        results[leaf] = emit.call(
            tokgraph.check_unread.default, results[leaf], check.allowed, *text, origin=check.reader
        )
    graph.output_node().args = (tuple(results),)


def outside_readers(
    facts: TaskFacts, nodes: Mapping[str, fx.Node], first: int
) -> tuple[dict[fx.Node, tuple[int, int] | None], set[str]]:
    """Values from block ``first`` on that something outside of the blocks reads, with their batch and token axes, and the
    names of the nodes in blocks.

    Args:
        facts: the task's facts.
        nodes: the graph's nodes by name.
        first: the first block in which rows may be gone.
    """
    inside = {name for block in facts.blocks for name in block.nodes}
    passed_over = {node.name for node in followers(nodes[facts.entry].graph)}
    sources: dict[fx.Node, tuple[int, int] | None] = {}
    for name in dict.fromkeys(name for block in facts.blocks[first:] for name in block.nodes):
        node = nodes[name]
        if any(user.name not in inside | passed_over for user in node.users) and tensor(node) is not None:
            sources[node] = _axes(node, facts)
    return sources, inside


def _axes(node: fx.Node, facts: TaskFacts) -> tuple[int, int] | None:
    tokens = facts.token_axes.get(node.name, ())
    if node.name in facts.states:
        return 0, 1
    if len(tokens) != 1 or tokens[0] == 0 or rank(node) < 2:
        return None
    return 0, tokens[0]


def _along(mask: fx.Node, node: fx.Node, rows: Rows) -> bool:
    """Whether a mask that broadcasts to a value differs from row to row: a parameter that scales features does not."""
    missing = rank(node) - rank(mask)
    return any(axis >= missing and not is_one(mask, axis - missing) for axis in rows.axes)


def _is_float(node: fx.Node) -> bool:
    val = tensor(node)
    return val is not None and val.is_floating_point()


def _is_bool(node: fx.Node) -> bool:
    val = tensor(node)
    return val is not None and val.dtype is torch.bool


def _counts_from_zero(x: fx.Node) -> bool:
    """Whether a value is the number of a class: the place of the largest score."""
    while traits(x.target).copies or traits(x.target).reshape:
        x = first_input(x)
    return x.target is aten.argmax.default

"""Rules of look-ups, gathers and scatters, tokgraph's own among them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from tokgraph import ops  # noqa: F401  (registers torch.ops.tokgraph)
from tokgraph.ir.node import argument, axis_argument, dims, rank, same_size, tensor

from .registry import Axis, AxisMap, Mix, Rows, first_input, identity_rows, is_one, rule

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


@rule(aten.embedding.default, axes=(), lookup=True)
def embedding(node: fx.Node) -> AxisMap:
    """One table row per index: the axes of the indices are row by row."""
    indices = argument(node, "indices")
    rows: list[Rows] = [((indices, axis),) for axis in range(rank(indices))]
    return AxisMap((*rows, ()))


@rule(aten.one_hot.default, axes=())
def one_hot(node: fx.Node) -> AxisMap:
    """The axes of the indices are row by row."""
    x = first_input(node)
    return AxisMap((*(((x, axis),) for axis in range(rank(x))), ()))


@rule(aten.gather.default, axes=("dim",), lookup=True)
def gather(node: fx.Node) -> AxisMap:
    """Along ``dim`` rows follow the index, elsewhere the index and ``x`` (but not where the index is the narrower)."""
    x, index = first_input(node), argument(node, "index")
    along = axis_argument(node, x)
    return _by_index(x, along, [x, index], {along: ((index, along),)})


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two, axes=("dim",))
def scatter(node: fx.Node) -> AxisMap:
    """Row by row in every axis but ``dim`` (but not where index or source are of another size than ``x``)."""
    x, index, src = first_input(node), argument(node, "index"), argument(node, "src")
    along = axis_argument(node, x)
    operands = [x, index, src] if isinstance(src, fx.Node) else [x, index]
    return _by_index(x, along, operands, {along: None})


def _by_index(x: fx.Node, along: int, operands: list[fx.Node], rows_along: dict[int, Rows]) -> AxisMap:
    """Row by row in all operands in every axis but ``along``, where all of them are of one size."""
    rows: list[Rows] = []
    order = [(y, along) for y in operands]
    for axis in range(rank(x)):
        if axis in rows_along:
            rows.append(rows_along[axis])
        elif all(same_size(dims(y)[axis], dims(x)[axis]) for y in operands):
            rows.append(tuple((y, axis) for y in operands))
        else:
            rows.append(None)
            order += [(y, axis) for y in operands]
    return AxisMap(tuple(rows), _order(order))


def _order(axes: Iterable[Axis]) -> tuple[Mix, ...]:
    return tuple(Mix("order", (axis,)) for axis in axes)


def _axes_of(*values: object) -> list[Axis]:
    """Every axis of the tensors among ``values``."""
    return [(x, axis) for x in values if isinstance(x, fx.Node) and tensor(x) is not None for axis in range(rank(x))]


@rule(aten.index.Tensor, lookup=True)
def index(node: fx.Node) -> AxisMap:
    """Advanced indexing with integer tensors on the leading axes: the axes of the (broadcast) indices are row by row
    in every index; axes of ``x`` that are not indexed follow ``x``; a boolean index is data dependent.
    """
    x, indices = first_input(node), list(argument(node, "indices"))
    n = rank(node)
    tensors = [i for i in indices if isinstance(i, fx.Node)]
    val = [tensor(i) for i in tensors]
    adjacent = indices == sorted(indices, key=lambda i: i is None) and None not in indices[: len(tensors)]
    if not adjacent or any(v is None or v.dtype in (torch.bool, torch.uint8) for v in val):
        return AxisMap((None,) * n, _order(_axes_of(x, *tensors)))
    broadcast = n - (rank(x) - len(tensors))
    rows: list[Rows] = []
    for axis in range(n):
        if axis < broadcast:
            aligned = [(i, axis - (broadcast - rank(i))) for i in tensors]
            rows.append(tuple((i, j) for i, j in aligned if j >= 0 and (not is_one(i, j) or is_one(node, axis))))
        else:
            rows.append(((x, axis - broadcast + len(tensors)),))
    return AxisMap(tuple(rows), (Mix("order", tuple((x, a) for a in range(len(tensors)))),))


@rule(aten.index_select.default, lookup=True)
def index_select(node: fx.Node) -> AxisMap:
    """The indexed axis follows the index, unless that is a scalar; the others follow ``x``."""
    x, along = first_input(node), axis_argument(node, node)
    index: fx.Node = argument(node, "index")
    chosen: Rows = ((index, 0),) if rank(index) else None
    rows = tuple(chosen if a == along else ((x, a),) for a in range(rank(node)))
    return AxisMap(rows, (Mix("order", ((x, along),)),))


@rule(aten.masked_scatter.default)
def masked_scatter(node: fx.Node) -> AxisMap:
    """Takes source elements in order, so a row depends on the mask of the rows before it: no axis can be narrowed."""
    x, mask = first_input(node), argument(node, "mask")
    return _positions_of(node, x, *([(mask, rank(node) - rank(mask))] if isinstance(mask, fx.Node) else []))


def _positions_of(node: fx.Node, x: fx.Node, *others: tuple[fx.Node, int]) -> AxisMap:
    """No axis can be narrowed, but the positions are those of ``x`` (and of others, whose axes start later)."""
    aligned = [(axis, (x, axis)) for axis in range(rank(node))]
    for other, offset in others:
        aligned += [(j + offset, (other, j)) for j in range(rank(other)) if not is_one(other, j)]
    return AxisMap((None,) * rank(node), _order(_axes_of(*node.all_input_nodes)), tuple(aligned))


@rule(aten.index_put.default)
def index_put(node: fx.Node) -> AxisMap:
    """Writes by index. With one integer index on one axis, ``x[:, :, index] = values``, the other axes are row by row in
    ``x`` and in the values, which broadcast; else no axis is followed.
    """
    x, values = first_input(node), argument(node, "values")
    given = [(axis, i) for axis, i in enumerate(argument(node, "indices")) if i is not None]
    if len(given) != 1 or not _is_list_of_positions(given[0][1]):
        return _positions_of(node, x)
    along, n = given[0][0], rank(node)
    rows: list[Rows] = [((x, axis),) for axis in range(n)]
    for j in range(rank(values)):
        if not is_one(values, j):
            axis = j + n - rank(values)
            rows[axis] = ((x, axis), (values, j))
    rows[along] = None
    written = along - n + rank(values)
    order = [(x, along), (given[0][1], 0), *([(values, written)] if written >= 0 else [])]
    return AxisMap(tuple(rows), _order(order), ((along, (x, along)),))


def _is_list_of_positions(index: fx.Node) -> bool:
    val = tensor(index)
    return val is not None and val.dim() == 1 and val.dtype not in (torch.bool, torch.uint8)


@rule(aten.bucketize.Tensor, aten.searchsorted.Tensor, axes=())
def bucketize(node: fx.Node) -> AxisMap:
    """The place of each number among sorted ones: row by row where these are one list for all, as ``bucketize`` has it."""
    looks = node.target is aten.searchsorted.Tensor
    x, among = (argument(node, "self"), argument(node, "sorted_sequence" if looks else "boundaries"))
    if rank(among) > 1:
        return AxisMap((None,) * rank(node), _order(_axes_of(x, among)))
    return AxisMap(tuple(((x, axis),) for axis in range(rank(x))), _order([(among, 0)]))


@rule(aten.index_add.default, aten.index_copy.default)
def index_add(node: fx.Node) -> AxisMap:
    """Writes rows by index: no axis is followed."""
    return _positions_of(node, first_input(node))


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def slice_scatter(node: fx.Node) -> AxisMap:
    """Writes ``src`` over a range (or one element) of one axis; the other axes are row by row in both."""
    x, src = first_input(node), argument(node, "src")
    along = axis_argument(node, x)
    lost = node.target is aten.select_scatter.default
    rows: tuple[Rows, ...] = tuple(
        None if axis == along else ((x, axis), (src, axis - (lost and axis > along))) for axis in range(rank(x))
    )
    cut = [(x, along)] if lost else [(x, along), (src, along)]
    return AxisMap(rows, tuple(Mix("layout", (axis,)) for axis in cut), ((along, (x, along)),))


def is_whole_slice_scatter(node: fx.Node) -> bool:
    """Whether a ``slice_scatter`` writes over every element, so that nothing of its first operand is left."""
    x, src = first_input(node), argument(node, "src")
    along = axis_argument(node, x)
    start, step = argument(node, "start"), argument(node, "step", 1)
    return start in (None, 0) and step == 1 and same_size(dims(src)[along], dims(x)[along])


@rule(aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, axes=("dim",))
def sort(node: fx.Node) -> AxisMap:
    """Orders along one axis; the others are row by row."""
    x = first_input(node)
    along = axis_argument(node, x)
    rows: tuple[Rows, ...] = tuple(None if axis == along else ((x, axis),) for axis in range(rank(x)))
    return AxisMap(rows, (Mix("order", ((x, along),)),))


@rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(node: fx.Node) -> AxisMap:
    """Writes a number at some places of one axis; the others are row by row."""
    x = first_input(node)
    along = axis_argument(node, x)
    rows: tuple[Rows, ...] = tuple(None if axis == along else ((x, axis),) for axis in range(rank(x)))
    places = [(argument(node, "index"), 0)]
    return AxisMap(rows, _order([(x, along), *places]), ((along, (x, along)),))


@rule(tokgraph.select.default, tokgraph.select_range.default, lookup=True)
def select(node: fx.Node) -> AxisMap:
    """Ours: narrows ``dim``; the others are row by row."""
    return _narrowed(node, argument(node, "dim"), argument(node, "batch_dim"))


@rule(tokgraph.drop.default, lookup=True)
def drop(node: fx.Node) -> AxisMap:
    """Ours: narrows the token axis of the stream."""
    return _narrowed(node, 1, 0)


def _narrowed(node: fx.Node, dim: int, batch: int) -> AxisMap:
    x, index = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(index, fx.Node)
    rows: list[Rows] = identity_rows(node, x)
    rows[batch], rows[dim] = ((x, batch), (index, 0)), None
    return AxisMap(tuple(rows))


@rule(tokgraph.restore.default, tokgraph.restore_range.default)
def restore(node: fx.Node) -> AxisMap:
    """Ours: the token axis is that of ``x``, but a row comes from ``x`` or from ``rows``."""
    x, rows, index = node.args[:3]
    assert isinstance(x, fx.Node)
    assert isinstance(rows, fx.Node)
    assert isinstance(index, fx.Node)
    features = tuple(((x, axis), (rows, axis)) for axis in range(2, rank(node)))
    return AxisMap((((x, 0), (rows, 0), (index, 0)), None, *features), aligned=((1, (x, 1)),))


@rule(tokgraph.merge.default, tokgraph.merge_range.default, tokgraph.join.default)
def merge(node: fx.Node) -> AxisMap:
    """Ours: a row comes from one operand or the other; samples and features are row by row."""
    others, rows, index = node.args[:3]
    assert isinstance(others, fx.Node)
    assert isinstance(rows, fx.Node)
    assert isinstance(index, fx.Node)
    order = tuple(Mix("order", (axis,)) for axis in ((others, 1), (rows, 1), (index, 1)))
    return AxisMap((((others, 0), (rows, 0), (index, 0)), None, ((others, 2), (rows, 2))), order)


@rule(tokgraph.select_targets.default)
def select_targets(node: fx.Node) -> AxisMap:
    """Ours: labels at the demanded rows."""
    x, index = first_input(node), argument(node, "index")
    return AxisMap((((x, 0), (index, 0)), None))

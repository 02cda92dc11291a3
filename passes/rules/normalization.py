"""Rules of operators that normalise or reduce over axes, and of losses."""

from __future__ import annotations

import torch
from torch import fx

from tokgraph import ops  # noqa: F401  (registers torch.ops.tokgraph)
from tokgraph.ir.node import argument, axis_argument, axis_arguments, rank, tensor_inputs

from .registry import AxisMap, Mix, MixKind, Rows, broadcast_rows, first_input, is_one, rule

aten = torch.ops.aten


def _kept(x: fx.Node, over: set[int], kind: MixKind, aligned: bool = True) -> AxisMap:
    """An operator of the same rank that needs whole rows along the axes ``over``, whose places it keeps if ``aligned``."""
    rows: list[Rows] = [None if axis in over else ((x, axis),) for axis in range(rank(x))]
    mixes = tuple(Mix(kind, ((x, axis),)) for axis in sorted(over))
    return AxisMap(tuple(rows), mixes, tuple((axis, (x, axis)) for axis in sorted(over)) if aligned else ())


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, axes=("dim",))
def softmax(node: fx.Node) -> AxisMap:
    """Normalises over ``dim``."""
    x = first_input(node)
    return _kept(x, {axis_argument(node, x)}, "softmax")


@rule(torch.ops.tokgraph.softmax_beside.default)
def softmax_beside(node: fx.Node) -> AxisMap:
    """Ours: normalises over the last axis, beside further columns whose other axes broadcast."""
    x, sinks = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(sinks, fx.Node)
    last, columns = rank(x) - 1, rank(sinks) - 1
    rows: list[Rows] = [((x, axis),) for axis in range(last)]
    for axis in range(columns):
        at = last - columns + axis
        if not is_one(sinks, axis) or is_one(x, at):
            rows[at] = ((x, at), (sinks, axis))
    return AxisMap(
        (*rows, None), (Mix("softmax", ((x, last),)), Mix("reduction", ((sinks, columns),))), ((last, (x, last)),)
    )


@rule(
    aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default,
    axes=("dim",),
)  # fmt: skip
def scan(node: fx.Node) -> AxisMap:
    """Runs along its axis."""
    x = first_input(node)
    return _kept(x, set(axis_arguments(node, x)), "scan")


@rule(aten.flip.default, aten.roll.default, axes=("dims",), turns=True)
def turned(node: fx.Node) -> AxisMap:
    """Moves rows to other places of its axes, or of all of them."""
    x = first_input(node)
    return _kept(x, set(axis_arguments(node, x, "dims")) or set(range(rank(x))), "scan", aligned=False)


@rule(aten.diff.default)
def diff(node: fx.Node) -> AxisMap:
    """Differences of neighbours along one axis, with what is put before and after it; the others are row by row."""
    x = first_input(node)
    along = axis_argument(node, x)
    joined = [y for y in (x, argument(node, "prepend"), argument(node, "append")) if y is not None]
    rows: tuple[Rows, ...] = tuple(
        None if axis == along else tuple((y, axis) for y in joined) for axis in range(rank(x))
    )
    return AxisMap(rows, tuple(Mix("window", ((y, along),)) for y in joined))


@rule(
    aten.layer_norm.default, aten.rms_norm.default, aten._fused_rms_norm.default, aten.native_layer_norm.default,
    axes=(), normalises=True,
)  # fmt: skip
def layer_norm(node: fx.Node) -> AxisMap:
    """Normalises over the trailing axes."""
    x = first_input(node)
    over = len(argument(node, "normalized_shape"))
    return _kept(x, set(range(rank(x) - over, rank(x))), "reduction")


@rule(
    aten.group_norm.default, aten.native_group_norm.default, aten.batch_norm.default, aten.instance_norm.default,
    aten._native_batch_norm_legit.no_stats,
    normalises=True,
)  # fmt: skip
def channel_norm(node: fx.Node) -> AxisMap:
    """Normalises over everything but the batch (``group_norm``); batch statistics mix the batch as well, and
    ``native_group_norm`` is told its size.
    """
    x = first_input(node)
    over = set(range(rank(x)))
    if node.target is aten.group_norm.default:
        over.discard(0)
    return _kept(x, over, "reduction")


@rule(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.all.dim,
    aten.any.dim, aten.argmax.default, aten.argmin.default, aten.linalg_vector_norm.default, aten.logsumexp.default,
    aten.sum.default, aten.mean.default, aten.all.default, aten.any.default, aten.prod.default, aten.prod.dim_int,
    aten.std.correction, aten.var_mean.correction, aten.std_mean.correction, aten.max.dim, aten.min.dim,
    aten.nansum.default,
    aten.count_nonzero.dim_IntList, aten.norm.ScalarOpt_dim,
    axes=("dim",),
)  # fmt: skip
@rule(
    aten.aminmax.default, aten.median.dim, aten.nanmedian.dim, aten.mode.default, aten.kthvalue.default,
    aten.max.default, aten.min.default, aten.median.default, aten.nanmedian.default,
)  # fmt: skip
def reduction(node: fx.Node) -> AxisMap:
    """Reduces over some or all axes, to one result or several of one shape."""
    x = first_input(node)
    n = rank(x)
    dims = set(axis_arguments(node, x)) or set(range(n))
    left = range(n) if argument(node, "keepdim", False) else [a for a in range(n) if a not in dims]
    rows: list[Rows] = [() if axis in dims else ((x, axis),) for axis in left]
    return AxisMap(tuple(rows), tuple(Mix("reduction", ((x, axis),)) for axis in sorted(dims)))


@rule(torch.ops.tokgraph.mean_of_rows.default)
def mean_of_rows(node: fx.Node) -> AxisMap:
    """Averages over the first axis of its operands; what a row holds is one by one."""
    operands = argument(node, "rows")
    rows: list[Rows] = [tuple((x, axis + 1) for x in operands) for axis in range(rank(node))]
    return AxisMap(tuple(rows), _all_reduced(node, 1))


@rule(torch.ops.tokgraph.class_shares.default)
def class_shares(node: fx.Node) -> AxisMap:
    """Counts classes over all axes of its operands."""
    return AxisMap(((),), _all_reduced(node, 2))


def _all_reduced(node: fx.Node, axes: int) -> tuple[Mix, ...]:
    """Rows that are averaged, and their weights."""
    return tuple(Mix("reduction", ((x, axis),)) for x in tensor_inputs(node) for axis in range(min(axes, rank(x))))


@rule(aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default, axes=("dim",))
def fourier(node: fx.Node) -> AxisMap:
    """Transforms over some axes; the others are row by row."""
    x = first_input(node)
    return _kept(x, set(axis_arguments(node, x)), "scan", aligned=False)


@rule(aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default,
      aten.nll_loss_forward.default)  # fmt: skip
def loss(node: fx.Node) -> AxisMap:
    """A loss: reads every row, returns a scalar (or rows, which are then not followed)."""
    inputs = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    mixes = tuple(Mix("reduction", ((x, axis),)) for x in inputs for axis in range(rank(x)))
    return AxisMap((None,) * rank(node), mixes)


@rule(
    aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
    aten.kl_div.default, aten.binary_cross_entropy_with_logits.default,
    aten.soft_margin_loss.default,
)  # fmt: skip
def elementwise_loss(node: fx.Node) -> AxisMap:
    """A loss of elements: as any elementwise operator, or their sum or mean."""
    if argument(node, "reduction", 1) == 0:
        return AxisMap(tuple(broadcast_rows(node)))
    return loss(node)

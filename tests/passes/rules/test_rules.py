"""Every rule against the operator it describes: what it says about rows is tried out on numbers (see ``calls``).

Sizes coincide throughout: tokens = hidden = heads * head size, and often the batch as well.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from tests.passes.rules.calls import READINGS, Call, Weight, flags, numbers, positions, weight
from tokgraph.passes.rules import ruled_operators, traits

aten, tokgraph = torch.ops.aten, torch.ops.tokgraph
B, S, H, HEADS, D = 3, 4, 4, 2, 2  # batch; tokens = hidden = heads * head size

stream, heads = numbers(B, S, H), numbers(B, HEADS, S, D)
square = numbers(S, S, S)  # batch = tokens = hidden
causal = torch.ones(S, S, dtype=torch.bool).tril()
two_rows = torch.tensor([[0, 2], [1, 3], [2, 3]])

CASES: dict[Any, list[tuple[Any, ...]]] = {
    # pointwise
    aten.add.Tensor: [(stream, stream * 2), (stream, numbers(H)), (numbers(S, 1), numbers(1, S)), (square, numbers(S, S))],
    aten.where.self: [(flags(B, S, 1), stream, numbers(H)), (flags(S, S), square, square)],
    operator.getitem: [((stream, stream + 1), 1), ((stream, numbers(B, S, 1)), 1)],
    # contraction
    aten.linear.default: [(stream, weight(H, H)), (square, weight(S, S), weight(S)), (numbers(S, H), weight(5, H))],
    aten.matmul.default: [
        (heads, heads.mT),
        (square, square),
        (stream, numbers(H, S)),
        (stream, numbers(H)),
        (numbers(S), square),
        (numbers(H), numbers(H)),
        (numbers(B, 1, S, H), numbers(HEADS, H, S)),
        (numbers(1, S, H), numbers(B, H, S)),
    ],
    aten.bmm.default: [(stream, stream.mT)],
    aten.mm.default: [(numbers(S, H), numbers(H, S))],
    aten.mv.default: [(numbers(S, H), numbers(H))],
    aten.dot.default: [(numbers(H), numbers(H))],
    aten.addmm.default: [
        (weight(S), numbers(S, H), numbers(H, S)),
        (numbers(S, S), numbers(S, H), numbers(H, S)),
        (numbers(S, 1), numbers(S, H), numbers(H, S)),
    ],
    aten.baddbmm.default: [(numbers(B, 1, S), stream, stream.mT), (numbers(S, S), square, square)],
    aten.conv1d.default: [
        (numbers(B, H, S), weight(H, 1, 3), None, [1], [1], [1], H),
        (numbers(B, H, S), weight(5, H, 2)),
        (numbers(S, S), weight(S, S, 1)),  # no batch
    ],
    aten.conv2d.default: [(numbers(B, 3, S, S), weight(5, 3, 2, 2)), (numbers(3, S, S), weight(5, 3, 2, 2))],
    aten.convolution.default: [(numbers(B, H, S), weight(H, H, 3), None, [1], [1], [1], False, [0], 1)],
    aten.conv3d.default: [(numbers(2, 1, 2, S, S), weight(3, 1, 1, 2, 2))],
    aten.conv1d.padding: [(numbers(B, H, S), weight(H, H, 3), None, [1], "same")],
    aten.conv2d.padding: [(numbers(3, S, S), weight(2, 3, 2, 2), None, [1], "valid")],
    aten.conv3d.padding: [(numbers(2, 1, 2, S, S), weight(3, 1, 1, 2, 2), None, [1], "valid")],
    aten.einsum.default: [
        ("bqhd,bkhd->bhqk", [numbers(B, S, HEADS, D), numbers(B, S, HEADS, D) + 1]),
        ("bshd,hde->bshe", [numbers(B, S, HEADS, D), numbers(HEADS, D, 5)]),
        ("...d,ed->...e", [stream, numbers(5, H)]),
        ("b...,b...->b", [stream, stream + 1]),
        ("ij,jk", [numbers(S, S), numbers(S, S) + 1]),
        ("bsd,bd->bs", [stream, numbers(B, H)]),
        ("bss->bs", [square]),
        ("bsd->sb", [stream]),
        ("bs,s,b->bs", [numbers(B, S), numbers(S), numbers(B)]),
        ("bsd,bsd->bsd", [stream, numbers(1, S, H)]),
    ],
    # attention
    aten.scaled_dot_product_attention.default: [
        (heads, heads + 1, heads * 2),
        (heads, heads + 1, heads * 2, causal),
        (heads, heads + 1, heads * 2, flags(B, 1, S, S) | torch.eye(S, dtype=torch.bool)),
        (heads, heads + 1, heads * 2, numbers(B, HEADS, 1, S)),
        (heads, heads + 1, heads * 2, None, 0.0, True),
        (heads, numbers(B, HEADS, 5, D), numbers(B, HEADS, 5, 3), numbers(HEADS, S, 5)),
        (stream, stream + 1, square[:B] * 2),
    ],
    # normalisation, reduction, loss
    aten.softmax.int: [(numbers(B, HEADS, S, S), -1), (square, 1)],
    aten.log_softmax.int: [(stream, 2)],
    aten._softmax.default: [(square, -1, False)],
    aten._log_softmax.default: [(square, 1, False)],
    aten.cumsum.default: [(square, 1), (stream, -1)],
    aten.cumprod.default: [(square, 1)],
    aten.logcumsumexp.default: [(stream, -2)],
    aten.flip.default: [(square, [1]), (stream, [0, -1])],
    aten.roll.default: [(square, [1], [1]), (stream, [1])],
    aten.diff.default: [(square,), (stream, 1, 1), (stream, 1, 1, stream[:, :1], stream[:, :2])],
    aten.layer_norm.default: [(stream, [H], weight(H), weight(H)), (square, [S, S])],
    aten.rms_norm.default: [(square, [S], weight(S))],
    aten.native_layer_norm.default: [(stream, [H], weight(H), weight(H), 1e-5)],
    aten._fused_rms_norm.default: [(stream, [H], weight(H), 1e-5)],
    aten.group_norm.default: [(numbers(B, H, S), 2)],
    aten.batch_norm.default: [(numbers(B, H, S), None, None, None, None, True, 0.1, 1e-5, False)],
    aten.native_group_norm.default: [(numbers(B, H, S), None, None, B, H, S, 2, 1e-5)],
    aten.instance_norm.default: [(numbers(B, H, S), None, None, None, None, True, 0.1, 1e-5, False)],
    aten.mean.dim: [(square, [-1], True), (stream, [1]), (stream, [0, 2])],
    aten.sum.dim_IntList: [(stream, [1], True)],
    aten.sum.default: [(stream,)],
    aten.mean.default: [(stream,)],
    aten.prod.default: [(stream,)],
    aten.amax.default: [(stream, [-1]), (stream,)],
    aten.amin.default: [(square, [0], True), (stream, [-1])],
    aten.argmin.default: [(square, 1)],
    aten.argmax.default: [(square, -1), (stream, 1, True), (stream,)],
    aten.var.correction: [(stream, [-1])],
    aten.std.correction: [(stream, [1]), (stream, [-1], {"keepdim": True})],
    aten.var_mean.correction: [(stream, [-1], {"keepdim": True}), (square, [0])],
    aten.std_mean.correction: [(stream, [2])],
    aten.max.dim: [(square, 1), (stream, -1, True)],
    aten.min.dim: [(stream, 2)],
    aten.max.default: [(stream,)],
    aten.min.default: [(stream,)],
    aten.median.default: [(stream,)],
    aten.nanmedian.default: [(stream,)],
    aten.nansum.default: [(stream, [1]), (stream,)],
    aten.count_nonzero.dim_IntList: [(flags(B, S, H), [-1])],
    aten.norm.ScalarOpt_dim: [(stream, 2, [-1], True)],
    aten.aminmax.default: [(stream, {"dim": -1}), (stream, {"dim": 1, "keepdim": True}), (stream,)],
    aten.median.dim: [(square, 1)],
    aten.nanmedian.dim: [(stream, -1, True)],
    aten.mode.default: [(stream,)],
    aten.kthvalue.default: [(square, 2, 1)],
    aten.cummax.default: [(square, 1)],
    aten.cummin.default: [(stream, -1)],
    aten._native_batch_norm_legit.no_stats: [(numbers(B, H, S), None, None, True, 0.1, 1e-5)],
    aten._fft_r2c.default: [(stream, [2], 0, True), (square, [1], 0, False)],
    aten._fft_c2r.default: [(torch.complex(stream, stream / 2), [2], 0, 4)],
    aten._fft_c2c.default: [(torch.complex(stream, stream / 2), [1, 2], 0, True)],
    aten.all.dim: [(flags(B, S, H), 1)],
    aten.any.dim: [(flags(B, S, H), -2, True)],
    aten.any.default: [(flags(B, S),)],
    aten.all.default: [(flags(B, S),)],
    aten.linalg_vector_norm.default: [(stream, 2, [-1]), (stream,)],
    aten.logsumexp.default: [(square, [1])],
    aten.prod.dim_int: [(square, 1)],
    aten.cross_entropy_loss.default: [
        (numbers(B * S, 5), positions(B * S, below=5)),
        (numbers(S, 5), positions(S, below=5), None, 0),
    ],
    aten.nll_loss_nd.default: [(numbers(S, 5), positions(S, below=5))],
    aten.nll_loss.default: [(numbers(S, 5), positions(S, below=5))],
    aten.nll_loss_forward.default: [(numbers(S, 5), positions(S, below=5), None, 1, -100)],
    aten.binary_cross_entropy_with_logits.default: [(stream, stream * 0.5), (stream, stream * 0.5, None, None, 0)],
    aten.huber_loss.default: [(stream, stream * 2), (stream, stream * 2, 0)],
    aten.kl_div.default: [(stream, stream * 2), (stream, stream.exp(), 0)],
    aten.l1_loss.default: [(stream, stream * 2), (stream, stream * 2, 0)],
    aten.mse_loss.default: [(stream, stream * 2), (stream, stream * 2, 0)],
    aten.smooth_l1_loss.default: [(stream, stream * 2), (stream, stream * 2, 0)],
    aten.soft_margin_loss.default: [(stream, stream.sign()), (stream, stream.sign(), 0)],
    # shapes
    aten.view.default: [
        (stream, [B, S, HEADS, D]),
        (square, [S, S, HEADS, D]),
        (numbers(B, S, HEADS, D), [B, S, H]),
        (stream, [B * S, H]),
        (numbers(B * S, H), [B, S, -1]),
        (numbers(S, S), [S, 1, S]),
        (numbers(1, S, S), [S, S]),
        (stream.mT.contiguous(), [B, S, H]),
        (numbers(2, 6), [4, 3]),
    ],
    aten._unsafe_view.default: [(square, [S, S, HEADS, D])],
    aten.reshape.default: [(heads.transpose(1, 2), [B, S, H]), (heads, [B, S, H]), (numbers(B, 1, S), [-1, S])],
    aten.flatten.using_ints: [(stream, 0, 1), (heads, 2)],
    aten.unflatten.int: [(square, 2, [HEADS, D]), (square, 0, [2, 2])],
    aten.squeeze.dim: [(numbers(B, 1, S), 1), (numbers(1, S, S), -3)],
    aten.squeeze.dims: [(numbers(1, S, 1, S), [0, 2]), (numbers(B, 1, S, 1), [1, 3])],
    aten.squeeze.default: [(numbers(1, S, 1, S),)],
    aten.transpose.int: [(heads, 1, 2), (square, -1, -2), (square, 0, 1)],
    aten.t.default: [(numbers(S, S),), (numbers(S),)],
    aten.permute.default: [(heads, [0, 2, 1, 3]), (square, [-1, 0, 1])],
    aten.unsqueeze.default: [(stream, 1), (square, -1), (stream, 0)],
    aten.expand.default: [
        (numbers(1, S, D), [B, S, D]),
        (numbers(S, 1), [B, S, S]),
        (numbers(1, S, S), [1, S, S]),
        (numbers(B, 1, S), [-1, S, -1]),
    ],
    aten.repeat_interleave.self_int: [(stream, 2, 1), (stream, 1, 1), (stream, 3, -1), (numbers(1, S), 2, 0), (numbers(B, S), 2)],
    aten.repeat.default: [(stream, [1, 1, 1]), (square, [1, 2, 1]), (numbers(1, S), [B, 1, 1]), (numbers(S, 1), [2, 1, S])],
    aten.slice.Tensor: [
        (square, 1, 1, 3), (stream, 2, 0, 2), (stream, 1, 0, S), (stream, 1, 0, 2**63 - 1, 2), (stream, -2, -2),
    ],
    aten.glu.default: [(stream,), (square, 1)],
    aten.unfold.default: [(stream, -1, 2, 2), (square, 1, 2, 1)],
    aten.view_as_real.default: [(torch.complex(stream, stream / 2),)],
    aten.view_as_complex.default: [(numbers(B, S, 2),)],
    aten.select.int: [(square, 1, 2), (square, -1, 0), (stream, 0, -1)],
    aten.cat.default: [([stream, stream + 1], 1), ([square, square + 1], -1), ([stream[..., :1], stream], 2)],
    aten.stack.default: [([square, square + 1], 1), ([stream, stream + 1], -1)],
    aten.split.Tensor: [(square, 2, 1), (stream, 2, -1)],
    aten.split_with_sizes.default: [(square, [1, 3], -1)],
    aten.chunk.default: [(stream, 2, 2)],
    aten.unbind.int: [(square, 1), (square, -1)],
    aten.constant_pad_nd.default: [(square, [1, 0]), (stream, [0, 0, 1, 1]), (stream, [0, -1])],
    aten.pad.default: [(square, [0, 0, 0, 1])],
    aten.full.default: [([S, S], 1.0)],
    aten.ones.default: [([S, S],)],
    aten.zeros.default: [([S, S],)],
    aten.empty.memory_format: [([S, S],)],
    aten.arange.default: [(S,)],
    aten.arange.start: [(1, S)],
    aten.arange.start_step: [(0, S, 2)],
    aten.scalar_tensor.default: [(1.0,)],
    aten.new_zeros.default: [(weight(S, S), [S, S])],  # no row of its tensor is read
    aten.new_ones.default: [(weight(S, S), [S, S])],
    aten.new_full.default: [(weight(S, S), [S, S], 1.0)],
    aten.new_empty.default: [(weight(S, S), [S, S])],
    # look-ups, gathers, scatters
    aten.embedding.default: [(weight(9, H), positions(B, S, below=9)), (weight(S, S), positions(S, S, below=S))],
    aten.one_hot.default: [(positions(S, S, below=S), S)],
    aten.gather.default: [(square, 1, positions(S, S, S, below=S)), (stream, 2, positions(B, S, 2, below=H))],
    aten.scatter.src: [
        (square, 1, torch.arange(S).view(1, S, 1).expand(S, S, S), square * 2),
        (numbers(B, S), 1, two_rows, numbers(B, 2)),
    ],
    aten.scatter.value: [(numbers(B, S), 1, two_rows, 7.0), (numbers(S, 5), 1, two_rows, 7.0)],
    aten.index.Tensor: [
        (numbers(S, S), [positions(S, S, below=S)]),
        (square, [positions(B, 1, below=S), positions(S, below=S)]),
        (stream, [None, positions(S, below=S)]),
        (stream, [None, positions(S, below=S), positions(S, below=S)]),
    ],
    aten.index_select.default: [(square, 1, torch.tensor([2, 0]))],
    aten.masked_scatter.default: [(stream, flags(B, S, 1), numbers(B * S, H))],
    aten.index_put.default: [
        (square, [positions(S, below=S)], numbers(S, S)),
        (stream, [None, torch.tensor([0, 2])], numbers(B, 2, H)),
        (stream, [None, torch.tensor([0, 2])], numbers(H)),
        (stream, [flags(B, S)], numbers(H)),
    ],
    aten.index_add.default: [(stream, 1, torch.tensor([0, 2]), numbers(B, 2, H))],
    aten.index_fill.int_Scalar: [(stream, -1, torch.tensor([0, 2]), 7.0), (square, 1, torch.tensor([1]), 0.0)],
    aten.index_fill.int_Tensor: [(stream, 2, torch.tensor([0]), numbers())],
    aten.index_copy.default: [(square, 1, torch.tensor([0, 2]), numbers(S, 2, S))],
    aten.bucketize.Tensor: [(stream, numbers(5).sort().values)],
    aten.searchsorted.Tensor: [(numbers(5).sort().values, stream), (square.sort().values, square)],
    aten.scatter_add.default: [(numbers(B, S), 1, two_rows, numbers(B, 2)), (stream, 2, positions(B, S, 2, below=H), numbers(B, S, 2))],
    aten.scatter_reduce.two: [(stream, 2, positions(B, S, 2, below=H), numbers(B, S, 2), "amax")],
    aten.slice_scatter.default: [
        (square, numbers(S, 2, S), 1, 1, 3), (stream, stream * 2, 1), (stream, numbers(B, S, 1), -1, 0, 1),
    ],
    aten.select_scatter.default: [
        (square, numbers(S, S), 1, 2), (stream, numbers(B, S), -1, 0), (stream, numbers(S, H), 0, 1),
    ],
    aten.sort.default: [(square, 1), (stream,)],
    aten.sort.stable: [(square, {"stable": True, "dim": 1})],
    aten.argsort.default: [(stream, 1), (square,)],
    aten.topk.default: [(square, 2), (stream, 1, 1)],
    # tokgraph's own
    tokgraph.mean_of_rows.default: [
        ([stream.flatten(0, 1), numbers(S, H)], []), ([numbers(S, S, S)], [numbers(S)]), ([numbers(S), numbers(S)], [numbers(S), numbers(S)]),
    ],
    tokgraph.class_shares.default: [
        ([positions(S, 2, below=H), positions(B, 2, below=H)], [], H, torch.float64), ([positions(S, 2, below=S)], [numbers(S)], S, torch.float64),
    ],
    tokgraph.softmax_beside.default: [
        (numbers(B, HEADS, S, S), numbers(HEADS, 1, 1)), (square, numbers(S, S, 1)), (stream, numbers(B, 1, 2)),
    ],
    tokgraph.grouped_mm.default: [
        (stream, numbers(5, H, 3), positions(B, S, below=5)), (square, numbers(S, S, S), positions(S, S, below=S)),
    ],
    tokgraph.select.default: [(stream, two_rows, 1, 0), (numbers(B, HEADS, S, S), two_rows, 3, 0)],
    tokgraph.drop.default: [(stream, two_rows)],
    tokgraph.restore.default: [(stream, numbers(B, 2, H), two_rows), (numbers(B, S), numbers(B, 2), two_rows)],
    tokgraph.merge.default: [(numbers(B, S - 2, H), numbers(B, 2, H), two_rows)],
    tokgraph.select_range.default: [(stream, torch.tensor([[1, 2]]).expand(B, -1), 1, 0, 1)],
    tokgraph.restore_range.default: [(stream, numbers(B, 2, H), torch.tensor([[1, 2]]).expand(B, -1), 1)],
    tokgraph.merge_range.default: [(numbers(B, S - 2, H), numbers(B, 2, H), torch.tensor([[1, 2]]).expand(B, -1), 1)],
    tokgraph.join.default: [(numbers(B, S - 2, H), numbers(B, 2, H), torch.arange(S).expand(B, -1))],
    tokgraph.select_targets.default: [(torch.full((B, S), -100), two_rows, -100)],
}  # fmt: skip
CALLS = [
    pytest.param(op, args, id=f"{getattr(op, '__name__', op)}-{number}")
    for op, calls in CASES.items()
    for number, args in enumerate(calls)
]


RULED = frozenset(op for op in ruled_operators() if getattr(op, "namespace", "aten") in ("aten", "tokgraph"))
"""Not torch's prims, which it loads when it needs them, nor operators of other tests."""


def call_of(op: Any, args: tuple[Any, ...]) -> Call:
    *args, last = args
    return Call(op, *args, **last) if isinstance(last, dict) else Call(op, *args, last)


@pytest.mark.parametrize(("op", "args"), CALLS)
@pytest.mark.parametrize("reading", READINGS)
def test_rule(op, args, reading):
    getattr(call_of(op, args), f"check_{reading}")()


def test_every_operator_with_a_rule_has_cases():
    """Those that are not elementwise by hand, the others below."""
    assert RULED - ELEMENTWISE - RANDOM.keys() == CASES.keys() - ELEMENTWISE


def test_rules_hold_their_tongue():
    """Axes that an operator mixes are not followed: a few that a careless rule would."""
    rows = {
        "merged": Call(aten.view.default, stream, [B * S, H]).rule.rows[0],
        "split": Call(aten.view.default, numbers(2, 6), [4, 3]).rule.rows[0],
        "keys of an attention": Call(aten.matmul.default, square, square).rule.rows[1],
        "columns": Call(aten.linear.default, square, weight(S, S)).rule.rows[2],
        "causal queries": Call(aten.scaled_dot_product_attention.default, *(3 * [heads]), None, 0.0, True).rule.rows[2],
        "a strided slice": Call(aten.slice.Tensor, square, 1, 0, 2**63 - 1, 2).rule.rows[1],
    }
    followed = {what: [j for _, j in found or ()] for what, found in rows.items()}
    assert followed == {what: [1] if what == "keys of an attention" else [] for what in rows}


# Elementwise operators: all overloads, called with what their schemas ask for.

RANDOM = {
    aten.bernoulli.default: "two calls draw different numbers",
    aten.bernoulli.Tensor: "two calls draw different numbers",
    aten.bernoulli.p: "two calls draw different numbers",
    aten.native_dropout.default: "two calls draw different numbers",
    aten.empty_like.default: "two calls return what is in memory",
}
"""Elementwise operators whose results cannot be compared: their rule is checked on sizes alone."""
NOT_DESCRIBED = {
    aten.equal.default: "returns a number",
    aten.rrelu.default: "draws random numbers, which verification would see differ",
}
"""Overloads that carry the tag, write to nothing, and have no rule all the same."""
ELEMENTWISE = {op for op in RULED if traits(op).broadcasts} - RANDOM.keys()
SECOND = numbers(S, H) + 1  # broadcasts over the batch
COMPLEX = torch.complex(stream, stream / 2)
BY_HAND: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten._conj.default: ((COMPLEX,), {}),
    aten.clamp.default: ((stream, 0.2, 0.8), {}),
    aten.clamp.Tensor: ((stream, SECOND - 0.8), {}),
    aten.clip.default: ((stream, 0.2, 0.8), {}),
    aten.clip.Tensor: ((stream, SECOND - 0.8), {}),
    aten.div.Tensor_mode: ((stream, SECOND), {"rounding_mode": "floor"}),
    aten.div.Scalar_mode: ((stream, 0.3), {"rounding_mode": "trunc"}),
    aten.dropout.default: ((stream, 0.5, False), {}),
    aten.expand_as.default: ((SECOND, stream), {}),
    aten.masked_fill.Scalar: ((stream, SECOND > 1.5, 0.5), {}),
    aten.masked_fill.Tensor: ((stream, SECOND > 1.5, numbers()), {}),
    aten.mvlgamma.default: ((stream + 1, 2), {}),
    aten.round.decimals: ((stream,), {"decimals": 1}),
    aten.to.other: ((stream, Weight(numbers(7, S).float())), {}),
    aten.to.prim_Device: ((stream, torch.device("cpu")), {}),
    aten.type_as.default: ((stream, Weight(numbers(7, S).float())), {}),
    aten.where.self: ((stream > 0.5, stream, SECOND), {}),
}


def elementwise_call(op: Any) -> Call:
    """A call with a tensor of three axes and, for further tensors, ones of two that broadcast."""
    if op in BY_HAND:
        args, kwargs = BY_HAND[op]
        return Call(op, *args, **kwargs)
    required = [a for a in op._schema.arguments if not a.has_default_value()]
    plain = {"dtype": torch.float64, "device": torch.device("cpu")}
    kinds = (lambda t: t, lambda t: t > t.mean(), lambda t: (4 * t).long())  # numbers, flags, counts
    for convert in kinds:
        tensors = iter([convert(stream), *[convert(SECOND)] * 3])
        number = convert(torch.tensor([0.5, 0.0]))[0].item()
        values = [next(tensors) if "Tensor" in str(a.type) else plain.get(a.name, number) for a in required]
        given = list(zip(required, values, strict=True))
        try:
            return Call(op, *(v for a, v in given if not a.kwarg_only), **{a.name: v for a, v in given if a.kwarg_only})
        except (RuntimeError, NotImplementedError):  # not for this type
            continue
    raise AssertionError(f"{op} could not be called")


@pytest.mark.parametrize("op", sorted(ELEMENTWISE, key=str), ids=str)
def test_elementwise(op):
    elementwise_call(op).check()


ON_COMPLEX = [
    aten.abs.default, aten.angle.default, aten.sgn.default, aten.exp.default, aten.reciprocal.default,
    aten.conj_physical.default, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor,
]  # fmt: skip


@pytest.mark.parametrize("op", ON_COMPLEX, ids=str)
def test_elementwise_on_complex_numbers(op):
    Call(op, *[COMPLEX, COMPLEX[0] + 1][: 1 + (op._overloadname == "Tensor")]).check()


@pytest.mark.parametrize("op", sorted(RANDOM, key=str), ids=str)
def test_elementwise_without_fixed_results(op):
    args = {aten.bernoulli.Tensor: (SECOND - 1,), aten.bernoulli.p: (0.5,), aten.native_dropout.default: (0.5, True)}
    call = Call(op, stream, *args.get(op, ()))
    call.check_sizes()
    call.check_complete()


@pytest.mark.slow
def test_every_functional_overload_with_the_tag_has_a_rule():
    """Of ATen's; the other ones write to an argument."""
    tagged = set()
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if name.startswith("aten::"):
            tagged.add(getattr(getattr(aten, packet), overload or "default"))
    tagged = {op for op in tagged if torch.Tag.pointwise in op.tags}
    assert len(tagged) > 500
    missing = {op for op in tagged if op not in ruled_operators()}
    assert {op for op in missing if not op._schema.is_mutable} == NOT_DESCRIBED.keys()
    assert not {op for op in tagged - missing if op._schema.is_mutable}

"""Operators written with others, against torch's own and against autograd, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import tokgraph as tg
from tokgraph.passes.lower.decompositions import (
    any_along,
    convolution_backward,
    half_layer_norm,
    index_put,
    masked_scatter,
    masked_scatter_backward,
    runtime_decompositions,
    slice_backward,
)

aten = torch.ops.aten
seeds = st.integers(0, 2**16)
many = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(*sizes: int, seed: int = 0, share: float = 0.5) -> Tensor:
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < share


# masked_scatter: masks over whole rows, as image features have; over elements; with axes to be broadcast.

MASKS: dict[str, tuple[tuple[int, ...], Callable[[int, float], Tensor]]] = {
    "whole rows": ((2, 5, 3), lambda seed, p: random_mask(2, 5, 1, seed=seed, share=p)),
    "whole rows, expanded": ((2, 5, 3), lambda seed, p: random_mask(2, 5, 1, seed=seed, share=p).expand(2, 5, 3)),
    "elements": ((2, 5, 3), lambda seed, p: random_mask(2, 5, 3, seed=seed, share=p)),
    "elements, not contiguous": ((2, 5, 3), lambda seed, p: random_mask(3, 5, 2, seed=seed, share=p).transpose(0, 2)),
    "rows, the same in all samples": ((4, 5, 3), lambda seed, p: random_mask(5, 1, seed=seed, share=p)),
    "rows, samples of size 1": ((4, 5, 3), lambda seed, p: random_mask(1, 5, 1, seed=seed, share=p)),
    "rows, samples expanded": ((4, 5, 3), lambda seed, p: random_mask(5, 1, seed=seed, share=p).expand(4, 5, 3)),
    "elements, the same in all samples": ((4, 5, 3), lambda seed, p: random_mask(5, 3, seed=seed, share=p)),
    "columns, the same in all rows": ((4, 5, 3), lambda seed, p: random_mask(3, seed=seed, share=p)),
    "samples": ((4, 5, 3), lambda seed, p: random_mask(4, 1, 1, seed=seed, share=p)),
    "columns of samples": ((4, 5, 3), lambda seed, p: random_mask(4, 1, 3, seed=seed, share=p)),
    "one axis": ((7,), lambda seed, p: random_mask(7, seed=seed, share=p)),
    "width 1": ((2, 5, 1), lambda seed, p: random_mask(2, 5, 1, seed=seed, share=p)),
    "four axes": ((2, 3, 4, 5), lambda seed, p: random_mask(2, 1, 4, 1, seed=seed, share=p)),
}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", MASKS)
def test_masked_scatter(case: str, share: float) -> None:
    shape, make = MASKS[case]
    for seed in range(5):
        mask, x = make(seed, share), random(*shape, seed=seed)
        source = random(*shape, seed=seed + 100)
        assert torch.equal(masked_scatter(x, mask, source), torch.masked_scatter(x, mask, source))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", MASKS)
def test_masked_scatter_backward(case: str, share: float) -> None:
    """Against autograd, with a source of exactly the elements that fit, and with more."""
    shape, make = MASKS[case]
    for seed in range(5):
        mask, grad = make(seed, share), random(*shape, seed=seed)
        source = random(*shape, seed=seed + 100).requires_grad_()
        torch.masked_scatter(random(*shape), mask, source).backward(grad)
        assert torch.equal(masked_scatter_backward(grad, mask, shape), source.grad)
        assert torch.equal(aten.masked_scatter_backward(grad, mask, shape), source.grad)


def test_a_source_of_just_the_rows_that_are_masked() -> None:
    """What a model gives: features ``[images * tokens, hidden]``, one for each masked row."""
    mask = random_mask(3, 6, 1)
    count = int(mask.sum())
    x, source, grad = random(3, 6, 4), random(count, 4, seed=1), random(3, 6, 4, seed=2)
    expected = x.clone()
    expected[mask.squeeze(-1)] = source
    for m in (mask, mask.expand_as(x)):
        assert torch.equal(masked_scatter(x, m, source), expected)
        assert torch.equal(masked_scatter_backward(grad, m, source.shape), grad[mask.squeeze(-1)])


def test_rows_are_gathered_whole() -> None:
    """A mask over rows costs one index a row, not one an element."""
    rows = make_fx(masked_scatter)(random(2, 5, 3), random_mask(2, 5, 1).expand(2, 5, 3), random(2, 5, 3))
    elements = make_fx(masked_scatter)(random(2, 5, 3), random_mask(2, 5, 3), random(2, 5, 3))
    indices = [
        next(n.args[2].meta["val"].numel() for n in graph.graph.nodes if n.target is aten.index_select.default)
        for graph in (rows, elements)
    ]
    assert indices == [10, 30]


# slice_backward: any bounds that a slice can have.


@many
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    step=st.integers(1, 3),
    seed=seeds,
)
def test_slice_backward(sizes: list[int], data: st.DataObject, step: int, seed: int) -> None:
    dim = data.draw(st.integers(-len(sizes), len(sizes) - 1), label="dim")
    size = sizes[dim]
    start = data.draw(st.integers(-size, size), label="start")
    end = data.draw(st.one_of(st.integers(-size, size), st.sampled_from([size + 3, sys.maxsize])), label="end")
    grad = torch.randn_like(aten.slice.Tensor(random(*sizes, seed=seed), dim, start, end, step))
    found = slice_backward(grad, sizes, dim, start, end, step)
    assert torch.equal(found, aten.slice_backward(grad, sizes, dim, start, end, step))
    x = random(*sizes, seed=seed).requires_grad_()
    aten.slice.Tensor(x, dim, start, end, step).backward(grad)
    assert torch.equal(found, x.grad)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("start", "end"), [(-100, 3), (-100, 100), (7, 100), (100, 200), (3, 1), (-6, -1)])
def test_slice_bounds_outside_the_axis(start: int, end: int, step: int) -> None:
    """Python's bounds may lie anywhere; torch clamps them."""
    grad = torch.randn_like(aten.slice.Tensor(random(2, 5), 1, start, end, step))
    expected = aten.slice_backward(grad, [2, 5], 1, start, end, step)
    assert torch.equal(slice_backward(grad, [2, 5], 1, start, end, step), expected)


# convolution_backward: groups, strides that leave rows unread, padding, dilation; one to three axes.


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, object]:
    axes = draw(st.integers(1, 2))

    def per_axis(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(axes)]

    groups = draw(st.integers(1, 3))
    found = {
        "groups": groups,
        "samples": draw(st.integers(1, 3)),
        "into": groups * draw(st.integers(1, 2)),
        "out": groups * draw(st.integers(1, 2)),
        "size": per_axis(1, 9),
        "kernel": per_axis(1, 4),
        "stride": per_axis(1, 4),
        "padding": per_axis(0, 3),
        "dilation": per_axis(1, 3),
    }
    keys = ("size", "padding", "dilation", "kernel")
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(*(found[key] for key in keys), strict=True)))
    return found


@many
@given(of=convolutions(), bias=st.booleans(), seed=seeds)
def test_convolution_backward(of: dict[str, list[int]], bias: bool, seed: int) -> None:
    samples, into, out, groups = (of[key] for key in ("samples", "into", "out", "groups"))
    check_convolution(
        random(samples, into, *of["size"], seed=seed),
        random(out, into // groups, *of["kernel"], seed=seed + 1),
        (of["stride"], of["padding"], of["dilation"], groups),
        bias,
    )


def check_convolution(
    x: Tensor, weight: Tensor, how: tuple[list[int], list[int], list[int], int], bias: bool = True
) -> None:
    """Each gradient, alone and together, against autograd."""
    stride, padding, dilation, groups = how
    leaves = [x, weight, *([random(len(weight), seed=9)] if bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    b = leaves[2] if bias else None
    no_padding = [0] * (x.dim() - 2)
    made = aten.convolution(x, weight, b, stride, padding, dilation, False, no_padding, groups)
    grad = torch.randn_like(made)
    expected = torch.autograd.grad(made, leaves, grad)
    masks = [[True, True, bias], [True, False, False], [False, True, False], [False, False, bias]]
    for mask in masks:
        found = convolution_backward(
            grad, x.detach(), weight.detach(), [len(weight)] if bias else None,
            stride, padding, dilation, False, no_padding, groups, mask,
        )  # fmt: skip
        assert [f is not None for f in found] == mask
        for wanted, actual, right in zip(mask, found, expected, strict=False):
            if wanted:
                torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", range(5, 12))
def test_a_stride_that_leaves_rows_unread(size: int) -> None:
    check_convolution(random(2, 4, size), random(6, 2, 3), ([4], [0], [1], 2))


def test_one_stride_for_all_axes_and_three_axes() -> None:
    check_convolution(random(2, 3, 7, 6), random(4, 3, 3, 2), ([2], [1], [1], 1))
    check_convolution(random(1, 2, 5, 4, 6), random(2, 1, 2, 3, 2), ([1, 2, 3], [1, 1, 0], [2, 1, 1], 2))


def test_patches_and_depthwise_convolutions() -> None:
    """An image encoder's first layer, and a mixer of tokens."""
    check_convolution(random(2, 3, 16, 12), random(5, 3, 4, 4), ([4, 4], [0, 0], [1, 1], 1))
    check_convolution(random(2, 6, 9), random(6, 1, 3), ([1], [1], [1], 6))


def test_a_transposed_convolution_is_left_to_torch() -> None:
    x, weight = random(1, 2, 4), random(2, 3, 3)
    arguments = (x, weight, [3], [1], [0], [1], True, [0], 1, [True, True, True])
    assert convolution_backward(random(1, 3, 6), *arguments) is NotImplemented


# Layer norms in half precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_in_half_precision(dtype: torch.dtype, affine: bool) -> None:
    """As near to the norm in float64 as torch's own; mean and deviation in the type that torch gives them."""
    x = random(3, 5, 8).to(dtype)
    weight, bias = (random(8, seed=s).to(dtype) if affine else None for s in (1, 2))
    found = half_layer_norm(x, [8], weight, bias, 1e-5)
    own = torch.native_layer_norm(x, [8], weight, bias, 1e-5)
    exact = F.layer_norm(x.double(), [8], *(None if p is None else p.double() for p in (weight, bias)))
    assert found[0].dtype is dtype
    error, least = ((y.double() - exact).abs().max() for y in (found[0], own[0]))
    assert error <= 2 * least
    torch.testing.assert_close(found[1].double(), x.double().mean(-1, keepdim=True), rtol=2e-2, atol=2e-3)


def test_a_layer_norm_in_half_precision_is_made_of_operators_that_onnx_has() -> None:
    """torch's own decomposition takes the variance by `prims.var`, whose shapes are put back by a view without a converter."""
    table = runtime_decompositions()
    traced = make_fx(lambda x: F.layer_norm(x, [4]), decomposition_table=table)(random(2, 4).to(torch.bfloat16))
    assert {str(node.target).partition(".")[0] for node in traced.graph.nodes if node.op == "call_function"} <= {
        "aten", "<built-in function getitem>",
    }  # fmt: skip


def test_other_layer_norms_stay_whole() -> None:
    assert half_layer_norm(random(2, 4), [4], None, None, 1e-5) is NotImplemented
    traced = make_fx(lambda x: F.layer_norm(x, [4]), decomposition_table=runtime_decompositions())(random(2, 4))
    assert "native_layer_norm" in called(traced)


# The table.


def test_every_operator_of_ours_is_written_out() -> None:
    table = {str(op).rpartition(".")[0] for op in runtime_decompositions()}
    ours = {name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names() if name.startswith("tokgraph::")}
    assert tg.__version__
    assert len(ours) > 10
    assert {name.partition("/")[0] for name in ours} <= {name for name in table if name.startswith("tokgraph.")}


CONSTANTS = {"filters": random(2, 4, 3), "rows": random(4, 6, seed=1), "mask": random_mask(4, 1, seed=1)}
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "silu": (F.silu, "silu_backward"),
    "gelu": (F.gelu, "gelu_backward"),
    "tanh gelu": (lambda x: F.gelu(x, approximate="tanh"), "gelu_backward"),
    "slice": (lambda x: x[:, 1:-1], "slice_backward"),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.tensor([0, 3, -100, 5])), "nll_loss_backward"),
    "image cross entropy": (
        lambda x: F.cross_entropy(x.reshape(1, 4, 6, 1), torch.tensor([[[0], [3], [-100], [1], [2], [2]]])),
        "nll_loss2d_backward",
    ),
    "convolution": (lambda x: F.conv1d(x.unsqueeze(0), CONSTANTS["filters"]), "convolution_backward"),
    "indexing": (lambda x: x[[0, 2, 0, 3]], "index_put"),
    "unsafe indexing": (lambda x: aten._unsafe_index(x, [None, torch.tensor([1, 1, 5])]), "_unsafe_index_put"),
    "index select": (lambda x: x.index_select(1, torch.tensor([0, 2, 0])), "index_add"),
    "masked scatter": (
        lambda x: torch.masked_scatter(CONSTANTS["rows"], CONSTANTS["mask"], x),
        "masked_scatter_backward",
    ),
}


def called(traced: torch.fx.GraphModule) -> set[str]:
    """Names of a graph's operators."""
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    return {op._schema.name.removeprefix("aten::") for op in targets if isinstance(op, torch._ops.OpOverload)}


@pytest.mark.parametrize("case", LOSSES)
def test_a_traced_gradient_holds_no_operator_that_runtimes_lack(case: str) -> None:
    """And without the table it would: else the entry is not needed."""
    function, operator = LOSSES[case]

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).square().sum(), x)[0]

    traced = make_fx(gradient, decomposition_table=runtime_decompositions())(random(4, 6))
    assert operator in called(make_fx(gradient)(random(4, 6)))
    assert operator not in called(traced)
    x = random(4, 6, seed=3)
    torch.testing.assert_close(traced(x), gradient(x), rtol=1e-10, atol=1e-12)


def assert_added_in_turn(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    traced = make_fx(function, decomposition_table=runtime_decompositions())(x)
    assert "scatter_add" in called(traced)
    assert not called(traced) & {"index_put", "_unsafe_index_put", "index_add", "embedding_dense_backward"}
    torch.testing.assert_close(traced(x), function(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding", [-1, 0, 3])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_embedding_dense_backward(by_frequency: bool, padding: int, dtype: torch.dtype) -> None:
    """Every occurrence of a token counts, or its mean; padding does not."""
    indices = torch.tensor([[0, 3, 3, 1], [3, 3, 0, 6]], dtype=dtype)
    grad = torch.randn(2, 4, 5, dtype=torch.float64)
    assert_added_in_turn(lambda grad: aten.embedding_dense_backward(grad, indices, 7, padding, by_frequency), grad)


INDICES: dict[str, tuple[Tensor | None, ...]] = {
    "rows": (torch.tensor([2, 0, 2, -1, 2]),),
    "a table of rows": (torch.tensor([[1, 1], [0, -2], [1, 0]]),),
    "an inner axis": (None, torch.tensor([3, 3, 0])),
    "two axes": (torch.tensor([1, 1, 0]), torch.tensor([2, 2, -1])),
    "two axes, broadcast": (torch.tensor([[1], [2]]), torch.tensor([0, 0, 3])),
    "two inner axes": (None, torch.tensor([0, 0, -1]), torch.tensor([1, 1, 4])),
    "two axes apart": (torch.tensor([1, 1]), None, torch.tensor([4, 4])),
    "a number": (torch.tensor(1), None, torch.tensor([0, 0])),
    "all axes": (torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([2, 2])),
}


@pytest.mark.parametrize("broadcast", [False, True], ids=["whole", "broadcast"])
@pytest.mark.parametrize("case", INDICES)
def test_index_put_adds_at_every_occurrence(case: str, broadcast: bool) -> None:
    x, indices = random(3, 4, 5), INDICES[case]
    values = random(seed=2) if broadcast else random(*aten.index(x, indices).shape, seed=2)
    expected = aten.index_put(x, indices, values, True)
    torch.testing.assert_close(index_put(x, indices, values, True), expected, rtol=1e-12, atol=1e-12)


def test_indices_that_are_masks_and_plain_writes_are_left_to_torch() -> None:
    x, mask = random(3, 4), random_mask(3, 4)
    assert index_put(x, (mask,), random(), True) is NotImplemented
    assert index_put(x, (torch.tensor([1]),), random()) is NotImplemented


@pytest.mark.parametrize("alpha", [1, -0.5])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_index_add(dim: int, alpha: float) -> None:
    x, index, source = random(3, 3, 3), torch.tensor([2, 0, 2]), random(3, 3, 3, seed=1)
    assert_added_in_turn(lambda x: aten.index_add(x, dim, index, source, alpha=alpha), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_in_half_precision_are_added_in_float32(dtype: torch.dtype) -> None:
    """And come back in half: a thousand small ones would otherwise stop to count."""
    x, at, ones = torch.zeros(2, 1, dtype=dtype), torch.zeros(4096, 1, dtype=torch.int64), torch.ones(4096, 1).to(dtype)
    traced = make_fx(lambda x: x.scatter_add(0, at, ones), decomposition_table=runtime_decompositions())(x)
    (added,) = (n for n in traced.graph.nodes if n.target is aten.scatter_add.default)
    assert added.meta["val"].dtype == torch.float32
    assert traced(x).tolist() == [[4096], [0]]
    assert traced(x).dtype == dtype


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_none_of_an_empty_axis_is_true(dtype: torch.dtype, keepdim: bool) -> None:
    empty, full = torch.ones(3, 0, dtype=dtype), torch.tensor([[0, 1], [0, 0]]).to(dtype)
    assert any_along(empty, 1, keepdim).flatten().tolist() == [False] * 3
    assert not any_along(empty)
    assert any_along(full, 1) is NotImplemented
    traced = make_fx(lambda x: x.any(-1, keepdim), decomposition_table=runtime_decompositions())(empty)
    assert torch.equal(traced(full), full.any(-1, keepdim))
    assert aten.any.dim not in {node.target for node in traced.graph.nodes}


WITH_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "factor": lambda x: x * 1.702,
    "divisor": lambda x: x / 0.7,
    "number first": lambda x: 0.1 - x,
    "added": lambda x: x + 1e-3,
    "scaled and added": lambda x: torch.add(x, x, alpha=0.044715),
    "power": lambda x: x.abs() ** 0.3,
    "base": lambda x: 0.3**x,
    "blend": lambda x: torch.lerp(x, x * x, 0.3),
    "product added": lambda x: torch.addcmul(x, x, x, value=0.3),
    "finer scalar": lambda x: x * torch.tensor(1.702),
    "integer": lambda x: x * 257,
}


@pytest.mark.parametrize("case", WITH_NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_beside_half_precision_are_not_rounded(dtype: torch.dtype, case: str) -> None:
    """As in PyTorch, in a graph whose numbers a runtime rounds to the type of the tensors."""
    x = random(64).to(dtype)
    traced = make_fx(WITH_NUMBERS[case], decomposition_table=runtime_decompositions())(x)
    for node in traced.graph.nodes:  # what a converter does
        narrow = node.op == "call_function" and node.meta["val"].dtype == dtype
        node.args = tuple(
            float(torch.tensor(a, dtype=dtype)) if narrow and isinstance(a, float) else a for a in node.args
        )
    traced.recompile()
    rounding = {"rtol": 0.6 * torch.finfo(dtype).eps, "atol": 0.0}  # of the result alone
    torch.testing.assert_close(
        traced(x).double(),
        WITH_NUMBERS[case](x.double()),
        **rounding if "blend" not in case else {"rtol": 2e-2, "atol": 1e-2},
    )


def test_numbers_that_half_precision_holds_need_no_float32() -> None:
    x = random(4).to(torch.bfloat16)
    traced = make_fx(lambda x: (x * 0.375 + 96) / -(2**20), decomposition_table=runtime_decompositions())(x)
    assert {node.meta["val"].dtype for node in traced.graph.nodes if node.op != "output"} == {torch.bfloat16}

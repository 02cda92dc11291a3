"""Rules of the operators that move axes about, on shapes at random: few sizes, so that many of them coincide."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.rules.calls import Call, numbers, positions

aten = torch.ops.aten
quick = settings(deadline=None, max_examples=80, derandomize=True)
sizes = st.integers(1, 3)
shapes = st.lists(sizes, min_size=1, max_size=4)


@st.composite
def regroupings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of as many elements: the same factors, multiplied together differently."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=1, max_size=5))

    def grouped() -> list[int]:
        found = [1]
        for factor in factors:
            if draw(st.booleans()):
                found[-1] *= factor
            else:
                found.append(factor)
        return found

    return grouped(), grouped()


@st.composite
def broadcast_to(draw: st.DrawFn, shape: list[int], fewest: int = 0) -> list[int]:
    """A shape that broadcasts to ``shape``: some leading axes left out, some axes of size 1."""
    left = draw(st.integers(0, len(shape) - fewest))
    return [draw(st.sampled_from([1, size])) for size in shape[left:]]


@quick
@given(regroupings())
def test_view_of_any_shape(shapes):
    old, new = shapes
    Call(aten.view.default, numbers(*old), new).check()


@quick
@given(st.permutations(range(4)), st.lists(sizes, min_size=4, max_size=4))
def test_permute_of_any_order(order, sizes):
    Call(aten.permute.default, numbers(*sizes), list(order)).check()


@quick
@given(st.data(), shapes)
def test_elementwise_of_any_shapes(data, shape):
    operands = [numbers(*data.draw(broadcast_to(shape))) for _ in range(3)]
    Call(aten.addcmul.default, *operands).check()


@quick
@given(st.data(), shapes)
def test_expand_of_any_shape(data, shape):
    Call(aten.expand.default, numbers(*data.draw(broadcast_to(shape, fewest=1))), shape).check()


@quick
@given(st.data(), st.lists(sizes, max_size=2), sizes, sizes, sizes)
def test_matmul_of_any_ranks(data, batch, rows, inner, columns):
    """Vectors, matrices and batches of them that broadcast, on either side."""
    left = data.draw(st.sampled_from([[inner], [*data.draw(broadcast_to(batch)), rows, inner]]))
    right = data.draw(st.sampled_from([[inner], [*data.draw(broadcast_to(batch)), inner, columns]]))
    Call(aten.matmul.default, numbers(*left), numbers(*right)).check()


@quick
@given(st.data(), shapes, st.booleans())
def test_reduction_over_any_axes(data, shape, keepdim):
    axes = st.integers(-len(shape), len(shape) - 1)
    dims = data.draw(st.lists(axes, min_size=1, unique_by=lambda axis: axis % len(shape)))
    Call(aten.mean.dim, numbers(*shape), dims, keepdim).check()
    Call(aten.softmax.int, numbers(*shape), dims[0]).check()


@quick
@given(st.data(), sizes, sizes, sizes, sizes, sizes, st.booleans())
def test_attention_with_any_mask(data, batch, heads, queries, keys, width, boolean):
    mask = numbers(*data.draw(broadcast_to([batch, heads, queries, keys], fewest=2)))
    operands = numbers(batch, heads, queries, width), numbers(batch, heads, keys, width), numbers(batch, heads, keys, 2)
    Call(aten.scaled_dot_product_attention.default, *operands, mask > -1 if boolean else mask).check()


@quick
@given(st.data(), shapes)
def test_cutting_and_joining_along_any_axis(data, shape):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    at = data.draw(st.integers(0, shape[axis] - 1))
    x = numbers(*shape)
    Call(aten.slice.Tensor, x, axis, at).check()
    Call(aten.select.int, x, axis, at).check()
    Call(aten.unbind.int, x, axis).check()
    Call(aten.cat.default, [x, x + 1], axis).check()
    Call(aten.stack.default, [x, x + 1], axis).check()
    Call(aten.unsqueeze.default, x, axis).check()


@quick
@given(st.data(), shapes)
def test_gather_and_scatter_along_any_axis(data, shape):
    axis = data.draw(st.integers(0, len(shape) - 1))
    narrow = [data.draw(st.integers(1, size)) for size in shape]
    index, x = positions(*narrow, below=shape[axis]), numbers(*shape)
    Call(aten.gather.default, x, axis, index).check()
    Call(aten.scatter.value, x, axis, index, 7.0).check()
    distinct = torch.arange(narrow[axis]).view([-1 if a == axis else 1 for a in range(len(shape))]).expand(narrow)
    Call(aten.scatter.src, x, axis, distinct.clone(), numbers(*narrow) + 1).check()

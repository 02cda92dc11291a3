"""Which axes a reshape keeps, merges and splits: tried out on positions of elements, and on symbolic sizes."""

from __future__ import annotations

from math import prod

import pytest
import sympy
import torch
from hypothesis import given, settings

from tests.passes.rules.calls import Call, numbers
from tests.passes.rules.test_any_shape import regroupings
from tokgraph.passes.rules import Group
from tokgraph.passes.rules.shape import reshape_groups

B, S, H = sympy.symbols("B S H", integer=True, positive=True)
aten = torch.ops.aten


def groups(old, new) -> list[tuple[list[int], list[int]]]:
    return [(list(group.inputs), list(group.outputs)) for group in reshape_groups(old, new)]


def positions(sizes: list[int], axes: range) -> torch.Tensor:
    """The row-major position, along neighbouring axes, of every element of a contiguous tensor."""
    return torch.arange(prod(sizes)) // prod(sizes[axes.stop :]) % prod(sizes[axes.start : axes.stop])


def runs(count: int) -> list[range]:
    return [range(start, stop) for start in range(count) for stop in range(start + 1, count + 1)]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(regroupings())
def test_groups_are_the_axes_that_hold_the_same_elements(shapes):
    """All of them, and no others, but for axes that hold one element: these are anywhere."""
    old, new = shapes
    found = reshape_groups(old, new)
    for group in found:
        assert torch.equal(positions(old, group.inputs), positions(new, group.outputs))
        assert 1 in (len(group.inputs), len(group.outputs))
    for inputs in runs(len(old)):
        for outputs in runs(len(new)):
            single = 1 in (len(inputs), len(outputs)) and prod(old[inputs.start : inputs.stop]) > 1
            if single and torch.equal(positions(old, inputs), positions(new, outputs)):
                assert Group(inputs, outputs) in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((B, S, H), (B * S, H), [([0, 1], [0]), ([2], [1])]),
        ((S * B, H), (B, S, H), [([0], [0, 1]), ([1], [2])]),
        ((B, S, 4 * H), (B, S, 4, H), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ((B, S, 4, H), (B * S * 4, H), [([0, 1, 2], [0]), ([3], [1])]),
        ((B, S + 1, 4), (B * S + B, 4), [([0, 1], [0]), ([2], [1])]),
        ((S, H), (H, S), []),
        ((4, 4, 4), (16, 4), [([0, 1], [0]), ([2], [1])]),
        ((16, 4), (4, 4, 4), [([0], [0, 1]), ([1], [2])]),
        ((2, 6), (4, 3), []),
        ((1, S), (S,), [([0, 1], [0]), ([1], [0])]),
        ((S, 1, H), (S, H), [([0], [0]), ([0, 1], [0]), ([1, 2], [1]), ([2], [1])]),
        ((S, H), (S, 1, H), [([0], [0]), ([0], [0, 1]), ([1], [1, 2]), ([1], [2])]),
        ((1, 1), (1,), [([0], [0]), ([0, 1], [0]), ([1], [0])]),
        ((), (1,), []),
        ((B, 0, H), (B, 0), [([0], [0]), ([1], [1]), ([1, 2], [1])]),
        ((0, 3, 4), (0, 4, 3), [([0], [0]), ([0, 1], [0]), ([0, 1, 2], [0]), ([0], [0, 1]), ([0], [0, 1, 2]), ([1], [2]), ([2], [1])]),
    ],
)  # fmt: skip
def test_groups_of(old, new, expected):
    assert groups(old, new) == expected


def test_the_rule_carries_the_groups():
    described = Call(aten.flatten.using_ints, numbers(3, 4, 4), 0, 1).rule
    assert [(len(g.inputs), len(g.outputs)) for g in described.groups] == [(2, 1), (1, 1)]
    assert Call(aten.transpose.int, numbers(3, 4), 0, 1).rule.groups == ()

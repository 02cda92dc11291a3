"""Graphs of one call, and three ways to try out what a rule says of it on numbers.

*Commutes*: selecting rows of the followed input axes before the call gives what selecting rows of the output axis after
it does. *Local*: changing one row of a followed axis changes that row of the output only. *Complete*: an input axis is
followed or declared as mixed, never passed over.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tokgraph.passes.rules import AxisMap, axis_map, traits

READINGS = ("sizes", "commutes", "local", "complete")


@dataclass(frozen=True, eq=False)
class Weight:
    """An argument that is a parameter: it holds no rows."""

    value: Tensor


class Call:
    """A graph of one call, with values for its inputs."""

    def __init__(self, op: Any, *args: Any, **kwargs: Any) -> None:
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        args, kwargs = pytree.tree_map(self._input, (args, kwargs))
        if op is operator.getitem:  # its first argument is a call with several results
            args = (self._input(self._tuple(args[0])), *args[1:])
        self.node = self.graph.call_function(op, args, kwargs)
        result = self.run()
        self.node.meta["val"] = result[0] if len(result) == 1 else result

    def _input(self, x: Any) -> Any:
        if not isinstance(x, (Tensor, Weight, tuple)) or x == ():
            return x
        number = len(self.values)
        if isinstance(x, Weight):
            node = self.graph.create_node("get_attr", f"weight{number}")
            x = x.value
        else:
            node = self.graph.placeholder(f"x{number}")
        node.meta["val"], self.values[node] = x, x
        return node

    def _tuple(self, nodes: Any) -> tuple[Tensor, ...]:
        return tuple(self.values.pop(node) for node in nodes)

    def run(self, changed: dict[fx.Node, Any] | None = None, sizes: dict[int, int] | None = None) -> list[Tensor]:
        """The results, with other inputs, and other sizes for some output axes of an operator that is told sizes."""
        values = {**self.values, **(changed or {})}
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), values.__getitem__)
        if sizes and traits(self.node.target).sized:
            args = (args[0], [sizes.get(axis, size) if size != -1 else -1 for axis, size in enumerate(args[1])])
        result = self.node.target(*args, **kwargs)
        return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]

    @property
    def rule(self) -> AxisMap:
        found = axis_map(self.node)
        assert found is not None
        return found

    def followed(self) -> Iterator[tuple[int, int, list[tuple[fx.Node, int]]]]:
        """``(output axis, its size, input axes it follows)``."""
        out = self.run()[0]
        assert len(self.rule.rows) == out.dim()
        for axis, follows in enumerate(self.rule.rows):
            if follows:
                yield axis, out.shape[axis], list(follows)

    def check(self) -> None:
        for reading in READINGS:
            getattr(self, f"check_{reading}")()

    def check_sizes(self) -> None:
        """Axes that are said to hold the same rows have the same size; axes that are mixed exist."""
        for axis, size, follows in self.followed():
            assert [shape(self.values[x])[j] for x, j in follows] == [size] * len(follows), f"output axis {axis}"
        for axis, (x, j) in self.rule.aligned:
            assert shape(self.values[x])[j] == self.run()[0].shape[axis]
        for mix in self.rule.mixes:
            assert all(0 <= j < len(shape(self.values[x])) for x, j in mix.axes)

    def check_commutes(self) -> None:
        before = self.run()
        for axis, size, follows in self.followed():
            if size == 1:
                continue  # nothing to narrow
            index = torch.tensor([size - 1, 0])
            changed = dict(self.values)
            for x, j in follows:
                changed[x] = every(changed[x], lambda t, j=j, index=index: t.index_select(j, index))
            assert_same(
                self.run(changed, {axis: len(index)}),
                [t.index_select(axis, index) for t in of_rank(before, before[0].dim())],
                f"rows of output axis {axis}",
            )

    def check_local(self) -> None:
        before = self.run()
        for axis, size, follows in self.followed():
            others = torch.tensor([i for i in range(size) if i != size - 1], dtype=torch.int64)
            for x, j in follows:
                after = self.run({x: every(self.values[x], lambda t, j=j: with_other_row(t, j, t.shape[j] - 1))})
                assert_same(
                    [t.index_select(axis, others) for t in of_rank(after, before[0].dim())],
                    [t.index_select(axis, others) for t in of_rank(before, before[0].dim())],
                    f"output axis {axis} against axis {j} of {x}",
                )

    def check_complete(self) -> None:
        if self.node.target is operator.getitem or str(self.node.target).startswith("tokgraph."):
            return  # described with the call before it; ours are put in after the graph was found legal
        followed = {source for rows in self.rule.rows for source in rows or ()}
        mixed = {source for mix in self.rule.mixes for source in mix.axes} | {x for _, x in self.rule.aligned}
        for x, value in self.values.items():
            if x.op == "placeholder":
                left = [j for j, size in enumerate(shape(value)) if size > 1 and (x, j) not in followed | mixed]
                assert not left, f"axes {left} of {x} are neither followed nor mixed"


def shape(value: Any) -> tuple[int, ...]:
    return tuple((value[0] if isinstance(value, tuple) else value).shape)


def every(value: Any, change: Any) -> Any:
    return tuple(change(t) for t in value) if isinstance(value, tuple) else change(value)


def of_rank(tensors: list[Tensor], rank: int) -> list[Tensor]:
    """Results of another rank than the first are not described."""
    return [t for t in tensors if t.dim() == rank]


def with_other_row(x: Tensor, axis: int, row: int) -> Tensor:
    """``x`` with one row changed, to values that are legal where they stand (indices stay in range)."""
    if not x.numel():
        return x
    real = x.is_floating_point() or x.is_complex()
    other = 1.5 - x / 2 if real else ~x if x.dtype is torch.bool else x.max() + x.min() - x
    at = torch.arange(x.shape[axis]) == row
    return torch.where(at.view([-1 if a == axis else 1 for a in range(x.dim())]), other, x)


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    actual = of_rank(actual, expected[0].dim())
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, f"{what}: {tuple(a.shape)} != {tuple(e.shape)}"
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda m: f"{what}: {m}")


def numbers(*sizes: int) -> Tensor:
    """Distinct numbers in (0, 1), which every function takes."""
    count = int(torch.tensor(sizes).prod()) if sizes else 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return ((order + 0.5) / count).double().view(sizes)


def positions(*sizes: int, below: int) -> Tensor:
    return torch.randint(below, sizes, generator=torch.Generator().manual_seed(1))


def weight(*sizes: int) -> Weight:
    return Weight(numbers(*sizes))


def flags(*sizes: int) -> Tensor:
    return positions(*sizes, below=2).bool()

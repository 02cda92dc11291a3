"""Small graphs built by hand, and random ones: rows go through row-wise operators, attention, selections and restores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tokgraph.ir.node import call

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


class Program:
    """A graph, written call by call; every node has its value, as after capture."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.inputs: list[Tensor] = []

    def input(self, name: str, x: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(x)
        self.inputs.append(x)
        return node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = call(self.graph, target, *args, origin=next(iter(self.graph.nodes)), made_by="test", **kwargs)
        del node.meta["made_by"]
        return node

    def select(self, x: fx.Node, index: fx.Node, dim: int = 1) -> fx.Node:
        return self(tokgraph.select.default, x, index, dim, 0)

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule({}, self.graph)


def rows(*chosen: list[int]) -> Tensor:
    """``[batch, rows]`` index."""
    return torch.tensor(chosen)


class _Random:
    """Draws programs; every value is ``[batch, rows, hidden]``, its rows told by the chain of indices that chose them."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.program = Program()
        generator = torch.Generator().manual_seed(0)
        self.batch = draw(st.sampled_from([1, 2, 3]))
        self.tokens = draw(st.sampled_from([4, 5]))  # 4 is the hidden size as well
        self.hidden = 4

        def random(*shape: int) -> Tensor:
            return torch.rand(*shape, dtype=torch.float64, generator=generator) - 0.5

        shape = (self.batch, self.tokens, self.hidden)
        p = self.program
        self.values: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [
            (p.input("x", random(*shape)), ()),
            (p.input("y", random(*shape)), ()),
        ]
        self.weight = p.input("weight", random(self.hidden, self.hidden))
        self.shared = [p.input("bias", random(self.tokens, self.hidden)), p.input("one", random(1, *shape[1:]))]
        self.mask = p.input("mask", random(self.tokens, self.tokens))
        self.indices: dict[tuple[fx.Node, ...], list[fx.Node]] = {}
        self._index(())
        self._index(())
        self._index((self.indices[()][0],))

    def _size(self, space: tuple[fx.Node, ...]) -> int:
        return space[-1].meta["val"].shape[1] if space else self.tokens

    def _index(self, space: tuple[fx.Node, ...]) -> None:
        size = self._size(space)
        width = self.draw(st.integers(1, size))
        chosen = [
            sorted(self.draw(st.sets(st.integers(0, size - 1), min_size=width, max_size=width)))
            for _ in range(self.batch)
        ]
        node = self.program.input(f"index{len(self.program.inputs)}", torch.tensor(chosen))
        self.indices.setdefault(space, []).append(node)

    def pick(self, space: tuple[fx.Node, ...] | None = None) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        return self.draw(st.sampled_from([v for v in self.values if space is None or v[1] == space]))

    def step(self) -> None:
        p = self.program
        (x, space), kind = self.pick(), self.draw(st.sampled_from(KINDS))
        if kind == "select":
            if space not in self.indices:
                return
            index = self.draw(st.sampled_from(self.indices[space]))
            self.values.append((p.select(x, index), (*space, index)))
            return
        if kind == "restore":
            if not space:
                return
            around, _ = self.pick(space[:-1])
            self.values.append((p(tokgraph.restore.default, around, x, space[-1]), space[:-1]))
            return
        self.values.append((self._compute(kind, x, space), space))

    def _compute(self, kind: str, x: fx.Node, space: tuple[fx.Node, ...]) -> fx.Node:
        p, size = self.program, self._size(space)
        if kind == "add":
            return p(aten.add.Tensor, x, self.pick(space)[0])
        if kind == "norm":
            return p(aten.layer_norm.default, x, [self.hidden])
        if kind == "linear":
            return p(aten.linear.default, x, self.weight)
        if kind == "cumsum":
            return p(aten.cumsum.default, x, 1)
        if kind == "heads":
            split = p(aten.reshape.default, x, [self.batch, size, 2, self.hidden // 2])
            moved = p(aten.transpose.int, p(aten.transpose.int, split, 1, 2), 1, 2)
            return p(aten.reshape.default, moved, [self.batch, size, self.hidden])
        if kind == "shared" and not space:
            return p(aten.mul.Tensor, x, self.draw(st.sampled_from(self.shared)))
        if kind in ("attention", "sdpa"):
            return self._attend(kind, x, space)
        return p(aten.relu.default, x)

    def _attend(self, kind: str, x: fx.Node, space: tuple[fx.Node, ...]) -> fx.Node:
        p = self.program
        source = self.pick(space)[0]
        if kind == "sdpa":
            q, k = (p(aten.unsqueeze.default, y, 1) for y in (x, source))
            mask = None if space else self.mask
            return p(aten.squeeze.dim, p(aten.scaled_dot_product_attention.default, q, k, k, mask), 1)
        scores = p(aten.matmul.default, x, p(aten.transpose.int, source, 1, 2))
        scores = scores if space else p(aten.add.Tensor, scores, self.mask)
        return p(aten.matmul.default, p(aten.softmax.int, scores, -1), source)


@dataclass(frozen=True, repr=False)
class Drawn:
    """A drawn program, shown as code when it fails."""

    module: fx.GraphModule
    inputs: list[Tensor]

    def __repr__(self) -> str:
        indices = {
            n.target: x.tolist()
            for n, x in zip(self.module.graph.nodes, self.inputs, strict=False)
            if x.dtype == torch.int64
        }
        return f"{self.module.code}\nx: {list(self.inputs[0].shape)}, {indices}"


KINDS = "select select select restore restore relu add norm linear cumsum heads shared attention sdpa".split()


@st.composite
def programs(draw: Any, steps: int = 14) -> Drawn:
    """A program with up to four outputs."""
    random = _Random(draw)
    for _ in range(draw(st.integers(3, steps))):
        random.step()
    made = [node for node, _ in random.values[2:]] or [random.values[0][0]]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3))
    return Drawn(random.program.module(made[-1], *outputs), random.program.inputs)

"""What drops move in memory: no more than a loop written by hand, whatever the depth."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokgraph as tg
from tests.passes.tools import TASKS, captured, site
from tokgraph.passes.cost.moves import row_moves

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[3]


_ADDED = (aten.scatter_add_.default, aten.scatter_add.default, aten.index_add_.default, aten.index_add.default)


class Moves(TorchDispatchMode):
    """Counts calls that move rows in the forward pass, and the bytes that all such calls read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        float_out = isinstance(out, Tensor) and out.is_floating_point()
        if float_out and func in (aten.gather.default, aten.index_select.default):
            self._count(2 * size(out))
        elif float_out and func in (aten.scatter.src, aten.index_copy.default):
            self._count(2 * size(out) + 2 * size(args[3]))
        elif float_out and func in (aten.scatter.value, aten.index_fill.int_Scalar):
            rows = args[2].shape[1] if args[2].dim() > 1 else args[2].numel()
            self._count(2 * size(out) + size(out) // out.shape[1] * rows)
        elif func in _ADDED:
            self._count(2 * size(args[3]))
        elif func in (aten.new_zeros.default, aten.zeros.default) and self.backward and out.dim() > 2:
            self._count(size(out))
        return out

    def _count(self, number: int) -> None:
        self.bytes += number
        self.calls += not self.backward


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def module(path: Path) -> Iterator[ModuleType]:
    """A file outside of any package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made  # dataclasses look their module up
    try:
        spec.loader.exec_module(made)
        yield made
    finally:
        del sys.modules[path.stem]


def by_hand(spec: tg.ModelSpec, task: str, start: int, stop: int, count: int) -> Moves:
    """The loop of the benchmarks on storage-free tensors."""
    with module(ROOT / "benchmarks" / "hand_loop.py") as loop:
        span = loop.Span(start, stop, loop.uniform(0.5, count, task == "generation"))
        model = spec.model.to("meta")
        batch = {name: x.to("meta") for name, x in spec.tasks[task].inputs.items()}
        with Moves() as moves:
            loss = loop.LOSSES[task](model, [span], **batch)
            moves.backward = True
            loss.backward()
    return moves


@pytest.mark.parametrize(
    ("task", "layers"),
    [pytest.param(*x, marks=pytest.mark.slow) for x in zip(TASKS, (4, 12), strict=True)],
)
def test_a_span_of_janus_moves_what_a_loop_by_hand_moves(task: str, layers: int) -> None:
    options = {"size": "tiny"} if layers == 4 else {"size": "1b"}
    spec = tg.load(str(ROOT / "examples" / "janus.py"), layers=layers, padded=False, **options)
    spec = tg.ModelSpec(spec.model, {task: spec.tasks[task]})
    facts = tg.analyze(tg.capture(spec))
    assert len(facts[task].blocks) == layers
    plan = tg.Plan((tg.DropSite(task, 1, layers - 1, 0.5, "uniform"),))
    moves = row_moves(tg.apply(facts, plan).program[task])
    hand = by_hand(spec, task, 1, layers - 1, facts[task].visual.count)
    assert hand.calls == 4  # the stream, its rotary embeddings (two), and back
    assert len(moves) <= 1.1 * hand.calls
    assert sum(m.forward + m.backward for m in moves) <= 1.1 * hand.bytes
    assert sum(m.forward + m.backward for m in moves) >= 0.9 * hand.bytes


@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_the_number_of_moves_does_not_grow_with_the_span(task: str) -> None:
    short, long = (captured(task, layers=n).rewritten(site(1, n - 1)) for n in (3, 6))
    assert [(m.operator, m.forward, m.backward) for m in row_moves(short)] == [
        (m.operator, m.forward, m.backward) for m in row_moves(long)
    ]


@pytest.mark.slow
def test_digits_moves_the_stream_in_and_out() -> None:
    """And its rotary embeddings; its mask is told to the kernel."""
    spec = tg.load(str(ROOT / "examples" / "digits.py"))
    facts = tg.analyze(tg.capture(spec))
    for task in spec.tasks:
        blocks = len(facts[task].blocks)
        plan = tg.Plan((tg.DropSite(task, 1, blocks - 1, 0.5, "uniform"),))
        moves = row_moves(tg.apply(facts, plan).program[task])
        assert [m.operator for m in moves] == ["select", "select", "drop", "restore"]


def test_bytes_of_both_passes() -> None:
    """Rows are read and written; a gradient is cleared, copied or filled as the operators' backwards do."""
    graph = captured("generation", layers=3).rewritten(site(1, 2))
    nodes = {n.name: n for n in graph.graph.nodes}
    for move in row_moves(graph):
        out = size(nodes[move.node].meta["val"])
        if move.operator == "restore":
            rows = size(nodes[move.node].args[1].meta["val"])
            assert (move.forward, move.backward) == (2 * out + 2 * rows, 2 * out + 3 * rows)
        else:
            whole = size(nodes[move.node].args[0].meta["val"])
            assert (move.forward, move.backward) == (2 * out, whole + 2 * out)


@pytest.mark.slow
def test_nothing_flows_back_to_what_is_not_trained() -> None:
    spec = tg.load(str(ROOT / "examples" / "janus.py"), size="tiny")
    facts = tg.analyze(tg.capture(tg.ModelSpec(spec.model, {"understanding": spec.tasks["understanding"]})))
    graph = tg.apply(facts, tg.make_plan(facts, "shared")).program["understanding"]
    shapes = {n.name: n.args[0].meta["val"] for n in graph.graph.nodes if n.target is torch.ops.tokgraph.select.default}
    masks = [m for m in row_moves(graph) if m.node in shapes and shapes[m.node].dtype is torch.bool]
    assert masks
    assert all(m.backward == 0 for m in masks)

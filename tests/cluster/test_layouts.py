"""Layouts of a workload that is written down: formulas of the papers, and what must hold of any numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

import tokgraph as tg
from tokgraph.cluster.layouts import Laid, Layouts, balanced
from tokgraph.cluster.links import all_reduce, gather, ring_rate
from tokgraph.cluster.workload import Held, TaskWork, Workload
from tokgraph.passes.lower.part_costs import PartCost

GB = 1e9
BLOCKS, SIZE = 6, 1_000_000
CLUSTER = tg.Cluster(gpus=64, memory=80 * GB, flops=1e15, bandwidth=1e30)  # an update takes no time


def part(title: str, forward: float = 1.0, **more: int) -> PartCost:
    empty = PartCost.nothing(title)
    amounts = {"kept": 1000, "kept_again": 100, "forward_peak": 1200, "backward_peak": 1500, **more}
    return replace(empty, forward=forward, backward=2 * forward, gradients=2 * SIZE, **amounts)


def work(scale: float = 1.0, **more: int) -> Workload:
    """A model of 16-bit parameters: blocks of a million, and as many before and after them."""
    titles = ["before the blocks", *(f"block {i}" for i in range(BLOCKS)), "after the blocks"]
    parts = tuple(part(title, scale, **more) for title in titles)
    held = tuple(Held(2 * SIZE, SIZE, True, frozenset({i})) for i in range(BLOCKS + 2))
    return Workload({"task": TaskWork(1.0, 1000, 0, parts)}, held)


def laid(name: str, again: bool = False, of: Workload | None = None, **cluster: float) -> Laid:
    found = Layouts(of or work(), replace(CLUSTER, **cluster), again)  # type: ignore[arg-type]
    return {x.name: x for x in found.all()}[name]


def test_rings() -> None:
    """Inside of a machine the link; between machines as many ports as GPUs, no faster than the link."""
    assert ring_rate(CLUSTER, 8) == 450 * GB
    assert ring_rate(CLUSTER, 64) == 400 * GB
    assert ring_rate(replace(CLUSTER, network=100 * GB), 64) == 450 * GB
    assert gather(8 * GB, 8, GB) == pytest.approx(7.0)
    assert all_reduce(8 * GB, 8, GB) == pytest.approx(14.0)
    assert all_reduce(8 * GB, 1, GB) == 0


def test_states_are_those_of_zero() -> None:
    """16 bytes for each parameter of 16 bits (ZeRO, section 3.1), by shards in ZeRO-3, but for what is gathered."""
    elements = (BLOCKS + 2) * SIZE
    copies = laid("ddp").memory
    assert copies.parameters + copies.gradients + copies.optimizer == 16 * elements
    shards = laid("fsdp").memory
    assert shards.optimizer == 12 * elements / 64
    around, at_work, next_one = 4 * SIZE, 2 * SIZE, 2 * SIZE
    assert shards.parameters == pytest.approx(2 * elements / 64 + around + at_work + next_one)
    assert Held(4, 1, True, frozenset({1})).states == 8
    assert Held(4, 1, False, frozenset({1})).states == Held(4, 1, False, frozenset({1})).gradient == 0


@pytest.mark.parametrize("again", [False, True])
def test_more_gpus_are_never_more_memory(again: bool) -> None:
    totals = [laid("fsdp", again, gpus=n).memory.total for n in (2, 4, 8, 16, 64, 512)]
    assert all(b < a for a, b in pairwise(totals))
    assert totals[0] < laid("ddp", again).memory.total
    assert laid("fsdp", again).memory.total < laid("hsdp", again).memory.total
    stages = [laid("pipeline", again, stages=p).memory.total for p in (2, 4, 8)]
    assert all(b < a for a, b in pairwise(stages))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", "pipeline"])
def test_what_is_computed_again(name: str) -> None:
    """Less memory, the blocks' forward pass once more."""
    plain, again = laid(name, stages=2), laid(name, True, stages=2)
    assert again.memory.total < plain.memory.total
    assert again.compute > plain.compute
    if name != "pipeline":  # where the cut moves
        assert again.compute - plain.compute == pytest.approx(BLOCKS)


def test_what_is_hidden() -> None:
    """DDP hides an all-reduce behind the backward pass of the last micro-batch; FSDP gathers for each."""
    slow = {"link": 1e6, "network": 1e6 / 8, "micro_batches": 3}
    ddp, fsdp = laid("ddp", **slow), laid("fsdp", **slow)
    size = 2 * (BLOCKS + 2) * SIZE
    assert ddp.communication == pytest.approx(2 * 63 / 64 * size / 1e6)
    assert ddp.step == pytest.approx(2 * 24 + 8 + max(16, ddp.communication))
    sent = 63 / 64 * (size + 2 * BLOCKS * SIZE + size) / 1e6
    assert fsdp.communication == pytest.approx(3 * sent)
    for found in (ddp, fsdp):
        assert found.serial == pytest.approx(found.compute + found.communication)
        assert found.compute <= found.step <= found.serial
    fast = laid("fsdp", link=1e30, network=1e30)
    assert fast.step == pytest.approx(fast.compute)


def test_one_gpu_sends_nothing() -> None:
    (only,) = Layouts(work(), replace(CLUSTER, gpus=1), False).all()
    assert (only.name, only.communication) == ("ddp", 0)
    assert only.step == pytest.approx(only.compute) == pytest.approx(24)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (4, 1), (4, 4), (8, 2)])
def test_the_bubble(stages: int, micro_batches: int) -> None:
    """1F1B: ``(p - 1) / m`` of the time without it (Megatron, section 2.2.1)."""
    found = laid("pipeline", stages=stages, micro_batches=micro_batches, link=1e30, network=1e30)
    m = micro_batches * stages
    ideal = found.compute
    assert ideal == pytest.approx(m * 24 / stages)
    assert (found.step - ideal) / ideal == pytest.approx((stages - 1) / m)
    assert found.bubble == pytest.approx((stages - 1) / (m + stages - 1))


def test_stages_keep_micro_batches() -> None:
    """The first keeps as many as there are stages."""
    found = laid("pipeline", stages=4, of=work(kept=10**9, backward_peak=10**9))
    assert found.memory.activations == pytest.approx(4 * 2 * 10**9)
    few = laid("pipeline", stages=8, of=work(kept=10**9, backward_peak=10**9))
    assert few.memory.activations == pytest.approx(8 * 10**9)


def test_the_fewest_stages_that_fit() -> None:
    model = 16 * (BLOCKS + 2) * SIZE
    assert laid("pipeline").shape == {"copies": 32, "stages": 2}
    assert laid("pipeline", memory=model / 3).shape == {"copies": 16, "stages": 4}
    assert laid("pipeline", memory=1000).shape == {"copies": 8, "stages": 8}
    names = [x.name for x in Layouts(work(), replace(CLUSTER, stages=64), False).all()]
    assert names == ["ddp", "fsdp", "hsdp"], "there are fewer parts than stages"


@pytest.mark.parametrize("seconds", [[3, 1, 1, 1, 1, 5], [1] * 7, [9, 1, 1], [0.0, 0.0, 2.0, 1.0]])
def test_stages_are_balanced(seconds: list[float]) -> None:
    for stages in range(1, len(seconds) + 1):
        found = balanced(seconds, stages)
        assert [i for parts in found for i in parts] == list(range(len(seconds)))
        assert len(found) == stages
        assert min(map(len, found)) >= 1
        cuts = [(0, *cut, len(seconds)) for cut in combinations(range(1, len(seconds)), stages - 1)]
        best = min(max(sum(seconds[a:b]) for a, b in pairwise(cut)) for cut in cuts)
        assert max(sum(seconds[i] for i in parts) for parts in found) == pytest.approx(best)
    with pytest.raises(ValueError, match="are no 9 stages"):
        balanced(seconds, 9)


def test_tied_and_frozen_tensors() -> None:
    """What several parts read is gathered around the blocks; what no task reads stays whole; what is frozen has no states."""
    base = work()
    tied = Held(2 * SIZE, SIZE, True, frozenset({2, 4}))
    unread = Held(500, 250, False, frozenset())
    frozen = Held(2 * SIZE, SIZE, False, frozenset({3}))
    more = replace(base, held=(*base.held, tied, unread, frozen))
    a, b = (laid("fsdp", of=x).memory for x in (base, more))
    block_at_work_and_next = 2 * 2 * SIZE
    assert b.parameters - a.parameters == pytest.approx(2 * (2 * SIZE) / 64 + 2 * SIZE + 500 + block_at_work_and_next)
    assert b.optimizer - a.optimizer == pytest.approx(12 * SIZE / 64)

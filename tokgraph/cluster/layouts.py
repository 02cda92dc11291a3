"""Ways to lay a training step out over GPUs: what each has in memory, and how long the step takes.

Each step trains on ``gpus * micro_batches`` micro-batches, however it is laid out. Two times are told: with all communication
that can be beside computation hidden in it, and with none hidden.

Sources: ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054) for states in shards and what they send; 1F1B (Narayanan et al.,
2021, arXiv 2104.04473, section 2.2) for pipelines; PyTorch's FSDP2 for what is gathered when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import inf

from tokgraph.ir.cluster import Cluster

from .links import all_reduce, gather, ring_rate
from .memory import Beside, Memory, most
from .workload import Held, Workload


@dataclass(frozen=True)
class Laid:
    """A step, laid out.

    Args:
        name: of the layout.
        shape: how many copies, shards and stages there are.
        memory: of the GPU that has most in use.
        compute: seconds that the busiest GPU computes, blocks that are computed again among them.
        communication: seconds that it communicates.
        optimizer: seconds of the optimizer's update, by the bytes that it moves.
        step: seconds of a step, communication hidden where it can be.
        serial: seconds of a step with nothing hidden.
        bubble: share of the step that a pipeline idles.
    """

    name: str
    shape: dict[str, int]
    memory: Memory
    compute: float
    communication: float
    optimizer: float
    step: float
    serial: float
    bubble: float = 0.0


def _sum(held: Sequence[Held], what: str) -> float:
    return float(sum(getattr(x, what) for x in held))


@dataclass(frozen=True)
class Layouts:
    """The layouts of a workload on a cluster.

    Args:
        work: what is trained.
        cluster: the GPUs.
        again: blocks are computed again in the backward pass.
    """

    work: Workload
    cluster: Cluster
    again: bool

    def all(self) -> Iterator[Laid]:
        """Those that the cluster has GPUs for."""
        yield self.copies()
        if self.cluster.gpus > 1:
            yield self.shards("fsdp", self.cluster.gpus)
        if self.cluster.gpus > self.cluster.machine > 1:
            yield self.shards("hsdp", self.cluster.machine)
        stages = self._possible_stages()
        if stages:
            yield self._best_pipeline(stages)

    # -------------------------------------------------------------- time of a micro-batch

    def _seconds(self, parts: Sequence[int]) -> tuple[float, float]:
        """Forward and backward of the mean micro-batch, with what is computed again."""
        forward = self.work.mean(lambda p: p.forward, parts)
        backward = self.work.mean(lambda p: p.backward, parts)
        if self.again:
            backward += self.work.mean(lambda p: p.forward if p.is_block else 0.0, parts)
        return forward, backward

    def _update(self, held: Sequence[Held], shards: int = 1) -> float:
        """The optimizer reads gradients, and reads and writes parameters and states."""
        moved = sum(x.gradient + 2 * (x.gradient + x.states) for x in held)
        return moved / shards / self.cluster.bandwidth

    # -------------------------------------------------------------- layouts

    @cached_property
    def _read(self) -> list[Held]:
        return self.work.read()

    def copies(self) -> Laid:
        """Every GPU has the whole model, and gradients are averaged (DDP); on one GPU, the plain step."""
        n, m = self.cluster.gpus, self.cluster.micro_batches
        gradients = _sum(self._read, "gradient")
        whole = n > 1 or m > 1  # gradients lie in buckets of their own, or those of the micro-batch before are there
        beside = Beside(
            parameters=lambda part: _sum(self.work.held, "bytes"),
            gradients=lambda part, later: gradients if whole else later,
            optimizer=_sum(self._read, "states"),
            parts=self.work.parts,
        )
        forward, backward = self._seconds(self.work.parts)
        update, sending = self._update(self._read), all_reduce(gradients, n, ring_rate(self.cluster, n))
        compute = m * (forward + backward)
        step = (m - 1) * (forward + backward) + forward + max(backward, sending) + update
        memory = most(self.work, beside, self.again)
        return Laid("ddp", {"copies": n}, memory, compute, sending, update, step, compute + sending + update)

    def shards(self, name: str, shards: int) -> Laid:
        """Parameters, gradients and states lie in shards (FSDP2, ZeRO-3), in as many copies as there are GPUs for (HSDP)."""
        m, copies, rate = self.cluster.micro_batches, self.cluster.gpus // shards, ring_rate(self.cluster, shards)
        blocks = [x for i in self.work.blocks for x in self.work.of_block(i)]
        gathered, in_blocks = _sum(self._read, "bytes"), _sum(blocks, "bytes")
        gradients = _sum(self._read, "gradient")
        sending_forward = gather(gathered, shards, rate)
        sending_backward = gather(in_blocks + gradients, shards, rate)
        sending_backward += all_reduce(gradients / shards, copies, self.cluster.network)
        forward, backward = self._seconds(self.work.parts)
        update = self._update(self._read, shards)
        memory = most(self.work, self._sharded(shards), self.again)
        compute, sending = m * (forward + backward), m * (sending_forward + sending_backward)
        step = m * (max(forward, sending_forward) + max(backward, sending_backward)) + update
        shape = {"copies": copies, "shards": shards}
        return Laid(name, shape, memory, compute, sending, update, step, compute + sending + update)

    def _sharded(self, shards: int) -> Beside:
        """Shards of everything; what is around the blocks stays gathered, and so do a block and the next one to come."""
        around, read = self.work.around(), self._read
        of_block = {i: self.work.of_block(i) for i in self.work.parts}
        always = _sum(read, "bytes") / shards + _sum(around, "bytes") + self.work.unread_bytes()
        largest = max((_sum(x, "bytes") for x in of_block.values()), default=0.0)
        reduced = max((_sum(x, "gradient") for x in of_block.values()), default=0.0)
        waiting, done = _sum(around, "gradient"), _sum(read, "gradient") / shards

        def gradients(part: int, later: float) -> float:
            """All shards; what is around the blocks, unreduced until the end; a block whose reduction is under way."""
            return done + (min(later, waiting) + min(max(0.0, later - waiting), reduced) if later else 0.0)

        return Beside(
            parameters=lambda part: always + _sum(of_block[part], "bytes") + largest,
            gradients=gradients,
            optimizer=_sum(read, "states") / shards,
            parts=self.work.parts,
        )

    # -------------------------------------------------------------- pipelines

    def _possible_stages(self) -> list[int]:
        if self.cluster.stages is not None:
            return [self.cluster.stages] if self.cluster.stages <= len(self.work.parts) else []
        return [p for p in range(2, len(self.work.parts) + 1) if self.cluster.gpus % p == 0]

    def _best_pipeline(self, stages: Sequence[int]) -> Laid:
        """The one of the fewest stages that fits, or else that of least memory."""
        found = []
        for p in stages:
            found.append(self.pipeline(p))
            if found[-1].memory.total <= self.cluster.memory - self.cluster.reserve:
                return found[-1]
        return min(found, key=lambda laid: laid.memory.total)

    def pipeline(self, stages: int) -> Laid:
        """Parts one after the other in stages, micro-batches one after the other through them: 1F1B.

        ``m`` micro-batches take ``(m + stages - 1)`` times the slowest stage: a share of ``(stages - 1) / (m + stages - 1)``
        idles. Stage ``s`` keeps ``min(m, stages - s)`` micro-batches at once.
        """
        copies, m = self.cluster.gpus // stages, self.cluster.micro_batches * stages
        cut = balanced([sum(self._seconds([i])) for i in self.work.parts], stages)
        held = [[x for x in self._read if not x.parts.isdisjoint(parts)] for parts in cut]
        slot = max(sum(self._seconds(parts)) for parts in cut)
        rate = self.cluster.link if self.cluster.gpus <= self.cluster.machine else self.cluster.network
        sent = max(self.work.mean(lambda p: p.sent + p.sent_back, parts[-1:]) for parts in cut[:-1]) / rate
        averaged = max(_sum(x, "gradient") for x in held)
        reduced = all_reduce(averaged, copies, ring_rate(self.cluster, copies))
        update = max(map(self._update, held))
        memories = [
            self._stage(parts, mine, min(m, stages - s)) for s, (parts, mine) in enumerate(zip(cut, held, strict=True))
        ]
        step = (m + stages - 1) * slot + reduced + update
        sending = (m + stages - 1) * sent + reduced
        return Laid(
            "pipeline",
            {"copies": copies, "stages": stages},
            max(memories, key=lambda memory: memory.total),
            m * slot,
            sending,
            update,
            step,
            (m + stages - 1) * slot + sending + update,
            (stages - 1) * slot / step,
        )

    def _stage(self, parts: Sequence[int], held: Sequence[Held], in_flight: int) -> Memory:
        gradients = _sum(held, "gradient")
        parameters = _sum(held, "bytes") + self.work.unread_bytes()
        beside = Beside(lambda part: parameters, lambda part, later: gradients, _sum(held, "states"), parts, in_flight)
        return most(self.work, beside, self.again)


def balanced(seconds: Sequence[float], stages: int) -> list[range]:
    """Parts in a row as stages, at least one each, the slowest stage as fast as can be.

    Raises:
        ValueError: there are fewer parts than stages.
    """
    if stages > len(seconds):
        raise ValueError(f"{len(seconds)} parts are no {stages} stages")
    count, until = len(seconds), [0.0, *accumulate(seconds)]
    rows = [[(x, 0) for x in until]]  # by stages: by parts, the slowest of them, and where the last one begins
    for stage in range(1, stages):
        before = rows[-1]
        rows.append(
            [
                min(((max(before[a][0], until[b] - until[a]), a) for a in range(stage, b)), default=(inf, 0))
                for b in range(count + 1)
            ]
        )
    ends = [count]
    for row in reversed(rows):
        ends.insert(0, row[ends[0]][1])
    return [range(a, b) for a, b in pairwise(ends)]

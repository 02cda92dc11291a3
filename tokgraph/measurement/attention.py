"""Attention allocation: how much attention goes from each part of a sequence to each part, block by block, head by head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokgraph.errors import AnalysisError, SpecError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import where
from tokgraph.ir.program import TaskGraph

from .observe import Call, Watched, observe
from .segments import OTHER
from .weights import Chunk, weight_chunks, weights_shape

MAX_BYTES = 64 * 2**20
"""Attention weights that are held at once, in bytes, unless said otherwise."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """The attention mass that goes from the queries of a segment to the keys of each segment, averaged over queries.

    Args:
        mass: ``[blocks, heads, queries, keys]`` float64 on the CPU; rows sum to 1. NaN where a segment has no query, and
            at heads that a block does not have. The heads of several attentions of one block follow one another.
        queries: names of the query segments.
        keys: names of the key segments, all there are.
        rows: query rows of each query segment that were averaged over, in all samples together.

    Source: arXiv 2606.01503, eq. 2.
    """

    mass: torch.Tensor
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    rows: tuple[int, ...]

    def between(self, query: str, key: str) -> torch.Tensor:
        """``[blocks]``: the mass from one segment to another, the mean over heads.

        Raises:
            KeyError: it was not measured.
        """
        for name, known in ((query, self.queries), (key, self.keys)):
            if name not in known:
                raise KeyError(f"{name!r} is not among the measured segments {', '.join(known)}")
        return self.mass[:, :, self.queries.index(query), self.keys.index(key)].nanmean(1)


@dataclass
class _Totals:
    """Sums over queries, float64 on the CPU.

    Args:
        mass: ``[heads, queries, keys]``.
        count: ``[heads, queries]``, queries that see a key.
    """

    mass: torch.Tensor
    count: torch.Tensor


@dataclass
class AllocationMeter:
    """Adds up attention weights by segment as they are recomputed, never more than ``max_bytes`` of them at once.

    Args:
        graph: the captured task graph, for diagnostics.
        facts: facts of the task that runs.
        queries: the query segments; ``None``: all that have rows, but ``"other"``.
        max_bytes: bound of the attention weights (scores and softmax) held at once.
    """

    graph: TaskGraph
    facts: TaskFacts
    queries: Sequence[str] | None = None
    max_bytes: int = MAX_BYTES
    _totals: dict[str, _Totals] = field(default_factory=dict, init=False)
    _names: tuple[str, ...] = field(default=(), init=False)
    _rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0), init=False)
    _masks: torch.Tensor = field(default_factory=lambda: torch.zeros(0), init=False)

    def nodes(self) -> Iterable[str]:
        """Fused attentions, and the softmax of the others."""
        return [attention.node for block in self.facts.blocks for attention in block.attention]

    def begin(self, batch: Watched) -> None:
        """Note the segments of the batch.

        Raises:
            SpecError: segments change their names from batch to batch, or a query segment is none of them.
        """
        names = tuple(batch.segments)
        if self._names and names != self._names:
            raise SpecError(
                f"task {self.graph.name!r}: the segments of one batch are {', '.join(self._names)}, of another "
                f"{', '.join(names)}",
                help="return the same names for every batch; a mask may be false everywhere",
            )
        for name in self.queries or ():
            if name not in names:
                raise SpecError(
                    f"task {self.graph.name!r}: no segment is named {name!r}", help=f"there are {', '.join(names)}"
                )
        self._names = names
        self._masks = torch.stack([batch.segments[name] for name in names])  # [segments, batch, tokens]
        rows = self._masks.sum((1, 2))
        self._rows = self._rows + rows if len(self._rows) else rows

    def see(self, call: Call) -> None:
        """Reduce one attention to segments.

        Raises:
            AnalysisError: it is no self-attention over all tokens.
            SpecError: ``max_bytes`` does not hold one row of its weights.
        """
        shape, segments = weights_shape(call), len(self._names)
        self._check(call.node, shape)
        heads = math.prod(shape[1:-2])
        empty = _Totals(torch.zeros(heads, segments, segments).double(), torch.zeros(heads, segments).double())
        totals = self._totals.setdefault(call.node.name, empty)
        wanted = [i for i, name in enumerate(self._names) if self._asks(name)]
        asked = self._masks[wanted].any(0)
        for chunk in weight_chunks(call, asked, self.max_bytes):
            self._add(totals, chunk)
            del chunk  # or it would live on while the next one is computed

    def _add(self, totals: _Totals, chunk: Chunk) -> None:
        keys = self._masks[:, chunk.sample].T.to(chunk.weights)  # [keys, segments]
        mass = (chunk.weights @ keys).double()  # [heads, rows, segments]
        queries = self._masks[:, chunk.sample].to(chunk.rows.device)[:, chunk.rows].to(mass)  # [segments, rows]
        totals.mass[chunk.heads] += torch.einsum("hrk,qr->hqk", mass, queries).cpu()
        seeing = (mass.sum(-1) != 0).to(mass)  # a row that is masked from every key allocates nothing
        totals.count[chunk.heads] += torch.einsum("hr,qr->hq", seeing, queries).cpu()

    def _asks(self, name: str) -> bool:
        return name != OTHER if self.queries is None else name in self.queries

    def _check(self, node: fx.Node, shape: Sequence[int]) -> None:
        """Refuse weights that are not ``[batch, heads..., tokens, tokens]``."""
        _, batch, tokens = self._masks.shape
        first = all(a.batch in (0, None) for block in self.facts.blocks for a in block.attention if a.node == node.name)
        if not first or len(shape) < 3 or shape[0] != batch or tuple(shape[-2:]) != (tokens, tokens):
            raise AnalysisError(
                f"task {self.graph.name!r}: an attention has weights {tuple(shape)}, not [batch, heads, tokens, tokens] "
                f"with batch {batch} and {tokens} tokens",
                where=where(node),
                help="attention allocation needs self-attention whose batch and head axes are apart",
            )

    def result(self) -> Allocation:
        """The means so far."""
        shown = [
            i for i, name in enumerate(self._names) if self._asks(name) and (self.queries is not None or self._rows[i])
        ]
        blocks = [self._of_block([a.node for a in block.attention], shown) for block in self.facts.blocks]
        heads = max((len(mass) for mass in blocks), default=0)
        mass = torch.full((len(blocks), heads, len(shown), len(self._names)), math.nan, dtype=torch.float64)
        for i, found in enumerate(blocks):
            mass[i, : len(found)] = found
        names = tuple(self._names[i] for i in shown)
        return Allocation(mass, names, self._names, tuple(int(self._rows[i]) for i in shown))

    def _of_block(self, nodes: list[str], shown: list[int]) -> torch.Tensor:
        """``[heads, queries, keys]``: the means of all attentions of a block."""
        found = [self._totals[node] for node in nodes if node in self._totals]
        means = [(totals.mass / totals.count.unsqueeze(-1))[:, shown] for totals in found]
        return torch.cat([torch.zeros(0, len(shown), len(self._names)).double(), *means])


def attention_allocation(
    graph: TaskGraph,
    facts: TaskFacts,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    queries: Sequence[str] | None = None,
    max_bytes: int = MAX_BYTES,
    dtype: torch.dtype | None = None,
) -> Allocation:
    """Measure a captured task's attention allocation.

    Weights are recomputed from queries, keys and mask for the query rows that are asked for, some at a time, and summed
    up by segment at once. Attention that is not fused runs some query rows at a time itself; where it reshapes its scores
    on the way, or somebody else reads them, it runs whole, and ``max_bytes`` does not hold. Dropout is off.

    Args:
        graph: the captured task graph.
        facts: its facts.
        batches: inputs by name, weighted by their numbers of query rows; ``None``: the example batch.
        queries: names of the query segments; ``None``: all that have rows, but ``"other"``.
        max_bytes: bound of the attention weights held at once.
        dtype: the type to compute in; ``None``: the model's own, scores at least in float32.

    Raises:
        AnalysisError: the model is on the meta device, or an attention is no self-attention over all tokens.
        BatchError: a batch does not fit the graph.
        SpecError: a segment is asked for that does not exist, declared segments are not what they must be, or
            ``max_bytes`` does not hold a single row.
    """
    meter = AllocationMeter(graph, facts, queries, max_bytes)
    observe(graph, facts, [meter], batches, dtype, max_bytes)
    return meter.result()

"""Running a captured graph on batches while meters watch its values: one interpretation a batch serves all meters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.interpreter import GraphInterpreter, in_dtype
from tokgraph.ir.node import ancestors
from tokgraph.ir.program import TaskGraph

from .batch import on_batch
from .pieces import Region, regions
from .segments import find_segments, visual_of


@dataclass(frozen=True)
class Watched:
    """What a meter is told of a batch before the batch runs.

    Args:
        visual: ``[batch, tokens]`` bool on the CPU, the visual tokens.
        segments: name -> ``[batch, tokens]`` bool on the CPU; every position is in exactly one.
    """

    visual: torch.Tensor
    segments: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Call:
    """A call that a meter watches, as it happens.

    Args:
        node: the FX node.
        args: values of its arguments.
        kwargs: values of its keyword arguments.
        result: what it gives.
        rows: the query rows ``[rows]`` that the result holds; ``None``: all.
        total: how many query rows there are, where the result holds some.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    rows: torch.Tensor | None = None
    total: int = 0

    def named(self) -> dict[str, Any]:
        """Arguments by their schema names; those left to their defaults are missing."""
        assert isinstance(self.node.target, torch._ops.OpOverload)
        names = [a.name for a in self.node.target._schema.arguments]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


class Meter(Protocol):
    """What adds up numbers over batches while graphs run."""

    def nodes(self) -> Iterable[str]:
        """Names of the nodes that :meth:`see` wants to see."""

    def begin(self, batch: Watched) -> None:
        """A batch is about to run."""

    def see(self, call: Call) -> None:
        """A watched node has run; keep no more of its values than is needed."""


class ObservedRun(GraphInterpreter):
    """Runs what watched nodes need of a graph, without dropout, and shows them to their meters.

    Args:
        graph: the task graph, its inputs the batch.
        meters: what watches.
        dtype: the type to compute in, ``None``: the model's own.
        pieces: node -> region of attention that is to run in pieces.
        max_bytes: bound of the attention weights of such a region held at once.
    """

    def __init__(
        self,
        graph: TaskGraph,
        meters: Sequence[Meter],
        dtype: torch.dtype | None = None,
        pieces: Mapping[fx.Node, Region] | None = None,
        max_bytes: int = 0,
    ) -> None:
        tensors, constants = in_dtype(dtype, graph.graph_module)
        super().__init__(graph.graph_module, lambda x: tensors(x).detach(), constants)
        self._meters: dict[str, list[Meter]] = {}
        for meter in meters:
            for name in meter.nodes():
                self._meters.setdefault(name, []).append(meter)
        # assertions on inputs run as well: a batch that the graph does not fit shall not pass unnoticed
        wanted = [n for n in graph.graph.nodes if n.name in self._meters or (n.op != "placeholder" and n.is_impure())]
        self._pieces, self._max_bytes = pieces or {}, max_bytes
        ends = [self._pieces[n].nodes[-1] for n in wanted if n in self._pieces]
        self._needed = ancestors(n for n in (*wanted, *ends) if n.op != "output")
        self._held: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node; vocabulary heads and losses, which nothing watched needs, are left out."""
        if n.op in ("call_function", "get_attr") and n not in self._needed:
            return None
        if n in self._pieces:
            return self._run_pieces(n, self._pieces[n])
        result = super().run_node(n)
        if n.name in self._meters:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._show(Call(n, args, kwargs, result))
        return result

    def _show(self, call: Call) -> None:
        for meter in self._meters.get(call.node.name, ()):
            meter.see(call)

    def _run_pieces(self, n: fx.Node, region: Region) -> Any:
        """The weighted sum of a region; its other nodes note what it will need, and run with it."""
        self._held |= {x: self.env[x] for x in n.all_input_nodes if x not in region.nodes}
        if n is not region.nodes[-1]:
            return None
        values = {x: self._held.pop(x) for x in region.outside()}
        return region.run(
            values,
            lambda node, args, kwargs: self.call_function(node.target, args, dict(kwargs)),
            lambda result, rows, total: self._show(Call(region.softmax, (), {}, result, rows, total)),
            self._max_bytes,
        )


def observe(
    graph: TaskGraph,
    facts: TaskFacts,
    meters: Sequence[Meter],
    batches: Iterable[Mapping[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> None:
    """Run a captured task on batches under the eyes of meters, without gradients and without dropout.

    Args:
        graph: the captured task graph.
        facts: its facts.
        meters: what watches; their numbers add up.
        batches: inputs by name, of any size where the graph's dimensions are dynamic; ``None``: the example batch.
        dtype: the type to compute in; ``None``: the model's own.
        max_bytes: bound of the attention weights held at once; ``None``: attention that is not fused runs whole.

    Raises:
        AnalysisError: the model is on the meta device.
        BatchError: a batch does not fit the graph.
        SpecError: declared segments are not what they must be, or ``max_bytes`` does not hold a single row.
    """
    pieces = {} if max_bytes is None else regions(graph, facts)
    for batch in [None] if batches is None else batches:
        here = on_batch(graph, batch)
        watched = Watched(visual_of(here, facts), find_segments(here, facts))
        for meter in meters:
            meter.begin(watched)
        with torch.no_grad():
            ObservedRun(here, meters, dtype, pieces, max_bytes or 0).run(*here.flatten(here.task.inputs))

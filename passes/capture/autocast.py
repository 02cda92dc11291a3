"""Capture inside ``torch.autocast``: the region of the capture, and one cast for all uses of a parameter, as eager has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tokgraph.ir.conditions import Autocast
from tokgraph.ir.facts import TaskFacts

from ..contract import GraphPass

aten = torch.ops.aten


@contextmanager
def in_autocast(region: Autocast | None, device: str) -> Iterator[None]:
    """Run in a region, or in none, whatever is active around.

    Casts are not cached in it: the cache would outlive a trace, with the trace's tensors in it.
    """
    with ExitStack() as regions:
        if region is not None:
            regions.enter_context(torch.autocast(region.device, region.dtype, cache_enabled=False))
        else:
            for kind in {device, "cpu"} - {"meta"}:
                regions.enter_context(torch.autocast(kind, enabled=False))
        yield


@dataclass(frozen=True)
class MergeParameterCasts(GraphPass):
    """Lets all uses of a parameter in one type read the same cast, as autocast's cache does: its gradient is then summed in
    that type.
    """

    name: ClassVar[str] = "merge-parameter-casts"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Redirect the users of every further cast to the first."""
        first: dict[tuple[object, ...], fx.Node] = {}
        for node in list(graph_module.graph.nodes):
            if node.target is not aten._to_copy.default or node.args[0].op != "get_attr":
                continue
            key = (node.args[0].target, *sorted((name, str(x)) for name, x in node.kwargs.items()))
            kept = first.setdefault(key, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph_module.graph.erase_node(node)

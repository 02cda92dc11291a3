"""Scatters by a mask, as image features enter a text: by an index instead, so that no backward pass waits for a count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import call, module_path, source_line

from ..contract import GraphPass
from .inline import inlined

aten = torch.ops.aten


@dataclass(frozen=True)
class ScattersByIndex(GraphPass):
    """``masked_scatter`` becomes a gather by the count of the mask so far, and a choice between it and what was there.

    The gradient of ``masked_scatter`` collects the rows that the mask marks, whose number the device alone knows: the host
    waits for it, which a recorded CUDA graph cannot. A gather's gradient has the size of what it reads. That the source
    has as many values as the mask marks is a check, as it is one of the operator.
    """

    name: ClassVar[str] = "scatters-by-index"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace every one of them."""
        graph = graph_module.graph
        for node in graph.find_nodes(op="call_function", target=aten.masked_scatter.default):
            with graph.inserting_before(node):
                enough = inlined(node, _enough, self.name)
                where = (_SAYS, source_line(node) or "", module_path(node))
                call(graph, torch.ops.tokgraph.check.default, enough, *where, [], [], origin=node, made_by=self.name)
                found = inlined(node, _scattered, self.name)
            node.replace_all_uses_with(found)
            graph.erase_node(node)


_SAYS = "the values to scatter, such as image features, are fewer than the positions that the mask marks for them"


def _enough(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    rows, width = _rows(x, mask)
    return rows.sum() * width <= source.numel()


def _scattered(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    rows, width = _rows(x, mask)
    nothing = source.new_zeros(
        width
    )  # for the positions before the first that is marked; there may be no values at all
    values = torch.cat([nothing, source.flatten()]).view(-1, width)
    at = rows.cumsum(0).clamp(max=values.shape[0] - 1)
    found = torch.where(rows.unsqueeze(-1), values.index_select(0, at), x.reshape(-1, width))
    return found.view(x.shape)


def _rows(x: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """The mask of whole rows of the last axis, flat, and how long they are; rows of one where it differs within one."""
    mask = mask.expand(x.shape)
    whole = x.dim() > 1 and mask.stride(-1) == 0
    return (mask[..., 0].flatten(), x.shape[-1]) if whole else (mask.flatten(), 1)

"""Where rows of text and rows of other content become one sequence: the tokens of the decoder, whatever is in front of it.

A tower has attentions and layers as a decoder has, perhaps more of them, and so have a resampler and a head behind the
decoder. What tells them apart is whose rows they are: those of embedded ids and those that are made of float inputs, joined.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from tokgraph.ir.node import axis_argument, rank, tensor, tensor_inputs

from ..rules.registry import Axis
from .flow import computed_from
from .stream import content_roots

aten = torch.ops.aten
_PLACES = (aten.masked_scatter.default, aten.where.self, aten.index_put.default)


def meetings(graph: fx.Graph) -> Iterator[Axis]:
    """The axes along which rows of embedded ids meet rows of float inputs, in graph order."""
    embedded, floats = content_roots(graph)
    text, other = computed_from(embedded), computed_from(floats)
    for node in graph.nodes:
        axis = _axis_of_rows(node) if node in text and node in other else None
        if axis is not None:
            rows = [x for x in tensor_inputs(node) if (val := tensor(x)) is not None and val.is_floating_point()]
            if any(x in text and x not in other for x in rows) and any(x in other for x in rows):
                yield node, axis


def _axis_of_rows(node: fx.Node) -> int | None:
    """The axis along which a node puts rows of several values into one sequence."""
    last = rank(node) - 1 if tensor(node) is not None else 0
    axis = (
        axis_argument(node, node) if node.target is aten.cat.default else last - 1 if node.target in _PLACES else last
    )
    return axis if 0 < axis < last else None

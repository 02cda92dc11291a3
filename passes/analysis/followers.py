"""Layers behind a decoder: they predict further tokens, from rows that a linear map makes of the decoder's last ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from tokgraph.ir.blocks import Block, Unplaced
from tokgraph.ir.node import axis_argument, by_name, descendants, rank, tensor

from .cuts import pointwise
from .flow import computed_from, reads_values
from .units import Units, without_followers

_MAPS, _JOIN = (torch.ops.aten.linear.default,), torch.ops.aten.cat.default


def fewer_units(graph: fx.Graph, units: Units) -> list[Units]:
    """The units without those of layers behind the decoder, in each way that tells them apart: they are in another list of
    modules, or all of them begin with a linear map.
    """
    found = [without_followers(units)]
    number = len(units.units)
    while number > 2 and begins_anew(graph, units.units[number - 2].nodes, units.units[number - 1].nodes):
        number -= 1
    if number < len(units.units):
        found.append(Units(units.tokens, units.units[:number], units.aside))
    return [fewer for fewer in found if fewer is not None]


def without_behind(graph: fx.Graph, blocks: Sequence[Block], unplaced: Sequence[Unplaced]) -> tuple[Unplaced, ...]:
    """The attentions that are in no block, if not all of them are those of layers behind the last one."""
    nodes = by_name(graph)
    before = [nodes[attention.node] for attention in blocks[-1].attention]
    for attention in unplaced:
        here = nodes[attention.node]
        if attention.block is not None or not begins_anew(graph, before, [here]):
            return tuple(unplaced)
        before = [here]
    return ()


def begins_anew(graph: fx.Graph, before: Sequence[fx.Node], attention: Sequence[fx.Node]) -> bool:
    """Whether rows enter the layer of an attention by a linear map alone, joined with others (embeddings of next tokens), and
    not as they are, while an output reads what the layer before made around it.

    Args:
        graph: the graph.
        before: the attentions of the layer before.
        attention: those of the layer.
    """
    made, earlier = computed_from(attention), computed_from(before)
    met = [x for x in graph.nodes if x in made and pointwise(x) and tensor(x) is not None and rank(x) > 2]
    maps, stack = set[fx.Node](), [y for x in met for y in x.all_input_nodes if y in earlier - made]
    while stack:
        node = stack.pop()
        read = [x for x in node.all_input_nodes if x in earlier]
        if node.target in _MAPS:
            maps.add(node)
        elif not read or (pointwise(node) and len(read) < len(node.all_input_nodes)):
            return False  # the layer before adds to its stream here
        else:
            stack.extend(read)
    around = descendants(before, None, lambda user: reads_values(user) and user not in maps)
    return any(_joins(node, earlier) for node in maps) and not around.isdisjoint(graph.output_node().all_input_nodes)


def _joins(node: fx.Node, earlier: set[fx.Node]) -> bool:
    """Whether a map reads rows that are joined with features of others, row by row: not those of a decoder alone."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        read = [x for x in stack.pop().all_input_nodes if x in earlier - seen and not pointwise(x)]
        seen.update(read)
        joins = [x for x in read if x.target is _JOIN]
        if any(axis_argument(x, x) == rank(x) - 1 and not earlier.issuperset(x.all_input_nodes) for x in joins):
            return True
        stack.extend(x for x in read if x not in joins)
    return False

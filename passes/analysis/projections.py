"""Query, key and value projections of attentions: the linear maps between the residual stream and what attention reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import fx

from tokgraph.ir.blocks import Attention, Projection
from tokgraph.ir.node import argument, rank, tensor_inputs
from tokgraph.ir.tensors import tensor_name

aten = torch.ops.aten


def find_projections(attentions: Sequence[Attention], nodes: Sequence[fx.Node]) -> tuple[Projection, ...]:
    """The projections of a block's attentions, in graph order.

    Args:
        attentions: the attentions.
        nodes: the block's nodes.

    Returns:
        None where some query, key or value is not made by ``linear`` calls over the model's own parameters.
    """
    by_name = {node.name: node for node in nodes}
    keys: set[fx.Node] = set()
    everything: set[fx.Node] = set()
    for attention in attentions:
        for role, operand in _operands(by_name[attention.node], by_name[attention.output]):
            found = _nearest_linears(operand, set(nodes))
            if not found or not all(map(_is_plain, found)):
                return ()
            everything |= found
            keys |= found if role != "query" else set()
    return tuple(_projection(node, node in keys) for node in nodes if node in everything)


def projection_weights(attention: fx.Node, inside: Collection[fx.Node]) -> set[fx.Node]:
    """What the nearest linear maps behind an attention, or the softmax of one, have as weights; none where it is not known."""
    found = _nearest_linears(attention, set(inside))
    return {weight for node in found if (weight := parameter_behind(argument(node, "weight"))) is not None}


def parameter_behind(operand: fx.Node) -> fx.Node | None:
    """What reads the parameter that an operand is, as it is or in another type, as in a region of autocast; else ``None``."""
    while operand.target is aten._to_copy.default:
        operand = operand.args[0]  # type: ignore[assignment]
    return operand if operand.op == "get_attr" else None


def _operands(node: fx.Node, output: fx.Node) -> Iterable[tuple[str, fx.Node]]:
    """Role and value of what an attention reads: of the fused node, or of the two products around a softmax."""
    if node is output:
        return [(role, argument(node, role)) for role in ("query", "key", "value")]
    product = node
    while product.target is not aten.matmul.default:
        inputs = [x for x in tensor_inputs(product) if x.op == "call_function"]
        if not inputs:
            return []
        product = inputs[0]
    query, key = product.args[:2]
    return [("query", query), ("key", key), ("value", output.args[1])]  # type: ignore[list-item]


def _nearest_linears(operand: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    found, seen, stack = set(), set(), [operand]
    while stack:
        node = stack.pop()
        if node in seen or node not in inside:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            found.add(node)
        else:
            stack.extend(tensor_inputs(node))
    return found


def _is_plain(node: fx.Node) -> bool:
    parameters = [x for x in (argument(node, "weight"), argument(node, "bias")) if x is not None]
    return rank(node) == 3 and all(parameter_behind(x) is not None for x in parameters)


def _projection(node: fx.Node, keys: bool) -> Projection:
    weight, bias = (
        None if x is None else tensor_name(parameter_behind(x))
        for x in (argument(node, "weight"), argument(node, "bias"))
    )
    assert weight is not None
    return Projection(node.name, weight, bias, keys)

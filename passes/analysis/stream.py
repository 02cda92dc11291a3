"""The residual stream: its cut points and the decoder blocks between them, found from graph structure.

Source: cut points are the dominators of the loss in the graph of float values that carry token content (Lengauer and
Tarjan's notion, as networkx computes it); a cut point belongs to the residual stream when it adds something to the one
before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import networkx as nx
import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.node import argument, descendants, module_path, tensor, tensor_inputs, where
from tokgraph.ir.program import TaskGraph, loss_node

from ..rules import traits

aten = torch.ops.aten
_ROOT = "root"


@dataclass(frozen=True)
class Segment:
    """The nodes between two neighbouring residual cut points.

    Args:
        start: the stream before.
        end: the stream after.
        nodes: nodes computed from ``start`` that ``end`` is computed from, ``end`` included, in graph order.
        module: the innermost user module that holds all of them.
    """

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    module: str


def residual_segments(graph: TaskGraph) -> list[Segment]:
    """The segments of the longest residual chain that leads to the loss.

    Raises:
        AnalysisError: there is none.
    """
    cuts = _cut_points(graph)
    chain: list[fx.Node] = []
    best: list[fx.Node] = []
    for node in cuts:
        chain = [*chain, node] if chain and _adds_to(node, chain[-1]) else [node]
        best = chain if len(chain) >= len(best) else best
    if len(best) < 2:
        raise AnalysisError(
            f"task {graph.name!r}: no residual stream found between the inputs and the loss",
            help="tokgraph needs decoder blocks that add to a [batch, tokens, hidden] value which alone connects them",
        )
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    return [_segment(start, end, position) for start, end in pairwise(best)]


def _content_roots(graph: fx.Graph) -> list[fx.Node]:
    """Values in which token content becomes float: embeddings of inputs, and float inputs."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    from_inputs = descendants(placeholders)
    roots = [p for p in placeholders if (val := tensor(p)) is not None and val.is_floating_point()]
    for node in graph.nodes:
        if node.target is aten.embedding.default and argument(node, "indices") in from_inputs:
            roots.append(node)
    return roots


def _is_float(node: fx.Node) -> bool:
    val = tensor(node)
    return val is not None and val.is_floating_point()


def _cut_points(graph: TaskGraph) -> list[fx.Node]:
    flow: nx.DiGraph[Any] = nx.DiGraph()
    stack = _content_roots(graph.graph)
    flow.add_edges_from((_ROOT, node) for node in stack)
    seen = set(stack)
    while stack:
        node = stack.pop()
        for user in node.users:
            if _is_float(user) and not traits(user.target).shape_only:
                flow.add_edge(node, user)
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
    loss = loss_node(graph)
    if loss not in flow:
        raise AnalysisError(
            f"task {graph.name!r}: the loss does not depend on any embedded or float input", where=where(loss)
        )
    dominator = nx.immediate_dominators(flow, _ROOT)
    cuts: list[fx.Node] = []
    cut: Any = loss
    while cut != _ROOT:
        cuts.append(cut)
        cut = dominator[cut]
    return cuts[::-1]


def _adds_to(node: fx.Node, previous: fx.Node) -> bool:
    """Whether ``node`` is ``previous`` plus something: reached through additions (copies and dropout) alone."""
    if node.target is not aten.add.Tensor:
        return False
    stack = tensor_inputs(node)
    while stack:
        operand = stack.pop()
        if operand is previous:
            return True
        if operand.target in (aten.add.Tensor, aten.dropout.default) or traits(operand.target).copies:
            stack.extend(tensor_inputs(operand))
    return False


def _segment(start: fx.Node, end: fx.Node, position: dict[fx.Node, int]) -> Segment:
    low, high = position[start], position[end]
    forward, stack = set(), [start]
    while stack:
        for user in stack.pop().users:
            if low < position[user] <= high and user not in forward:
                forward.add(user)
                stack.append(user)
    back, stack = {end}, [end]
    while stack:
        for used in stack.pop().all_input_nodes:
            if used in forward and used not in back:
                back.add(used)
                stack.append(used)
    nodes = tuple(sorted(back, key=position.__getitem__))
    return Segment(start, end, nodes, _common_module(nodes))


def _common_module(nodes: tuple[fx.Node, ...]) -> str:
    paths = [module_path(node).split(".") for node in nodes if node.meta.get("nn_module_stack")]
    if not paths:
        return ""
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))]
    return ".".join(shared)

"""The residual stream: its cut points and the decoder blocks between them, found from graph structure.

Source: cut points are the dominators of the loss in the graph of float values that carry token content (Lengauer and
Tarjan's notion, as networkx computes it); a cut point belongs to the residual stream when it adds something to the one
before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import networkx as nx
import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.node import ancestors, argument, descendants, module_call, module_path, tensor, tensor_inputs, where
from tokgraph.ir.program import TaskGraph, loss_node

from ..rules import axis_map, traits
from ..rules.registry import Mix

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
        call: the call of it, where it is called again.
    """

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    module: str
    call: str


def residual_segments(graph: TaskGraph) -> list[Segment]:
    """The segments of the longest residual chain that leads to the loss.

    Raises:
        AnalysisError: there is none.
    """
    chain = _stream(graph)
    if not chain:
        raise AnalysisError(
            f"task {graph.name!r}: the loss does not depend on any embedded or float input",
            where=where(loss_node(graph)),
        )
    if len(chain) < 2:
        raise AnalysisError(
            f"task {graph.name!r}: no residual stream found between the inputs and the loss",
            help="tokgraph needs decoder blocks that add to a [batch, tokens, hidden] value which alone connects them",
        )
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    return [_segment(start, end, position) for start, end in pairwise(chain)]


def _stream(graph: TaskGraph) -> list[fx.Node]:
    """The longest residual chain, from whatever content it is the stream of.

    Every float input may carry content of the stream, or stand beside it: targets and weights of the loss, the logits of a
    teacher, masks and time steps that every block reads. These have paths to the loss around the stream. So embedded
    tokens without float inputs are tried as well, and, where neither shows a stream with attention, each kind of content
    for itself; but not what carries images, from which the stream of an image encoder could be longer.
    """
    embedded, floats = content_roots(graph.graph)
    together = [_longest_chain(_cut_points(graph, roots)) for roots in (embedded + floats, embedded)]
    best = together[0] if together[0] == together[1] else max(together, key=_attentions)
    if _attends(best):
        return best
    images = {node for key in graph.task.visual_inputs for node in graph.input_nodes().get(key, [])}
    alone = [_longest_chain(_cut_points(graph, [root])) for root in (*embedded, *floats) if root not in images]
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    return max(filter(_attends, alone), key=lambda chain: (position[chain[-1]], _attentions(chain)), default=best)


def _longest_chain(cuts: list[fx.Node]) -> list[fx.Node]:
    """The longest run of cut points each of which adds to the one before; of equally long ones the last."""
    chain: list[fx.Node] = []
    best: list[fx.Node] = []
    for node in cuts:
        chain = [*chain, node] if chain and _adds_to(node, chain[-1]) else [node]
        best = chain if len(chain) >= len(best) else best
    return best


def _mixes_of_attention(chain: list[fx.Node]) -> Iterator[Mix]:
    """What is, or may be part of, an attention between the ends of a chain."""
    if len(chain) > 1:
        for node in descendants(chain[:1]) & ancestors(chain[-1:]):
            described = axis_map(node)
            yield from (mix for mix in (described.mixes if described else ()) if mix.kind in ("attention", "softmax"))


def _attentions(chain: list[fx.Node]) -> int:
    return sum(1 for _ in _mixes_of_attention(chain))


def _attends(chain: list[fx.Node]) -> bool:
    return any(True for _ in _mixes_of_attention(chain))


def content_roots(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Values in which token content becomes float: embeddings of inputs; and float inputs."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    from_inputs = descendants(placeholders)
    embeddings = graph.find_nodes(op="call_function", target=aten.embedding.default)
    embedded = [node for node in embeddings if argument(node, "indices") in from_inputs]
    return embedded, [node for node in placeholders if _is_float(node)]


def _is_float(node: fx.Node) -> bool:
    val = tensor(node)
    return val is not None and val.is_floating_point()


def _cut_points(graph: TaskGraph, roots: list[fx.Node]) -> list[fx.Node]:
    """The dominators of the loss among the float values that carry content of ``roots``, in graph order; none where the
    loss does not depend on these.
    """
    flow: nx.DiGraph[Any] = nx.DiGraph()
    stack = roots.copy()
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
        return []
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
        node = stack.pop()
        for user in node.users:
            if low < position[user] <= high and user not in forward and not _sized_by(user, node):
                forward.add(user)
                stack.append(user)
    back, stack = {end}, [end]
    while stack:
        for used in stack.pop().all_input_nodes:
            if used in forward and used not in back:
                back.add(used)
                stack.append(used)
    nodes = tuple(sorted(back, key=position.__getitem__))
    return Segment(start, end, nodes, common_module(nodes), common_call(nodes))


def _sized_by(user: fx.Node, node: fx.Node) -> bool:
    """Whether a tensor has its size from a node, and none of its values."""
    return tensor(user) is not None and (traits(user.target).shape_only or tensor(node) is None)


def common_module(nodes: tuple[fx.Node, ...]) -> str:
    """The innermost user module that holds all of the nodes."""
    paths = [module_path(node).split(".") for node in nodes if node.meta.get("nn_module_stack")]
    if not paths:
        return ""
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))]
    called = {path for node in nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
    item = max((at + 1 for at, part in enumerate(shared) if part.isdigit()), default=0)
    if ".".join(shared) not in called and ".".join(shared[:item]) in called:  # a list of parts, within a layer
        return ".".join(shared[:item])
    return ".".join(shared)


def common_call(nodes: tuple[fx.Node, ...]) -> str:
    """The call of the innermost user module that holds all of the nodes."""
    depth = common_module(nodes).count(".") + 1
    calls = [module_call(node).split(".")[:depth] for node in nodes if node.meta.get("nn_module_stack")]
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*calls, strict=False))
    return ".".join(level[0] for level in shared) if calls else ""

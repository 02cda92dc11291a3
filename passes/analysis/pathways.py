"""Pathway profiles: for each parameter, the share of the visual tokens that it transforms, read off a graph.

The rows of every value are followed through the graph's selections and restores; which of them are visual is counted on
the example batch. Work that no demanded output reads must be gone from the graph already (``exact`` removes it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.facts import TaskFacts
from tokgraph.fxnode import rank, tensor, tensor_inputs
from tokgraph.program import TaskGraph

from ..rewrite.nodes import VISUAL_ROWS, is_selection, selection
from ..rewrite.sink import NARROWED
from ..rules import axis_map
from ..rules.registry import Axis
from .evaluate import evaluate
from .visual import visual_mask

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
Chain = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Pathways:
    """What a graph does with a task's visual tokens.

    Args:
        profile: parameter name -> share of the visual tokens that it transforms, in ``[0, 1]``.
        tokens_per_block: visual rows whose residual each block computes, averaged over the batch.
    """

    profile: Mapping[str, float]
    tokens_per_block: tuple[float, ...]


def pathways(graph: TaskGraph, facts: TaskFacts) -> Pathways:
    """Profile a graph from which work that nobody demands is gone."""
    spaces = row_spaces(graph.graph, facts)
    visual = _visual_rows(graph, facts, set(spaces.values()))
    count = facts.visual.count
    profile: dict[str, float] = {}
    branch = set(facts.visual.branch)
    for node, parameters in _parameter_uses(graph.graph).items():
        spaces_here = [spaces[axis] for axis in _axes(node) if axis in spaces]
        rows = max((visual[s] for s in spaces_here), default=count if node.name in branch else 0)
        for name in parameters:
            profile[name] = max(profile.get(name, 0.0), rows / count)
    nodes = {node.name: node for node in graph.graph.nodes}
    ends = [nodes.get(block.end) for block in facts.blocks]
    per_block = tuple(visual[spaces[end, 1]] if end is not None and (end, 1) in spaces else 0.0 for end in ends)
    return Pathways(profile, per_block)


def row_spaces(graph: fx.Graph, facts: TaskFacts) -> dict[Axis, Chain]:
    """The rows that token axes hold: chains of indices, each relative to the rows that the one before left.

    Only values that hold rows of the stream are followed: from where visual and text rows are together, or from before,
    where that is computed on fewer rows already.
    """
    nodes = {node.name: node for node in graph.nodes}
    entry = nodes.get(facts.visual.entry, nodes.get(facts.entry))
    spaces: dict[Axis, Chain] = dict.fromkeys(_whole(entry) if entry is not None else (), ())
    for node in graph.nodes:
        if tensor(node) is None or node.op != "call_function":
            continue
        if is_selection(node):
            x, index, dim, _ = selection(node)
            for axis in range(rank(x)):
                if (x, axis) in spaces:
                    spaces[node, axis] = (*spaces[x, axis], *((index,) if axis == dim else ()))
        elif node.target is tokgraph.restore.default:
            if (node.args[0], 1) in spaces:
                spaces[node, 1] = spaces[node.args[0], 1]
        else:
            _follow(node, spaces)
    return spaces


def _whole(entry: fx.Node) -> set[Axis]:
    """The nearest axes, at the entry or before it, that hold every row of the token axis."""
    found: set[Axis] = set()
    stack: list[Axis] = [(entry, 1)]
    while stack:
        node, axis = stack.pop()
        described = axis_map(node)
        if is_selection(node):
            stack.append((selection(node)[0], axis))
        elif described is not None and node.meta.get(NARROWED):
            stack.extend(described.rows[axis] or ())
        else:
            found.add((node, axis))
    return found


def _follow(node: fx.Node, spaces: dict[Axis, Chain]) -> None:
    described = axis_map(node)
    if described is None:
        return
    sources = [(axis, source) for axis, rows in enumerate(described.rows) for source in rows or ()]
    for axis, source in (*sources, *described.aligned):
        if source in spaces:
            spaces.setdefault((node, axis), spaces[source])


def _axes(node: fx.Node) -> list[Axis]:
    """Axes of a parameter's user at which rows may be: its own, and those of its inputs (a contraction loses some)."""
    mine = [(node, axis) for axis in range(rank(node))] if tensor(node) is not None else []
    return mine or [(x, axis) for x in tensor_inputs(node) for axis in range(rank(x))]


def _parameter_uses(graph: fx.Graph) -> dict[fx.Node, set[str]]:
    """Nodes that combine parameters (or values made of parameters alone) with data -> the parameters' names."""
    constant: dict[fx.Node, set[str]] = {}
    uses: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            val = tensor(node)
            constant[node] = {str(node.target)} if isinstance(val, torch.nn.Parameter) or _trains(val) else set()
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            names = set().union(*(constant[x] for x in inputs if x in constant))
            if inputs and all(x in constant for x in inputs):
                constant[node] = names
            elif names:
                uses[node] = names
    return uses


def _trains(val: torch.Tensor | None) -> bool:
    return val is not None and val.requires_grad


def _visual_rows(graph: TaskGraph, facts: TaskFacts, chains: set[Chain]) -> dict[Chain, float]:
    """Chain -> visual rows among its rows, averaged over the example batch."""
    entry = next(n for n in graph.graph.nodes if n.name in (facts.entry, facts.visual.entry))
    mask = visual_mask(graph, facts.visual, entry, facts.demand.tokens)
    counts: dict[Chain, float] = {(): float(facts.visual.count)}
    indices = sorted({index for chain in chains for index in chain})
    try:
        values = dict(zip(indices, evaluate(graph, indices), strict=True)) if indices else {}
    except AnalysisError:  # a selector that reads values, and a model without storage: what the rewrite noted
        return {chain: float(chain[-1].meta[VISUAL_ROWS]) if chain else counts[()] for chain in chains} | counts
    for chain in chains:
        seen = mask
        for index in chain:
            seen = seen.gather(1, values[index].to(seen.device))
        counts[chain] = float(seen.sum(1).double().mean())
    return counts


def sharing_index(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]
) -> float:
    """How alike the tasks were thinned, over the parameters that every task uses before the rewrite.

    For each such parameter: the least over tasks of (profile after / profile before), divided by the greatest; 1 where
    both are 0. Weighted by the parameters' sizes. A task in which a parameter transforms no visual token before the
    rewrite cannot thin it: its ratio counts as 1.

    Args:
        before: task -> profile of the captured graph.
        after: task -> profile of the rewritten graph.
        sizes: parameter name -> number of elements.
    """
    shared = _shared(before)
    total = sum(sizes[name] for name in shared)
    if not total:
        return 1.0
    return sum(sizes[name] * _likeness(_ratios(name, before, after)) for name in shared) / total


def coverage(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]
) -> float:
    """How much visual signal is left: the mean of profile after / profile before over tasks and the parameters that
    transform visual tokens, weighted by the parameters' sizes.
    """
    weighted = [
        (sizes[name], after[task].get(name, 0.0) / share)
        for task, profile in before.items()
        for name, share in profile.items()
        if share > 0
    ]
    total = sum(size for size, _ in weighted)
    return sum(size * ratio for size, ratio in weighted) / total if total else 1.0


def _shared(before: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Parameters that every task uses and at least one passes visual tokens through."""
    common = set.intersection(*(set(profile) for profile in before.values()))
    return sorted(name for name in common if any(profile[name] > 0 for profile in before.values()))


def _ratios(
    name: str, before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> list[float]:
    return [after[t].get(name, 0.0) / before[t][name] if before[t][name] > 0 else 1.0 for t in before]


def _likeness(ratios: list[float]) -> float:
    return 1.0 if max(ratios) == 0 else min(ratios) / max(ratios)

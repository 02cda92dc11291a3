"""Pathway profiles: for each parameter, the share of the visual tokens that it transforms, read off a graph.

The rows of every value are followed through the graph's selections and restores; which of them are visual is counted on
the example batch. Work that no demanded output reads must be gone from the graph already: :func:`lean_graph`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import by_name, rank, tensor, tensor_inputs
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.tensors import tensor_name

from ..analysis.visual import MEETS, visual_mask
from ..emitter import VISUAL_ROWS
from ..pipeline import Pipeline
from ..rewrite.pushdown import PushDown
from ..rewrite.realise import seeds
from ..rules.registry import Axis
from .rows import Chain, row_spaces, visual_rows


@dataclass(frozen=True)
class Pathways:
    """What a graph does with a task's visual tokens.

    Args:
        profile: parameter name -> share of the visual tokens that it transforms, in ``[0, 1]``.
        tokens_per_block: visual rows whose residual each block changes, averaged over the batch.
    """

    profile: Mapping[str, float]
    tokens_per_block: tuple[float, ...]


def lean_graph(graph: TaskGraph, facts: TaskFacts) -> TaskGraph:
    """A captured graph without the work that no demanded output reads: what profiles are read off and measured on."""
    return Pipeline([*seeds(facts, (), exact=True), PushDown()]).run_task(graph, facts)


def pathways(graph: TaskGraph, facts: TaskFacts) -> Pathways:
    """Profile a graph from which work that nobody demands is gone."""
    spaces = row_spaces(graph.graph, facts)
    visual = visual_counts(graph, facts, set(spaces.values()), padding=False)
    count = facts.visual.mean
    profile: dict[str, float] = {}
    branch = set(facts.visual.branch)
    for node, operands in parameter_uses(graph.graph).items():
        spaces_here = [spaces[axis] for axis in _axes(node) if axis in spaces]
        rows = max((visual[s] for s in spaces_here), default=count if node.name in branch else 0)
        for operand, names in operands.items():
            # where text and visual rows meet, a parameter's own rows (a token between them) are of one kind
            meets = node.name == facts.visual.entry and node.target in MEETS and operand.name not in branch
            for name in names:
                profile[name] = max(profile.get(name, 0.0), 0.0 if meets else rows / count)
    nodes = by_name(graph.graph)
    ends = [nodes.get(block.end) for block in facts.blocks]
    per_block = tuple(visual[spaces[end, 1]] if end is not None and (end, 1) in spaces else 0.0 for end in ends)
    return Pathways(profile, per_block)


def _axes(node: fx.Node) -> list[Axis]:
    """Axes of a parameter's user at which rows may be: its own, and those of its inputs (a contraction loses some)."""
    mine = [(node, axis) for axis in range(rank(node))] if tensor(node) is not None else []
    return mine or [(x, axis) for x in tensor_inputs(node) for axis in range(rank(x))]


def parameter_values(graph: fx.Graph) -> dict[fx.Node, set[str]]:
    """Attributes, and values made of attributes and sizes alone -> the names of the parameters among them."""
    found: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = {tensor_name(node)} if _trains(tensor(node)) else set()
        elif node.op == "call_function":
            inputs = tensor_inputs(node)
            if inputs and all(x in found for x in inputs):
                found[node] = set().union(*(found[x] for x in inputs))
    return found


def parameter_uses(graph: fx.Graph) -> dict[fx.Node, dict[fx.Node, set[str]]]:
    """Nodes that combine parameters with data -> the operands made of parameters alone -> the parameters' names."""
    values = parameter_values(graph)
    uses: dict[fx.Node, dict[fx.Node, set[str]]] = {}
    for node in graph.nodes:
        operands = {x: values[x] for x in node.all_input_nodes if values.get(x)}
        if node.op == "call_function" and node not in values and operands:
            uses[node] = operands
    return uses


def _trains(val: torch.Tensor | None) -> bool:
    return isinstance(val, torch.nn.Parameter) or (val is not None and val.requires_grad)


def visual_counts(graph: TaskGraph, facts: TaskFacts, chains: set[Chain], padding: bool = True) -> dict[Chain, float]:
    """Chain -> visual rows among its rows, averaged over the example batch; ``padding``: those that are padding as well."""
    entry = next(n for n in graph.graph.nodes if n.name in (facts.entry, facts.visual.entry))
    mask = visual_mask(graph, facts.visual, entry, facts.demand.tokens)
    counts: dict[Chain, float] = {(): float(facts.visual.mean)}
    try:
        found = visual_rows(graph, mask, chains, padding)
    except AnalysisError:  # a selector that reads values, and a model without storage: what the rewrite noted
        return {chain: float(chain[-1].meta[VISUAL_ROWS]) if chain else counts[()] for chain in chains} | counts
    return counts | {chain: float(rows.sum(1).double().mean()) for chain, rows in found.items()}


def sharing_index(
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
    copied: Collection[str] = (),
) -> float:
    """How alike the tasks were thinned, over the parameters that every task uses before the rewrite.

    For each such parameter: the least over tasks of (profile after / profile before), divided by the greatest; 1 where
    both are 0. Weighted by the parameters' sizes. A task in which a parameter transforms no visual token before the
    rewrite cannot thin it: its ratio counts as 1.

    Args:
        before: task -> profile of the captured graph.
        after: task -> profile of the rewritten graph.
        sizes: parameter name -> number of elements.
        copied: parameters of which a task's visual tokens use a copy of their own: these count 0.
    """
    shared = _shared(before)
    total = sum(sizes[name] for name in shared)
    if not total:
        return 1.0
    alike = {name: 0.0 if name in copied else _likeness(_ratios(name, before, after)) for name in shared}
    return sum(sizes[name] * alike[name] for name in shared) / total


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

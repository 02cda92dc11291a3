"""Where a node of a task's graph belongs: its module, its block, and the kind of work that it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import fx

from tokgraph.ir.blocks import Block
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import ancestors, by_name, descendants, module_path, tensor, tensor_inputs
from tokgraph.ir.program import TaskGraph
from tokgraph.ops import NAMESPACE, OF_MODELS

from ..cost.attribution import Locator
from ..rules import axis_map, traits

aten = torch.ops.aten

Kind = Literal["attention", "ffn", "norm", "head", "encoder", "input", "drop", "optimizer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACE = "tokgraph"
"""Key of ``node.meta["custom"]``, which torch.export keeps and writes to files: the node's place, as a dict."""


@dataclass(frozen=True)
class Place:
    """Where a node belongs.

    Args:
        node: name of the node in the task's graph.
        module: module path, ``""`` for the task's own forward.
        block: the decoder block, ``None`` outside blocks.
        kind: ``"attention"`` (with its projections and residual addition), ``"ffn"``, ``"norm"``, ``"head"`` (what follows
            the last block, the loss with it), ``"encoder"`` (makes visual rows), ``"input"`` (the rest before the first
            block), ``"drop"`` (chooses, drops and restores rows), ``"optimizer"`` (updates parameters).
    """

    node: str
    module: str
    block: int | None
    kind: Kind


def place_of(node: fx.Node) -> dict[str, Any] | None:
    """The place that a node carries, with ``"phase"`` where it was lowered, or ``None``."""
    custom = node.meta.get("custom")
    found = custom.get(PLACE) if isinstance(custom, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else None


def places_of(graph: TaskGraph) -> dict[str, Place]:
    """Name -> place of every call that carries one: all calls of a graph that was analysed, rewritten, or loaded."""
    found = {}
    for node in graph.graph.nodes:
        place = place_of(node) if node.op == "call_function" else None
        if place is not None:
            found[node.name] = Place(node.name, place["module"], place["block"], place["kind"])
    return found


def mark_places(graph: TaskGraph, facts: TaskFacts) -> None:
    """Let every call of a captured or rewritten graph carry its place.

    Args:
        graph: the task's graph.
        facts: facts of the captured graph.
    """
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    locate = Locator(graph, facts)
    kinds = _Kinds(graph.graph, facts.blocks, locate)
    inside = [node for node in calls if locate.of(node)[0] == "block"]
    before = ancestors(inside)
    for node in calls:
        region, block = locate.of(node)
        if region == "head" and node in before and tensor(node) is not None:
            region = "input"  # as masks that are made late
        kind: Kind = "drop" if _moves_rows(node) else kinds.of(node, block) if region == "block" else region
        place = Place(node.name, module_path(node), block, kind)
        node.meta["custom"] = {**node.meta.get("custom", {}), PLACE: asdict(place)}


def carried(place: Place, phase: str) -> dict[str, Any]:
    """What a lowered node carries of a place."""
    return {PLACE: {**asdict(place), "phase": phase}}


def _moves_rows(node: fx.Node) -> bool:
    """Whether a rewrite made the node, and not to compute values: operators of ours, and arithmetic on masks and indices."""
    if node.target in OF_MODELS:
        return False
    if getattr(node.target, "namespace", "") == NAMESPACE:
        return True
    val = tensor(node)
    return "made_by" in node.meta and (val is None or not val.is_floating_point())


class _Kinds:
    """Tells attention, feed-forward and norms of a block apart by their places in the graph, not by names.

    What an attention's output is computed from, and what follows up to the first addition to the stream, is attention;
    the rest is feed-forward. What comes before the first contraction of either is its norm.
    """

    def __init__(self, graph: fx.Graph, blocks: Iterable[Block], locate: Locator) -> None:
        self._known: dict[fx.Node, Kind] = {}
        nodes = by_name(graph)
        members: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            region, index = locate.of(node) if node.op == "call_function" else ("input", None)
            if region == "block" and index is not None:
                members.setdefault(index, []).append(node)
        for block in blocks:
            outputs = [nodes[a.output] for a in block.attention if a.output in nodes]
            self._divide(members.get(block.index, []), outputs)

    def of(self, node: fx.Node, block: int | None) -> Kind:
        return self._known.get(node, "ffn")

    def _divide(self, members: list[fx.Node], outputs: list[fx.Node]) -> None:
        if not members:
            return
        inside, first, end = set(members), members[0], members[-1]  # a block is looked at, not all before and after it
        before, after = ancestors(outputs, first) & inside, descendants(outputs[-1:], end) & inside
        join = next((n for n in members if _is_addition(n) and n in after and _other_operand(n, after, inside)), None)
        last = members.index(join) + 1 if join is not None else len(members)
        attention = before | (set(members[:last]) & descendants(outputs, end))
        for part, kind in ((attention, "attention"), (inside - attention, "ffn")):
            mixed: set[fx.Node] = set()
            for node in members:
                if node in part:
                    if _contracts(node) or any(x in mixed for x in node.all_input_nodes):
                        mixed.add(node)
                    norm = traits(node.target).normalises or (node not in mixed and node is not join and _is_real(node))
                    self._known[node] = "norm" if norm else kind  # type: ignore[assignment]


def _is_real(node: fx.Node) -> bool:
    val = tensor(node)
    return val is not None and val.is_floating_point()


def _is_addition(node: fx.Node) -> bool:
    return node.target in (aten.add.Tensor, aten.add_.Tensor)


def _other_operand(node: fx.Node, after: set[fx.Node], inside: set[fx.Node]) -> bool:
    """Whether an addition joins what follows the attention with a value that does not."""
    operands = tensor_inputs(node)
    return any(x in after for x in operands) and any(x not in after and x.op != "get_attr" for x in operands)


def _contracts(node: fx.Node) -> bool:
    described = axis_map(node) if tensor(node) is not None else None
    return described is not None and any(m.kind in ("contraction", "attention", "window") for m in described.mixes)

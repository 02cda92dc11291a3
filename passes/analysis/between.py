"""What is added to the stream between two layers, outside of their modules: to which of the two it belongs.

A cross-attention in a list of its own (``cross[i]`` before ``layers[i]``) lies in no module of a layer. Its number says
which layer it is part of, if all parts of its list agree; a module that is used between all layers, and already before the
first, belongs to the layer after it. What says nothing belongs to the layer before it. An item of the layers' own list is a
layer, whether it lets tokens attend to one another or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from tokgraph.ir.blocks import Between
from tokgraph.ir.node import source_line
from tokgraph.ir.tensors import tensor_name

from .stream import Segment


@dataclass(frozen=True)
class Part:
    """A segment between two layers, with parameters of its own.

    Args:
        segment: the segment.
        before: the segment that mixes tokens before it, ``None`` before the first layer.
        after: the one that mixes tokens after it, ``None`` behind the last layer.
    """

    segment: Segment
    before: Segment | None
    after: Segment | None

    def is_layer(self) -> bool:
        """Whether its module is an item of the list that layers beside it are items of, and is none of these."""
        mine = _list_name(self.segment)
        return (
            bool(parameters(self.segment))
            and self.side() == "neither"
            and any(s is not None and _list_name(s) == mine for s in (self.before, self.after))
        )

    def side(self) -> str:
        """Which layer has its number: ``"before"``, ``"after"``, ``"neither"``; ``"unknown"`` where numbers tell nothing."""
        mine, before, after = (_numbers(s) for s in (self.segment, self.before, self.after))
        if not mine or not (before or after) or (before and after and _match(before, after)):
            return "unknown"
        if _match(mine, before):
            return "before"
        return "after" if _match(mine, after) else "neither"


def belong_after(parts: Iterable[Part]) -> tuple[set[Segment], set[Segment], tuple[Between, ...]]:
    """The segments that belong to the layer after them, those that are layers, and those of which it is not known.

    Args:
        parts: all parts between layers, those before the first and behind the last among them.
    """
    lists: dict[str, list[Part]] = {}
    parts = list(parts)
    layers = {part.segment for part in parts if part.is_layer()}
    for part in parts:
        if part.segment in layers:
            continue
        lists.setdefault(_list_name(part.segment), []).append(part)
    after: set[Segment] = set()
    unsure: list[Between] = []
    for mine in lists.values():
        sides = {part.side() for part in mine} - {"unknown"}
        if sides <= {"after"}:
            ends = {part.after is None for part in mine}
            if sides or (len(mine) > 1 and any(part.before is None for part in mine) and ends == {False}):
                after.update(part.segment for part in mine if part.after is not None)
        elif sides != {"before"}:
            inner = (part for part in mine if part.before is not None and part.after is not None)
            unsure.extend(_told(part) for part in inner if parameters(part.segment))
    return after, layers, tuple(unsure)


def parameters(segment: Segment) -> set[str]:
    """Names of the parameters and buffers that a segment reads."""
    return read_tensors(segment.nodes)


def named_by(segment: Segment) -> set[str]:
    """Names of the parameters that tell where a segment belongs: its own, else those of what is made for it alone, as the
    embeddings that it adds.
    """
    own = parameters(segment)
    if own:
        return own
    inside = {segment.start, *segment.nodes}
    made: set[fx.Node] = set()
    stack = [x for node in segment.nodes for x in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in inside | made and set(node.users) <= inside | made:
            made.add(node)
            stack.extend(node.all_input_nodes)
    return read_tensors(made)


def read_tensors(nodes: Iterable[fx.Node]) -> set[str]:
    """Names of the parameters and buffers that nodes read."""
    return {tensor_name(x) for node in nodes for x in node.all_input_nodes if x.op == "get_attr"}


def _told(part: Part) -> Between:
    node = next(n for n in part.segment.nodes if any(x.op == "get_attr" for x in n.all_input_nodes))
    item = [*_list_name(part.segment).split("."), *map(str, _numbers(part.segment)[:1])]
    return Between(node.name, ".".join(item), source_line(node))


def _path(segment: Segment | None) -> str:
    """What the names of a segment's parameters have in common."""
    names = [name.split(".") for name in sorted(named_by(segment))] if segment is not None else []
    shared = []
    for level in zip(*names, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _numbers(segment: Segment | None) -> tuple[int, ...]:
    return tuple(int(part) for part in _path(segment).split(".") if part.isdigit())


def _list_name(segment: Segment) -> str:
    """The path up to the first number: the list that a segment's module is an item of; its whole path where there is none."""
    path = _path(segment).split(".")
    number = next((i for i, part in enumerate(path) if part.isdigit()), len(path))
    return ".".join(path[:number])


def _match(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return bool(a) and bool(b) and all(x == y for x, y in zip(a, b, strict=False))

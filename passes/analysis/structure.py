"""The static facts of one task, from its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.blocks import Between, Block, Unplaced
from tokgraph.ir.facts import TaskFacts, VisualFlow
from tokgraph.ir.node import ancestors, by_name, module_path, tensor, where
from tokgraph.ir.program import TaskGraph

from ..rules import has_rule
from ..rules.registry import Axis
from .axes import AxisClasses
from .blocks import blocks_of, check_layout, find_blocks, find_unplaced, token_axis
from .cuts import pointwise, within
from .demand import find_demand, find_windows
from .doubts import Doubt, find_doubt
from .flow import computed_from
from .followers import fewer_units, without_behind
from .names import named
from .prompt import find_prompt
from .sides import with_sides
from .states import Layers, Unfound, find_layers
from .stream import residual_segments
from .units import attending, find_units, joined_text
from .visual import find_visual, visual_mask


@dataclass(frozen=True)
class _Structure:
    """A way to divide a graph into blocks.

    Args:
        tokens: the stream's first value and its token axis.
        blocks: the blocks.
        visual: where the visual tokens are.
        unplaced: attentions whose layers are no blocks.
        between: what may be part of either of two blocks.
        unfound: why there are some in ``unplaced``.
        behind: modules of the attentions of layers behind the last block.
    """

    tokens: Axis
    blocks: tuple[Block, ...]
    visual: VisualFlow
    unplaced: tuple[Unplaced, ...] = ()
    between: tuple[Between, ...] = ()
    unfound: str = ""
    behind: tuple[str, ...] = ()


def task_facts(graph: TaskGraph) -> TaskFacts:
    """Analyse one task (everything but its pathway profile).

    Raises:
        AnalysisError: the graph does not show a residual stream with attention, or the visual tokens cannot be found.
    """
    classes = AxisClasses(graph.graph)
    nodes = by_name(graph.graph)
    found = _structure(graph, classes)
    blocks, (entry, _) = found.blocks, found.tokens
    last = [nodes[name] for name in blocks[-1].after]
    visual = visual_mask(graph, found.visual, entry)
    demand = find_demand(graph, visual)
    windows = find_windows(graph, last, classes, visual, demand.reads)
    inside = [nodes[name] for block in blocks for name in block.nodes]
    return TaskFacts(
        name=graph.name,
        entry=entry.name,
        blocks=blocks,
        visual=found.visual,
        demand=demand,
        exits=tuple(dict.fromkeys(user.name for node in last for user in node.users)),
        windows=windows,
        prompt=find_prompt(graph, last, classes, windows),
        token_axes={node.name: axes for node, axes in classes.members(found.tokens).items()},
        dimensions=graph.dimensions,
        unruled=tuple((n.name, str(n.target)) for n in inside if tensor(n) is not None and not has_rule(n)),
        unplaced=found.unplaced,
        between=found.between,
        unfound=found.unfound,
    )


def _structure(graph: TaskGraph, classes: AxisClasses) -> _Structure:
    """The blocks of a task: a chain of single values where one leads through all layers, else cuts.

    A chain's values are dominators, so each is a cut of size one, and finding them takes less time. Where it does not reach
    every attention, or there is none, the layers are cut from each other.

    Raises:
        AnalysisError: neither shows a decoder.
    """
    try:
        chain = _chain(graph, classes)
    except AnalysisError as error:
        found = _cut(graph, classes)
        if isinstance(found, _Structure):
            return found
        if found is None:
            raise
        place = where(found.node)
        raise AnalysisError(
            f"{error.message}; nor can its layers be cut apart at {place.module or place.node}: {found.why}",
            where=error.where or place,
            help=error.help,
        ) from None
    rest = _behind_last(graph.graph, chain, classes)
    if rest is not None:
        why = f"the last layer goes on at {rest.name}, behind the last value that alone leads to the loss"
        doubt: Doubt | None = Doubt(chain.blocks[-1], rest, why)
    else:
        doubt = find_doubt(graph.graph, chain.blocks, classes, chain.tokens, chain.behind)
    if chain.unplaced or doubt is not None:
        found = _cut(graph, classes)
        if isinstance(found, _Structure):
            return found
        if doubt is not None and not chain.unplaced:
            source = where(doubt.node).source
            attending = doubt.block.attention or chain.blocks[0].attention
            unplaced = tuple(Unplaced(a.node, doubt.block.module, source=source) for a in attending)
            return replace(chain, unplaced=unplaced, unfound=doubt.why)
        return chain if found is None else replace(chain, unfound=found.why)
    return chain


def _behind_last(graph: fx.Graph, chain: _Structure, classes: AxisClasses) -> fx.Node | None:
    """What still belongs to the last layer behind the end of a chain: it adds to the stream, or is in the layer's module.

    A loss that reads values inside of the last layer (its router) ends a chain before the layer does.
    """
    last = chain.blocks[-1]
    end = by_name(graph)[last.end]
    live, behind = ancestors([graph.output_node()]), computed_from([end])
    direct = {end}
    node: fx.Node
    numbered = any(part.isdigit() for part in last.module.split("."))  # else it may hold more than the layer
    for node in graph.nodes:
        if node in behind and node in live and node is not end:
            if numbered and within(node, last.module):
                return node
            read = [x for x in node.all_input_nodes if x in behind]
            if pointwise(node) and any(x in direct for x in read):
                others = [x for x in read if x not in direct]
                if not others or not classes.of(node, chain.tokens):
                    direct.add(node)
                elif not _norm_behind(node, others, behind - direct, last):
                    return node
    return None


def _norm_behind(node: fx.Node, others: list[fx.Node], made: set[fx.Node], last: Block) -> bool:
    """Whether rows meet what a module behind the last layer made of them itself, as a norm does.

    Args:
        node: the operator.
        others: what it reads beside the rows.
        made: what is made of the rows, other than element by element.
        last: the last layer.
    """
    module = module_path(node)
    inside = ancestors(others) & made
    return not (last.module + ".").startswith(module + ".") and all(module_path(x) == module for x in inside)


def _chain(graph: TaskGraph, classes: AxisClasses) -> _Structure:
    segments = residual_segments(graph)
    tokens = token_axis(graph, segments, classes)
    blocks, between = find_blocks(segments, classes, tokens)
    blocks = named(blocks)
    _check_tokens(graph, blocks, classes, tokens)
    entry = by_name(graph.graph)[blocks[0].start]
    found = find_unplaced(graph.graph, blocks, classes, tokens)
    unplaced = without_behind(graph.graph, blocks, found)
    behind = tuple(attention.module for attention in found if attention not in unplaced)
    visual = find_visual(graph, entry, classes)
    return _Structure((entry, tokens[1]), blocks, visual, unplaced, between, behind=behind)


def _check_tokens(graph: TaskGraph, blocks: Sequence[Block], classes: AxisClasses, tokens: Axis) -> None:
    """Check that a chain is no tower in front of a decoder, nor a head behind it, where no input says whose tokens count.

    Raises:
        AnalysisError: its rows are not those of which some are text.
    """
    if graph.task.visual is None or graph.task.visual.input is None:
        joined = joined_text(graph, classes, attending(graph))
        if joined and not any(classes.same(tokens, axis) for axis in joined):
            raise AnalysisError(
                f"task {graph.name!r}: the residual stream that was found, of {blocks[0].module or tokens[0].name}, is not "
                f"that of the tokens that text and other content make, which begins at {_begins(joined[0][0])}",
                where=where(tokens[0]),
                help="say where the visual tokens are with visual=tg.VisualTokens.ids(...) or .mask(...), which name an input",
            )


def _begins(node: fx.Node) -> str:
    return " in ".join(filter(None, (node.name, module_path(node))))


def _cut(graph: TaskGraph, classes: AxisClasses) -> _Structure | Unfound | None:
    """The layers as cuts, why there are none, or ``None`` where there are not two attentions to cut apart."""
    units = find_units(graph, classes)
    if units is None or len(units.units) < 2:
        return None
    layers, followers = find_layers(graph.graph, units, classes), frozenset[str]()
    for fewer in fewer_units(graph.graph, units) if isinstance(layers, Unfound) else ():
        found = find_layers(graph.graph, fewer, classes)
        if isinstance(found, Layers):
            layers = found
            followers = frozenset(node.name for unit in units.units[len(fewer.units) :] for node in unit.nodes)
            break
    if isinstance(layers, Unfound):
        return layers
    for node in dict.fromkeys(x for state in layers.states for x in state):
        check_layout(graph, node, classes, layers.tokens)
    # the samples are on the stream's first axis, and may be on another one of the value that showed the tokens
    blocks = named(blocks_of(replace(layers, tokens=(layers.states[0][0], 1)), classes))
    entry = by_name(graph.graph)[blocks[0].start]
    others = find_unplaced(graph.graph, blocks, classes, (entry, 1))
    unplaced = without_behind(graph.graph, blocks, [x for x in others if x.node not in followers])
    behind = tuple(attention.module for attention in others if attention not in unplaced)
    # where there are some, no site is placed as it is
    doubt = None if unplaced else find_doubt(graph.graph, blocks, classes, (entry, 1), behind)
    if doubt is not None:
        return Unfound(doubt.why, doubt.node)
    blocks = with_sides(graph.graph, blocks, classes, (entry, 1))
    return _Structure((entry, 1), blocks, find_visual(graph, entry, classes), unplaced)

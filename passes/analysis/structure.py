"""The static facts of one task, from its graph."""

from __future__ import annotations

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import by_name, tensor
from tokgraph.ir.program import TaskGraph

from ..rules import has_rule
from .axes import AxisClasses
from .blocks import find_blocks, find_unplaced, token_axis
from .demand import find_demand, find_windows
from .prompt import find_prompt
from .stream import residual_segments
from .visual import find_visual, visual_mask


def task_facts(graph: TaskGraph) -> TaskFacts:
    """Analyse one task (everything but its pathway profile).

    Raises:
        AnalysisError: the graph does not show a residual stream with attention, or the visual tokens cannot be found.
    """
    classes = AxisClasses(graph.graph)
    segments = residual_segments(graph)
    nodes = by_name(graph.graph)
    tokens = token_axis(graph, segments, classes)
    blocks, between = find_blocks(segments, classes, tokens)
    entry, last = nodes[blocks[0].start], nodes[blocks[-1].end]
    flow = find_visual(graph, entry, classes)
    visual = visual_mask(graph, flow, entry)
    demand = find_demand(graph, visual)
    windows = find_windows(graph, last, classes, visual, demand.reads)
    inside = [nodes[name] for block in blocks for name in block.nodes]
    return TaskFacts(
        name=graph.name,
        entry=entry.name,
        blocks=blocks,
        visual=flow,
        demand=demand,
        exits=tuple(user.name for user in last.users),
        windows=windows,
        prompt=find_prompt(graph, last, classes, windows),
        token_axes={node.name: axes for node, axes in classes.members(tokens).items()},
        dimensions=graph.dimensions,
        unruled=tuple((n.name, str(n.target)) for n in inside if tensor(n) is not None and not has_rule(n)),
        unplaced=find_unplaced(graph.graph, blocks, classes, tokens),
        between=between,
    )

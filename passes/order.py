"""Puts the nodes of a graph behind what they read, where a pass has left them otherwise."""

from __future__ import annotations

import networkx as nx
from torch import fx


def sort_nodes(graph: fx.Graph) -> None:
    """Move nodes, in place, until each stands behind its inputs; of those that could be next, the one that was first is.

    ``torch.fx.passes.tools_common.stable_topological_sort`` gives the same order in a new graph, and writes code for it
    each time, which takes longer than most passes.

    Raises:
        networkx.NetworkXUnfeasible: nodes read each other in a circle.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    reads = [(x, node) for node in position for x in node.all_input_nodes]
    if all(position[x] < position[node] for x, node in reads):
        return
    data = nx.DiGraph(reads)
    data.add_nodes_from(position)
    last = None
    for node in nx.lexicographical_topological_sort(data, key=position.__getitem__):
        if last is not None and last.next is not node:
            last.append(node)
        last = node

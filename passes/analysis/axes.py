"""Which axes of which values index the same positions: classes of (node, axis) pairs joined by the op rules.

Axes are followed from operator to operator and never recognised by their size, so a sequence length that equals a hidden
size cannot confuse the analysis. Where shapes are symbolic the sizes serve as a check of the rules.
"""

from __future__ import annotations

from collections import defaultdict

import networkx as nx
from torch import fx

from tokgraph.errors import InternalError
from tokgraph.ir.node import dims, same_size, tensor

from ..rules import axis_map
from ..rules.registry import Axis


class AxisClasses:
    """Axes of a graph's values, grouped by the positions they index.

    Args:
        graph: a captured task graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._sets: nx.utils.UnionFind[Axis] = nx.utils.UnionFind()
        for node in graph.nodes:
            self._join(node)

    def _join(self, node: fx.Node) -> None:
        described = axis_map(node) if tensor(node) is not None else None
        if described is None:
            return
        for axis, follows in enumerate(described.rows):
            for source in follows or ():
                self._union((node, axis), source)
        for axis, source in described.aligned:
            self._union((node, axis), source)
        for mix in described.mixes:
            if mix.kind in ("attention", "contraction"):
                for other in mix.axes[1:]:
                    self._union(mix.axes[0], other)

    def _union(self, a: Axis, b: Axis) -> None:
        if dims(a[0])[a[1]] == 1 or dims(b[0])[b[1]] == 1:  # a broadcast axis indexes no positions
            return
        self._sets.union(a, b)

    def same(self, a: Axis, b: Axis) -> bool:
        """Whether two axes index the same positions."""
        return bool(self._sets[a] == self._sets[b])

    def members(self, axis: Axis) -> dict[fx.Node, tuple[int, ...]]:
        """Every node that has an axis of the same class, and which axes.

        Raises:
            InternalError: sizes contradict the rules.
        """
        root, found = self._sets[axis], defaultdict(list)
        for node, dim in list(self._sets):
            if self._sets[node, dim] == root:
                found[node].append(dim)
        size = dims(axis[0])[axis[1]]
        for node, axes in found.items():
            for dim in axes:
                if isinstance(dims(node)[dim], int) and isinstance(size, int) and not same_size(dims(node)[dim], size):
                    raise InternalError(f"axis {dim} of {node.name} was followed to an axis of another size ({size})")
        return {node: tuple(sorted(axes)) for node, axes in found.items()}

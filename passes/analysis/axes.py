"""Which axes of which values index the same positions: classes of (node, axis) pairs joined by the op rules.

Axes are followed from operator to operator and never recognised by their size, so a sequence length that equals a hidden
size cannot confuse the analysis. Where shapes are symbolic the sizes serve as a check of the rules.
"""

from __future__ import annotations

from collections import defaultdict

import networkx as nx
from torch import fx

from tokgraph.errors import InternalError
from tokgraph.ir.node import dims, rank, same_size, tensor

from ..rules import axis_map
from ..rules.registry import Axis, is_one


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

    def of(self, node: fx.Node, axis: Axis) -> tuple[int, ...]:
        """The axes of a node that index the same positions as ``axis``."""
        return tuple(a for a in range(rank(node)) if self.same((node, a), axis))

    def sample_axis(self, node: fx.Node, samples: Axis) -> int | None:
        """The axis of a node that indexes the samples of a batch: the one that follows the stream's, wherever it lies.

        Args:
            node: a value.
            samples: the batch axis of the residual stream.

        Returns:
            ``None`` where no axis, or more than one, follows it. In a graph for one sample only any axis of size 1 will do,
            and where there is none, all that the value holds is of that sample: 0.
        """
        if is_one(*samples):
            return next((axis for axis in range(rank(node) - 2) if is_one(node, axis)), 0)
        found = self.of(node, samples)
        return found[0] if len(found) == 1 else None

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

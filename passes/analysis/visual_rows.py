"""Whose rows are taken for visual: those that come from the visual inputs, and neither text nor learned rows beside them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

import torch
from torch import fx

from tokgraph.errors import AnalysisError
from tokgraph.ir.node import ancestors, argument, axis_argument, descendants, rank, tensor, tensor_inputs, where
from tokgraph.ir.program import TaskGraph

from ..rules import axis_map, traits
from ..rules.registry import Axis, is_one
from .axes import AxisClasses

aten = torch.ops.aten
_CHOOSES = (aten.where.self, aten.masked_scatter.default, aten.index_put.default)
_HELP = "say where the visual tokens are with visual=tg.VisualTokens.ids(...), .mask(...) or .positions(...)"


class VisualRows:
    """Follows the rows of a value back to where they come from, one row from one.

    Args:
        graph: the task graph.
        visual: what is computed from the visual inputs.
        others: what is computed from other inputs.
        classes: the graph's axes.
    """

    def __init__(
        self, graph: TaskGraph, visual: Collection[fx.Node], others: Collection[fx.Node], classes: AxisClasses
    ) -> None:
        self._graph = graph
        self._visual = visual
        self._others = others
        self._classes = classes

    def check(self, meeting: fx.Node, axis: int) -> None:
        """Check what meets text at a node.

        Args:
            meeting: where visual rows and others meet, or the input that is image content as a whole.
            axis: its token axis.

        Raises:
            AnalysisError: some of the rows come from other inputs, or are the model's own beside those of the image.
        """
        seen: set[Axis] = set()
        stack = [(x, j) for x, j in self._operands(meeting, axis) if x in self._visual]
        while stack:
            node, at = stack.pop()
            if (node, at) in seen or node.op != "call_function":
                continue
            seen.add((node, at))
            sources = self._sources(node, at)
            mine = [(x, j) for x, j in sources if x in self._visual]
            if not mine and any(x in self._others for x, _ in sources):
                self._refuse(node, "come from another input, row by row, and have only looked at the image")
            if node.target in _CHOOSES and any(self._is_text(x) for x in tensor_inputs(node)):
                self._refuse(
                    node, "are chosen from rows of another input and those of the image before they meet more text"
                )
            if node.target in _CHOOSES and any(map(self._is_learned, tensor_inputs(node))):
                self._check_mixed(node, at, meeting)
            if node.target is aten.cat.default and at == axis_argument(node, node):
                self._check_joined(node, at, meeting, [x for x, _ in sources if x not in self._visual])
            stack += mine

    def combined(self, node: fx.Node, followed: fx.Node, axis: int) -> bool:
        """Whether a node makes its rows of those of a visual value and of rows that come from other inputs."""
        return any(
            x is not followed and x in self._others and x not in self._visual for x, _ in self._sources(node, axis)
        )

    def refuse_combined(self, node: fx.Node) -> NoReturn:
        """Raise for a node at which all rows, text among them, are combined with visual ones."""
        self._refuse(node, "are rows of another input as well, so which of them are visual cannot be told")

    def refuse_joined(self, node: fx.Node) -> NoReturn:
        """Raise for a node that joins rows to visual ones, where these would not be found again in other batches."""
        self._refuse(node, "have places that depend on sizes which may change")

    def _is_text(self, x: fx.Node) -> bool:
        val = tensor(x)
        return x in self._others and x not in self._visual and val is not None and val.is_floating_point()

    def _check_joined(self, node: fx.Node, axis: int, meeting: fx.Node, beside: list[fx.Node]) -> None:
        if any(x in self._others for x in beside):
            self._refuse(node, "are joined with rows of another input before they meet the text")
        if beside:
            self._check_mixed(node, axis, meeting)

    def _check_mixed(self, node: fx.Node, axis: int, meeting: fx.Node) -> None:
        between = ancestors([meeting]) & descendants([node])
        if not any(self._mixes(n, (node, axis)) for n in between):
            self._refuse(
                node, "are joined with rows of the model's own (learned queries), which never look at the image"
            )

    def _is_learned(self, x: fx.Node) -> bool:
        """Whether a value holds rows of the model's own: parameters, and nothing of the inputs."""
        if x in self._visual or x in self._others or rank(x) < 2:
            return False
        values = (tensor(node) for node in ancestors([x]) if node.op == "get_attr")
        return any(val is not None and val.requires_grad for val in values)

    def _mixes(self, node: fx.Node, rows: Axis) -> bool:
        described = axis_map(node)
        if described is None or traits(node.target).turns:
            return False
        kinds = ("attention", "softmax", "contraction", "scan", "window")
        return any(
            mix.kind in kinds and any(self._classes.same(axis, rows) for axis in mix.axes) for mix in described.mixes
        )

    def _operands(self, meeting: fx.Node, axis: int) -> list[Axis]:
        """What meets at a node, each with the axis of its rows."""
        if meeting.target is aten.cat.default:
            return [(x, axis) for x in argument(meeting, "tensors")]
        if meeting.target is aten.masked_scatter.default:
            source = argument(meeting, "source")
            return [(source, max(rank(source) - 2, 0))]
        if meeting.target is aten.index_put.default:
            values = argument(meeting, "values")
            return [(values, max(rank(values) - 2, 0))]
        return [(x, axis) for x in tensor_inputs(meeting)[1:2] if rank(x) > axis]

    def _sources(self, node: fx.Node, axis: int) -> list[Axis]:
        """Where the rows of an axis come from: of the same index, or, of axes that are joined, cut or merged, in part."""
        described = axis_map(node)
        if described is None or axis >= len(described.rows):
            return []
        if node.target is aten.gather.default and axis == axis_argument(node, node):
            return [(argument(node, "self"), axis)]  # an index says which rows are taken, and has no content
        if node.target is aten.index.Tensor and described.rows[axis]:
            indices: list[fx.Node | None] = argument(node, "indices")
            at = [j for j, index in enumerate(indices) if index is not None]
            if all(x in indices for x, _ in described.rows[axis] or ()):
                return [(argument(node, "self"), at[-1])]
        if described.rows[axis]:
            return list(described.rows[axis] or ())
        if node.target is aten.cat.default:
            return [(x, axis) for x in argument(node, "tensors")]
        if node.target is aten.slice.Tensor:
            return [(tensor_inputs(node)[0], axis)]
        merged = [group.inputs for group in described.groups if axis in group.outputs]
        if merged:
            x = tensor_inputs(node)[0]
            return [(x, j) for group in merged for j in group if not is_one(x, j)][-1:]
        moves = ("layout", "scan", "order", "window")  # pads, rolls, flips, pooling
        return [at for mix in described.mixes if mix.kind in moves for at in mix.axes]

    def _refuse(self, node: fx.Node, why: str) -> NoReturn:
        raise AnalysisError(
            f"task {self._graph.name!r}: rows that visual_inputs= would take for visual {why}",
            where=where(node),
            help=_HELP,
        )

"""Passes that make a freshly exported graph plain: no assertions but on values, no slices or writes that do nothing, one
operator for one meaning.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, axis_argument, call, dims, module_path, same_size, tensor, where

from ..contract import GraphPass
from ..rules.indexing import is_whole_slice_scatter
from ..rules.registry import first_input
from ..rules.shape import is_whole_slice

aten = torch.ops.aten
check = torch.ops.tokgraph.check.default
_STATIC = (
    "_assert_tensor_metadata", "_assert_scalar", "_assert", "sym_constrain_range", "sym_constrain_range_for_size",
    "_check_is_size",
)  # fmt: skip
"""Assertions about types and sizes: what they say holds for the graph, or an operator that needs it says it again."""

_FUSED: dict[object, Callable[..., Any]] = {
    aten.addcmul.default: aten.mul.Tensor, aten.addcdiv.default: aten.div.Tensor, aten.lerp.Scalar: aten.mul.Scalar,
    aten.lerp.Tensor: aten.mul.Tensor, aten.baddbmm.default: aten.bmm.default,
}  # fmt: skip
"""Operator -> the product or quotient in it."""


_OF_SHAPE = (aten.bernoulli.p, aten.normal_functional.default)


def _is_static(node: fx.Node) -> bool:
    if node.op == "call_module":
        return str(node.target).endswith("_guards_fn")
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in _STATIC


@dataclass(frozen=True)
class RemoveAssertions(GraphPass):
    """Removes assertions that export leaves on types and sizes; those on values become checks that say where they are from."""

    name: ClassVar[str] = "remove-assertions"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Erase every assertion on types and sizes, and what only they needed; turn the others into ``tokgraph.check``."""
        graph = graph_module.graph
        for node in reversed(list(graph.nodes)):
            if _is_static(node):
                graph.erase_node(node)
            elif node.target in (aten._assert_async.default, aten._assert_async.msg):
                place = where(node)
                message = argument(node, "assert_msg", "an assertion is false")
                with graph.inserting_before(node):
                    said: tuple[Any, ...] = (message, place.source or "", place.module or "", [], [])
                    call(graph, check, first_input(node), *said, origin=node, made_by=self.name)
                graph.erase_node(node)
            elif node.target is check and not argument(node, "module"):
                node.update_arg(3, module_path(node))
        graph.eliminate_dead_code()


@dataclass(frozen=True)
class RemoveNoOps(GraphPass):
    """Removes slices of a whole axis, writes over a whole axis (``slice_scatter``), whose result is what they write, and
    broadcasts (``broadcast_tensors``, before a loss of two tensors) of a tensor to its own shape.
    """

    name: ClassVar[str] = "remove-no-ops"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace each such call by the input that it equals."""
        removed = 0
        for node in list(graph_module.graph.nodes):
            same = _same_as(node)
            if same is not None:
                node.replace_all_uses_with(same)
                graph_module.graph.erase_node(node)
                removed += 1
        if removed:
            graph_module.graph.eliminate_dead_code()


def _same_as(node: fx.Node) -> fx.Node | None:
    """The input that the node's value is equal to."""
    if node.target is aten.slice.Tensor and tensor(node) is not None and is_whole_slice(node):
        return first_input(node)
    if node.target is aten.slice_scatter.default and is_whole_slice_scatter(node):
        source: fx.Node = argument(node, "src")
        return source if source.meta["val"].dtype is node.meta["val"].dtype else None
    if node.target is operator.getitem and first_input(node).target is aten.broadcast_tensors.default:
        operand: fx.Node = argument(first_input(node), "tensors")[node.args[1]]
        alike = len(dims(operand)) == len(dims(node))
        return operand if alike and all(map(same_size, dims(operand), dims(node))) else None
    return None


@dataclass(frozen=True)
class TypeAsToCast(GraphPass):
    """Replaces ``type_as`` by the cast it is: it reads the type of its second operand, and none of its rows."""

    name: ClassVar[str] = "type-as-to-cast"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace each ``type_as`` by a cast, or by its input where that has the type already."""
        graph = graph_module.graph
        for node in list(graph.nodes):
            if node.target is not aten.type_as.default:
                continue
            x, val = first_input(node), node.meta["val"]
            if x.meta["val"].dtype is not val.dtype:
                with graph.inserting_before(node):
                    x = call(graph, aten._to_copy.default, x, dtype=val.dtype, origin=node, made_by=self.name)
            node.replace_all_uses_with(x)
            graph.erase_node(node)


@dataclass(frozen=True)
class CopiesToViews(GraphPass):
    """Replaces operators that copy what another one views (``transpose_copy``, ``detach_copy``) by that one: in a graph
    without writes it is the same, and torch cannot differentiate all of them. What draws random numbers of the shape of a
    value, and has no derivative, gets it without its gradient.
    """

    name: ClassVar[str] = "copies-to-views"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Retarget every copy of a view; detach what is read for its shape alone."""
        graph = graph_module.graph
        for node in graph.nodes:
            if (view := _viewed(node.target)) is not None:
                node.target = view
            elif node.target in _OF_SHAPE and first_input(node).target is not aten.detach.default:
                with graph.inserting_before(node):
                    x = call(graph, aten.detach.default, first_input(node), origin=node, made_by=self.name)
                node.update_arg(0, x)


@cache
def _viewed(operator_: object) -> object | None:
    """The operator whose view an operator copies."""
    if not isinstance(operator_, torch._ops.OpOverload) or operator_.namespace != "aten":
        return None
    name = operator_._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_copy"), None) if name.endswith("_copy") else None
    view = getattr(packet, operator_._overloadname, None)
    return view if isinstance(view, torch._ops.OpOverload) and view.is_view else None


@dataclass(frozen=True)
class FusedToPlain(GraphPass):
    """Replaces ``addcmul``, ``addcdiv``, ``lerp`` and ``baddbmm`` by the operators they are made of: torch cannot compute
    the shapes of the first where operands broadcast over symbolic sizes, as a pass that changes shapes must, and scores of
    an attention are recognised by their product.
    """

    name: ClassVar[str] = "fused-to-plain"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace each call by ``x + value * (a * b)``, ``x + value * (a / b)``, or ``x + weight * (end - x)``."""
        graph = graph_module.graph
        for node in list(graph.nodes):
            if node.target in _FUSED:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(self._plain(graph, node))
                graph.erase_node(node)

    def _plain(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        def made(target: Callable[..., Any], *args: Any) -> fx.Node:
            return call(graph, target, *args, origin=node, made_by=self.name)

        x = first_input(node)
        if node.target is aten.baddbmm.default:
            product = made(aten.bmm.default, *node.args[1:3])
            scaled = [(y, argument(node, name, 1)) for y, name in ((x, "beta"), (product, "alpha"))]
            terms = [y if factor == 1 else made(aten.mul.Scalar, y, factor) for y, factor in scaled]
            return terms[1] if argument(node, "beta", 1) == 0 else made(aten.add.Tensor, *terms)
        if node.target in (aten.lerp.Scalar, aten.lerp.Tensor):
            weight, way = argument(node, "weight"), made(aten.sub.Tensor, argument(node, "end"), x)
            return made(aten.add.Tensor, x, made(_FUSED[node.target], way, weight))
        term = made(_FUSED[node.target], argument(node, "tensor1"), argument(node, "tensor2"))
        factor = argument(node, "value", 1)
        return made(aten.add.Tensor, x, term if factor == 1 else made(aten.mul.Scalar, term, factor))


@dataclass(frozen=True)
class ViewToReshape(GraphPass):
    """Replaces ``view`` by ``reshape``: export writes ``view`` for the strides it saw, which another device, another
    attention kernel or a narrowed operand need not give.
    """

    name: ClassVar[str] = "view-to-reshape"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Retarget every view."""
        for node in graph_module.graph.nodes:
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default


@dataclass(frozen=True)
class SplitToSlices(GraphPass):
    """Replaces ``split`` and ``chunk`` by one ``slice`` a result: results can then be narrowed one by one."""

    name: ClassVar[str] = "split-to-slices"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace every split whose parts have known sizes."""
        splits = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
        for node in list(graph_module.graph.nodes):
            if node.target in splits:
                _replace_split(graph_module.graph, node, self.name)


def _replace_split(graph: fx.Graph, node: fx.Node, made_by: str) -> None:
    """Replace a split, unless a size is symbolic or a reader takes the results as they come."""
    x = first_input(node)
    dim = axis_argument(node, x)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes) or any(u.target is not operator.getitem for u in node.users):
        return
    for user in list(node.users):
        number = cast(int, user.args[1])
        start = sum(sizes[:number])
        with graph.inserting_before(user):
            part = call(graph, aten.slice.Tensor, x, dim, start, start + sizes[number], origin=user, made_by=made_by)
        user.replace_all_uses_with(part)
        graph.erase_node(user)
    graph.erase_node(node)

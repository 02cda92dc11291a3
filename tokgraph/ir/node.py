"""Reading and making FX nodes: shapes, places for diagnostics, and the one helper that inserts nodes with full metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tokgraph.errors import InternalError, Where

from .frames import places, source_of

Dim = int | sympy.Expr
_NO_MODULE = "_empty_nn_module_stack"
"""What torch.export calls the module of nodes that it makes itself."""


def value(node: fx.Node) -> Any:
    """The node's fake value (a tensor, a symbolic number, or a tuple), ``None`` when it has none."""
    return node.meta.get("val")


def tensor(node: object) -> torch.Tensor | None:
    """The node's fake tensor; the first one of a node with several results; ``None`` for anything else."""
    if not isinstance(node, fx.Node):
        return None
    val = value(node)
    if isinstance(val, (tuple, list)) and val:
        val = val[0]
    return val if isinstance(val, torch.Tensor) else None


def dims(node: fx.Node) -> tuple[Dim, ...]:
    """The node's shape: integers, and sympy expressions where it is symbolic."""
    val = tensor(node)
    if val is None:
        raise InternalError(f"node {node.name} ({node.target}) has no tensor value")
    return sizes_of(val)


def sizes_of(x: torch.Tensor) -> tuple[Dim, ...]:
    """A fake tensor's shape, in numbers and expressions: these can be compared without a guard on what is open."""
    return tuple(d.node.expr if isinstance(d, torch.SymInt) else d for d in x.shape)


def rank(node: fx.Node) -> int:
    """Number of dimensions of the node's tensor."""
    val = tensor(node)
    if val is None:
        raise InternalError(f"node {node.name} ({node.target}) has no tensor value")
    return val.dim()


def same_size(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are known to be equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b) or bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def same_sizes(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes are known to be equal; to compare those of fake tensors would fix sizes that are open."""
    return len(a) == len(b) and all(map(same_size, a, b))


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The node's inputs that are tensors."""
    return [a for a in node.all_input_nodes if tensor(a) is not None]


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by its schema name, wherever the call put it."""
    if name in node.kwargs:
        return node.kwargs[name]
    if isinstance(node.target, torch._ops.OpOverload):
        for position, schema in enumerate(node.target._schema.arguments):
            if schema.name == name:
                if position < len(node.args):
                    return node.args[position]
                return schema.default_value if schema.has_default_value() else default
    return default


def set_argument(node: fx.Node, name: str, new: Any) -> None:
    """Set an argument of an ATen call by its schema name, where the call has it."""
    position = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    if position < len(node.args):
        node.update_arg(position, new)
    else:
        node.update_kwarg(name, new)


def axis_argument(node: fx.Node, of: fx.Node, name: str = "dim") -> int:
    """The axis of ``of`` that an argument of a call names, counted from the front; of a scalar 0."""
    (axis,) = axis_arguments(node, of, name)
    return axis


def axis_arguments(node: fx.Node, of: fx.Node, *names: str) -> list[int]:
    """The axes of ``of`` that arguments of a call name, one or several each, counted from the front."""
    found: list[int] = []
    for given in (argument(node, name) for name in names or ("dim",)):
        if given is not None:
            found += given if isinstance(given, (list, tuple)) else [given]
    return [axis % (rank(of) or 1) for axis in found]


def is_write(node: fx.Node) -> bool:
    """Whether the node writes a value into a tensor that outlives the call: a buffer, or an input."""
    return node.target is torch.ops.aten.copy_.default


def by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """Name -> node of a graph."""
    return {node.name: node for node in graph.nodes}


def module_path(node: fx.Node) -> str:
    """The path of the innermost user module that made the node, ``""`` for the task's own forward."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(stack.values()) if path and not path.startswith(_NO_MODULE)), "")


def module_call(node: fx.Node) -> str:
    """:func:`module_path`, with the number of the call behind each module that is called again, as export counts:
    ``layers.0@1.attention@1``. Of a module that belongs to others than those that call it, the path alone.
    """
    names: list[str] = []
    parts: list[str] = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path and not path.startswith(_NO_MODULE):
            mine, call = path.split("."), key.rpartition("@")[2]
            if mine[: len(names)] != names:
                return module_path(node)
            parts += mine[len(parts) :]
            parts[-1] += f"@{call}" if call != key and call.isdigit() and "@" not in parts[-1] else ""
            names = mine
    return ".".join(parts)


def source_line(node: fx.Node) -> str | None:
    """``file:line`` of the innermost recorded line of the model's code."""
    return where(node).source


def where(node: fx.Node) -> Where:
    """The node's place in the user's program, for a diagnostic."""
    op = str(node.target) if node.op == "call_function" else node.op
    recorded = source_of(places(node.meta.get("stack_trace") or ""))
    return replace(recorded, node=node.name, op=op, module=module_path(node) or None)


def ancestors(nodes: Iterable[fx.Node], since: fx.Node | None = None) -> set[fx.Node]:
    """The given nodes and everything they are computed from, as far as it stands at or after ``since``."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and (since is None or not node < since):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def descendants(
    nodes: Iterable[fx.Node], until: fx.Node | None = None, through: Callable[[fx.Node], bool] = lambda _: True
) -> set[fx.Node]:
    """The given nodes and what is computed from them by nodes that ``through`` allows, if it stands at or before ``until``."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and (until is None or not until < node):
            found.add(node)
            stack.extend(filter(through, node.users))
    return found


def call(
    graph: fx.Graph, target: Callable[..., Any], *args: Any, origin: fx.Node, made_by: str, **kwargs: Any
) -> fx.Node:
    """Insert a call at the graph's insertion point, with value, module stack, stack trace and provenance filled in.

    Args:
        graph: the graph to edit.
        target: an operator.
        args: its arguments; nodes among them must have values.
        origin: the node whose module stack and stack trace the new node gets.
        made_by: name of the pass, kept in ``meta["made_by"]``.
        kwargs: keyword arguments of the operator.
    """
    node = graph.call_function(target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn"):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
    node.meta["made_by"] = made_by
    refresh_value(node)
    return node


def refresh_value(node: fx.Node) -> None:
    """Recompute the fake value of a call from those of its inputs; of many calls: :class:`~tokgraph.ir.values.Values`."""
    node.meta["val"] = computed(node, fake_mode(node.graph))


def computed(node: fx.Node, mode: FakeTensorMode | None) -> Any:
    """The fake value of a call, from those of its inputs, which live in the mode."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    with entered(mode):
        return node.target(*args, **kwargs)  # type: ignore[operator]


@contextmanager
def entered(mode: FakeTensorMode | None) -> Iterator[None]:
    """Run in a fake mode, without its cache: over symbolic sizes, finding what is in it takes longer than computing it.

    Values are made outside of the caller's ``torch.inference_mode()``: they could not be differentiated. Symbols that an
    operator makes for sizes that depend on data belong to nobody here (:func:`forget_fresh_symbols`).
    """
    if mode is None:
        with torch.inference_mode(False):
            yield
        return
    cached, mode.cache_enabled = mode.cache_enabled, False
    sizes = mode.shape_env
    forget_fresh_symbols(mode)
    try:
        with (
            torch.inference_mode(False),
            mode,
            nullcontext() if sizes is None else sizes.ignore_fresh_unbacked_symbols(),
        ):
            yield
    finally:
        mode.cache_enabled = cached


def forget_fresh_symbols(mode: FakeTensorMode | None) -> None:
    """Give up symbols of sizes that depend on data, made by what ran before in the mode: PyTorch would ask whatever runs
    next for them, which did not make them. Conversion to ONNX, for one, runs a graph for its types, and leaves some.
    """
    if mode is not None and mode.shape_env is not None:
        mode.shape_env.pending_fresh_unbacked_symbols.clear()


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that the graph's values live in; operators without tensor inputs need it."""
    for node in graph.nodes:
        if isinstance(val := value(node), FakeTensor):
            return val.fake_mode
    return None


def output_args(graph: fx.Graph) -> list[fx.Node]:
    """The graph's flat outputs."""
    return list(graph.output_node().args[0])  # type: ignore[arg-type]

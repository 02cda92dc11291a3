"""Regions without gradients, kept: what a forward computes under ``torch.no_grad()`` is detached where others read it.

``torch.export`` writes such a region as a call of ``wrap_with_set_grad_enabled``, unless it lies in one of autocast or is one
of ``inference_mode``, and ``run_decompositions`` then forgets its mode. So every call notes the mode when it is traced
(:func:`noted_modes`), and between the two regions are written out, with ``aten.detach`` saying what the mode said.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.proxy import TracerBase

from tokgraph.errors import CaptureError, Where
from tokgraph.ir.node import where

aten = torch.ops.aten
_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast
_DETACH_IN_PLACE = aten.detach_.default
_MODE = "tokgraph.grad_mode"
"""Key of a node's ``meta``: whether gradients were recorded when it was traced."""


@contextmanager
def noted_modes() -> Iterator[None]:
    """Let every node that is traced note whether gradients were being recorded."""
    create = TracerBase.create_node

    def create_node(self: TracerBase, *args: Any, **kwargs: Any) -> fx.Node:
        node = create(self, *args, **kwargs)
        node.meta[_MODE] = torch.is_grad_enabled()
        return node

    TracerBase.create_node = create_node  # type: ignore[method-assign]
    try:
        yield
    finally:
        TracerBase.create_node = create  # type: ignore[method-assign]


def keep_grad_modes(exported: ExportedProgram) -> None:
    """Write the grad-mode regions of a fresh export out, detached.

    Args:
        exported: what ``torch.export.export`` gave, with gradients enabled and modes noted; edited in place.

    Raises:
        CaptureError: a value that carries gradients is changed in place where none are recorded: autograd then lets its
            gradient pass as if nothing had been done, which no functional graph does.
    """
    root = exported.graph_module
    nodes = [node for module in _modules(root) for node in module.graph.nodes]
    if all(_records(node) and node.target is not _GRAD_REGION and not _written(node) for node in nodes):
        return
    root.graph = _Writer(root, _leaves(exported)).graph
    root.recompile()
    for spec, node in zip(exported.graph_signature.output_specs, root.graph.output_node().args[0], strict=True):
        if isinstance(node, fx.Node):
            spec.arg.name = node.name


def _modules(root: fx.GraphModule) -> list[fx.GraphModule]:
    return [m for m in root.modules() if isinstance(m, fx.GraphModule)]


def _leaves(exported: ExportedProgram) -> set[str]:
    """Names of placeholders that may require gradients: parameters, frozen ones as well, and inputs."""
    kinds = (InputKind.PARAMETER, InputKind.USER_INPUT)
    return {spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind in kinds}


class _Writer:
    """Writes a graph anew, region by region.

    Args:
        root: the exported module, or a region of autocast.
        leaves: names of its placeholders that gradients may flow through.
    """

    def __init__(self, root: fx.GraphModule, leaves: set[str]) -> None:
        self.graph = fx.Graph(owning_module=root)
        self._root = root
        self._carries: set[fx.Node] = set()
        """Values that gradients would flow through, if every mode were forgotten."""
        self._blocked: set[fx.Node] = set()
        """Those of them that were computed while no gradients were recorded."""
        self._instead: dict[fx.Node, fx.Node] = {}
        """Value -> the one to read from now on, since it was detached in place."""
        self._detached: dict[fx.Node, fx.Node] = {}
        placeholders = []
        for node in root.graph.find_nodes(op="placeholder"):
            copied = self.graph.node_copy(node)
            placeholders.append(copied)
            if node.name in leaves and _is_float(copied):
                self._carries.add(copied)
        results = self._write(root, placeholders)
        made = self.graph.output(fx.node.map_arg(results, lambda x: self._read(x, True)))
        made.meta.update(root.graph.output_node().meta)
        self.carrying = any(x in self._carries and x.target is not aten.detach.default for x in made.all_input_nodes)

    def _write(self, module: fx.GraphModule, operands: Sequence[Any]) -> Any:
        """Write a module's calls, given what stands for its placeholders; what stands for its results."""
        env: dict[fx.Node, Any] = dict(zip(module.graph.find_nodes(op="placeholder"), operands, strict=True))
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder" or (node.op == "get_attr" and _only_regions(node)):
                continue
            if node.target is _GRAD_REGION:
                _, inner, *given = node.args
                env[node] = self._write(getattr(module, inner.target), fx.node.map_arg(given, env.__getitem__))
            elif node.target is operator.getitem and not isinstance(env[node.args[0]], fx.Node):
                env[node] = env[node.args[0]][node.args[1]]
            elif node.target is _DETACH_IN_PLACE:
                kept = self._read(env[node.args[0]], _records(node))
                env[node] = self._instead[kept] = self._detach(kept)
            else:
                env[node] = self._copy(module, node, env.__getitem__)
        raise AssertionError("a graph without an output")

    def _copy(self, module: fx.GraphModule, node: fx.Node, read: Callable[[fx.Node], Any]) -> fx.Node:
        grad = _records(node)
        copied = self.graph.node_copy(node, lambda x: self._read(read(x), grad))
        if node.op == "get_attr":
            self._take(module, copied)
            return copied
        carrying = any(x in self._carries for x in copied.all_input_nodes)
        if node.target is _AUTOCAST_REGION:
            carrying = self._write_autocast(copied)
        written = _written(copied)
        if written:
            self._check_writes(copied, written, grad)
        if not grad and written:  # what is written must not carry either: the value may be read where gradients are
            for x in copied.all_input_nodes:
                if x in self._carries and x not in written:
                    with self.graph.inserting_before(copied):
                        copied.replace_input_with(x, self._detach(x))
                    carrying = False
        if carrying and not _makes_anew(node):
            made = [copied, *(root for x in written for root in _aliases(x))]
            self._carries.update(x for x in made if _is_float(x))
        if not grad and copied in self._carries:
            self._blocked.add(copied)
        return copied

    def _read(self, x: Any, grad: bool) -> Any:
        """What stands for a value that is read in a mode."""
        if not isinstance(x, fx.Node):
            return x
        while x in self._instead:
            x = self._instead[x]
        return self._detach(x) if grad and x in self._blocked else x

    def _detach(self, x: fx.Node) -> fx.Node:
        if x not in self._detached:
            detached = self._detached[x] = self.graph.call_function(aten.detach.default, (x,))
            detached.meta.update({k: v for k, v in x.meta.items() if k != "unbacked_bindings"})
        return self._detached[x]

    def _write_autocast(self, node: fx.Node) -> bool:
        """Write a region of autocast anew; whether gradients flow through its results."""
        inner = next(x for x in node.args if isinstance(x, fx.Node) and x.op == "get_attr")
        held = getattr(self._root, str(inner.target))
        operands = node.args[node.args.index(inner) + 1 :]
        placeholders = held.graph.find_nodes(op="placeholder")
        leaves = {p.name for p, x in zip(placeholders, operands, strict=True) if x in self._carries}
        written = _Writer(held, leaves)
        setattr(self._root, str(inner.target), fx.GraphModule(held, written.graph))
        return written.carrying

    def _take(self, module: fx.GraphModule, copied: fx.Node) -> None:
        """Let the root hold what a module inside it holds."""
        held = operator.attrgetter(str(copied.target))(module)
        if module is self._root:
            return
        name = f"{str(copied.target).replace('.', '_')}_of_region"
        while hasattr(self._root, name):
            name += "_"
        setattr(self._root, name, held)
        copied.target = name

    def _check_writes(self, node: fx.Node, written: Sequence[fx.Node], grad: bool) -> None:
        """Refuse writes past autograd."""
        for x in written:
            *_, base = aliases = _aliases(x)
            past = not grad or any(a.target is aten.detach.default for a in aliases)
            if past and base in self._carries and base not in self._blocked:
                raise CaptureError(
                    "the forward changes a value in place, past autograd (under torch.no_grad(), through .data or .detach()),"
                    " and gradients flow through that value",
                    where=_where(node),
                    help="compute a new value; to let the gradient pass unchanged, write x + (changed - x).detach()",
                )


def _records(node: fx.Node) -> bool:
    """Whether gradients were recorded when the node was traced."""
    return bool(node.meta.get(_MODE, True))


def _where(node: fx.Node) -> Where:
    """The node's place, in the user's model and not in the module that was exported."""
    found = where(node)
    return replace(found, module=(found.module or "").removeprefix("model").removeprefix(".") or None)


def _makes_anew(node: fx.Node) -> bool:
    """Whether no gradient goes through a call, whatever it reads: it reads shape and type, or detaches."""
    name = getattr(node.target, "_opname", "")
    return node.target is aten.detach.default or name.endswith("_like") or name.startswith("new_")


def _only_regions(node: fx.Node) -> bool:
    return bool(node.users) and all(user.target is _GRAD_REGION for user in node.users)


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return any(
        isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
        for x in (val if isinstance(val, (tuple, list)) else [val])
    )


def _written(node: fx.Node) -> list[fx.Node]:
    """The inputs that a call changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.is_write:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            fx.node.map_arg(given, found.append)
    return found


def _aliases(node: fx.Node) -> list[fx.Node]:
    """A value, what it is a view of, and so on."""
    found = [node]
    while True:
        returns = getattr(getattr(found[-1].target, "_schema", None), "returns", ())
        source = found[-1].args[0] if found[-1].op == "call_function" and found[-1].args else None
        if not (returns and returns[0].alias_info is not None) or not isinstance(source, fx.Node):
            return found
        found.append(source)

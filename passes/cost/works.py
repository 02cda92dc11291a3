"""Cost of every node: FLOPs and bytes of its forward and backward, by running it once on symbolic shapes.

Each distinct call (operator, shapes, what needs a gradient) runs once on fake tensors under ``FlopCounterMode``; the
counter's formulas then give expressions in the graph's symbols. Attention counts as its MATH decomposition, because the
counter knows no CPU flash kernel; its bytes are those of the fused kernel, which never writes the weights.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from tokgraph.errors import AnalysisError
from tokgraph.ir.cost import Work
from tokgraph.ir.evaluate import evaluate, example_leaves
from tokgraph.ir.node import ancestors, argument, entered, fake_mode, tensor, value
from tokgraph.ir.program import TaskGraph, loss_node
from tokgraph.ir.tensors import read
from tokgraph.ir.values import plain

from ..rules import traits
from .operators import MORE, Parts
from .workspace import Workspace, storage_of

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
_SDPA = aten.scaled_dot_product_attention.default
_PROBES: WeakKeyDictionary[FakeTensorMode, dict[Any, Probe]] = WeakKeyDictionary()
"""Capture, by its mode -> what its calls do."""


@dataclass(frozen=True)
class Probe:
    """What one call does, relative to its arguments.

    Args:
        forward: FLOPs.
        backward: FLOPs.
        aliases: for each output tensor the argument that it is a view of, or ``None``.
        saved_arguments: arguments kept for the backward pass.
        saved_outputs: outputs kept for the backward pass.
        saved_bytes: bytes of other tensors kept for the backward pass.
        needs_grad: whether an output requires a gradient.
        passed: arguments whose gradient is that of an output, or a view of it.
        workspace: bytes that the forward and the backward pass take beside all this while they run, on the example batch.
        unknown: whether the forward pass runs, somewhere inside the call, an operator of unknown FLOPs.
    """

    forward: Any
    backward: Any
    aliases: tuple[int | None, ...]
    saved_arguments: frozenset[int]
    saved_outputs: frozenset[int]
    saved_bytes: Any
    needs_grad: bool
    passed: frozenset[int]
    workspace: tuple[int, int]
    unknown: bool


@dataclass(frozen=True)
class Held:
    """What a call holds in memory, and until when.

    Args:
        storage: the node whose storage the result is in: itself, or what it is a view of.
        bytes: of the storage, where it is the call's own.
        saved: storages kept until the call's backward.
        beside: bytes kept until then that are nobody's result.
        gradients: for each input that gets a gradient, whether it is that of the result, or a view of it.
        workspace: bytes in use beside all this while the call, and its backward, runs on the example batch.
    """

    storage: fx.Node
    bytes: Any
    saved: frozenset[fx.Node]
    beside: Any
    gradients: Mapping[fx.Node, bool]
    workspace: tuple[int, int]


@dataclass(frozen=True)
class Counted:
    """The calls of a graph, counted.

    Args:
        works: call -> what it costs.
        held: call -> what it holds in memory.
        uncounted: ``(node, operator)`` of calls that may multiply matrices, themselves or in a part, and whose FLOPs are
            not, or not wholly, known.
    """

    works: dict[fx.Node, Work]
    held: dict[fx.Node, Held]
    uncounted: tuple[tuple[str, str], ...]


def count_nodes(graph: TaskGraph, resize: Callable[[fx.Node, Any], Any] = lambda _, amount: amount) -> Counted:
    """The cost of every call that makes tensors, in expressions over the graph's symbols, for one training step.

    Args:
        graph: the task graph.
        resize: ``(node, amount) -> amount``, what FLOPs and sizes of a node are where its shape does not tell.
    """
    mode = fake_mode(graph.graph) or FakeTensorMode()
    prober, counter = _Prober(mode, example_symbols(graph)), _Counter(graph, resize)
    works, held, uncounted = {}, {}, []
    for node in graph.graph.nodes:
        if node.op == "call_function" and tensors(value(node)):
            probe = prober.probe(node, counter.needs_grad)
            works[node], held[node] = counter.count(node, probe)
            if probe.unknown:
                uncounted.append((node.name, str(node.target)))
    return Counted(works, held, tuple(uncounted))


def node_works(graph: TaskGraph) -> dict[fx.Node, Work]:
    """The cost of every call that makes tensors: :func:`count_nodes` without the rest."""
    return count_nodes(graph).works


def example_symbols(graph: TaskGraph) -> dict[sympy.Symbol, int]:
    """Symbol -> its value in the example batch; sizes that depend on data are found by running what makes them.

    Raises:
        AnalysisError: such a size depends on values without storage.
    """
    found: dict[sympy.Symbol, int] = {}
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node, leaf in zip(placeholders, example_leaves(graph), strict=True):
        for fake, size in zip(_shape(value(node)), _shape(leaf), strict=True):
            if isinstance(fake, sympy.Expr) and fake.free_symbols:
                symbol: Any = next(iter(fake.free_symbols))
                found.setdefault(symbol, int(sympy.solve(fake - size, symbol)[0]))
    makers = [n for n in graph.graph.nodes if n.meta.get("unbacked_bindings")]
    for node, made in zip(makers, evaluate(graph, makers), strict=True):
        for symbol, path in node.meta["unbacked_bindings"].items():
            found[symbol] = int(pytree.key_get(made, path))
    return found


def example_number(graph: TaskGraph) -> Callable[[Any], float]:
    """What an amount in the graph's symbols is in the example batch."""
    symbols = example_symbols(graph)
    return lambda amount: float(amount.xreplace(symbols) if isinstance(amount, sympy.Basic) else amount)


def tensors(val: Any) -> list[torch.Tensor]:
    """The tensors of a node's value."""
    return [x for x in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(x, torch.Tensor)]


def _shape(x: Any) -> tuple[Any, ...]:
    return tuple(plain(size) for size in x.shape) if isinstance(x, torch.Tensor) else ()


def _bytes(x: torch.Tensor) -> Any:
    """Bytes that a tensor has of its own; what it repeats (an expanded axis) counts once."""
    sizes = zip(_shape(x), x.stride(), strict=True)
    return prod((1 if plain(stride) == 0 else size for size, stride in sizes), start=x.element_size())


class _Prober:
    """Runs each distinct call once in a capture: its graphs, rewritten or not, are mostly made of the same calls.

    Args:
        mode: the mode that the values of all graphs of a capture live in.
        example: symbol -> value, for calls that cannot run on symbolic shapes.
    """

    def __init__(self, mode: FakeTensorMode, example: dict[sympy.Symbol, int]) -> None:
        self._mode = mode
        self._example = example
        self._known = _PROBES.setdefault(mode, {})

    def probe(self, node: fx.Node, needs_grad: Callable[[fx.Node], bool]) -> Probe:
        """What the call does, given which of its inputs need gradients."""
        key = (node.target, _key((node.args, node.kwargs), needs_grad))
        if key not in self._known:
            self._known[key] = self._run(node, needs_grad)
        return self._known[key]

    def _run(self, node: fx.Node, needs_grad: Callable[[fx.Node], bool]) -> Probe:
        with _without_trace(self._mode):
            seen = _observe(node, lambda n: _fresh(value(n), needs_grad(n), self._numbers))
            if not (seen.forward or seen.backward or seen.saved_bytes):
                return seen  # no amount that depends on sizes; numbers run much faster than symbols
            try:
                found = _observe(node, lambda n: _fresh(value(n), needs_grad(n), list), followed=False)
            except RuntimeError:  # it asks for the value of a size that depends on data: those of the example batch
                return seen
            return replace(found, workspace=seen.workspace)

    def _numbers(self, sizes: Iterable[Any]) -> list[int]:
        return [_number(sympy.sympify(plain(size)).xreplace(self._example)) for size in sizes]


def _number(size: Any) -> int:
    unknown = sorted(map(str, getattr(size, "free_symbols", ())))
    if unknown:
        raise AnalysisError(
            f"costs cannot be told: the size {unknown[0]} depends on values of the batch, and no operator of the graph "
            "makes it of them",
            help="give what the model makes such sizes of (an image's grid) as plain numbers or NumPy arrays",
        )
    return int(size)


def _key(x: Any, needs_grad: Callable[[fx.Node], bool]) -> Any:
    """A hashable description of an argument: equal ones cost the same."""
    if isinstance(x, fx.Node):
        described = [(_shape(t), tuple(map(plain, t.stride())), t.dtype) for t in tensors(value(x))]
        return (tuple(described), needs_grad(x)) if described else _key(value(x), needs_grad)
    if isinstance(x, (list, tuple)):
        return tuple(_key(item, needs_grad) for item in x)
    if isinstance(x, dict):
        return tuple((name, _key(item, needs_grad)) for name, item in x.items())
    return (type(x).__name__, plain(x))


def _fresh(val: Any, needs_grad: bool, sizes: Callable[[Iterable[Any]], list[Any]]) -> Any:
    """A tensor without storage like ``val``, on its own; other values as they are."""
    if isinstance(val, (tuple, list)):
        return type(val)(_fresh(x, needs_grad, sizes) for x in val)
    if not isinstance(val, torch.Tensor):
        return sizes([val])[0] if isinstance(val, torch.SymInt) else val
    x = torch.empty_strided(sizes(val.shape), sizes(val.stride()), dtype=val.dtype, device=val.device)
    return x.requires_grad_(needs_grad and x.is_floating_point())


def _observe(node: fx.Node, make: Callable[[fx.Node], Any], followed: bool = True) -> Probe:
    made: dict[fx.Node, Any] = {n: make(n) for n in node.all_input_nodes}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
    inputs = [t for n in node.all_input_nodes for t in tensors(made[n])[:1]]
    places = {storage_of(t): i for i, t in enumerate(inputs)}
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with (
        torch.autograd.set_detect_anomaly(False),  # it would look for NaN in tensors that have no values
        sdpa_kernel(SDPBackend.MATH),
        Parts() as parts,
        FlopCounterMode(display=False, custom_mapping=dict(MORE)) as counter,
        # entered last, it sees operators before the counter takes them apart
        Workspace(inputs) if followed and node.target is not _SDPA else nullcontext() as memory,
    ):
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs = tensors(node.target(*args, **kwargs))  # type: ignore[operator]
        forward, unknown = counter.get_total_flops(), parts.unknown
        taken = 0 if memory is None else memory.beside_results()
        ends, starts = [t for t in outputs if t.requires_grad], [t for t in inputs if t.requires_grad]
        found: dict[int, torch.Tensor | None] = {}
        given = [torch.ones_like(t) for t in ends]
        if memory is not None:
            memory.begin()
        if ends:
            found = dict(zip(map(id, starts), torch.autograd.grad(ends, starts, given, allow_unused=True), strict=True))
        backward = counter.get_total_flops() - forward
        taken_back = 0 if memory is None else memory.beside_results()
    results = {storage_of(t): i for i, t in enumerate(outputs)}
    others = {storage_of(t): t for t in kept if storage_of(t) not in places and storage_of(t) not in results}
    return Probe(
        plain(forward),
        plain(backward),
        tuple(places.get(storage_of(t)) for t in outputs),
        frozenset(places[storage_of(t)] for t in kept if storage_of(t) in places),
        frozenset(results[storage_of(t)] for t in kept if storage_of(t) in results),
        sum(_bytes(t) for t in others.values()),
        bool(ends),
        frozenset(i for i, t in enumerate(inputs) if _one_storage(found.get(id(t)), given)),
        (taken, taken_back),
        unknown,
    )


@contextmanager
def _without_trace(mode: FakeTensorMode) -> Iterator[None]:
    """Run in a fake mode, and leave no guard on its symbols: a kernel's guard must not fix a size of the graph."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # prints a traceback where we try again
    disabled, logger.disabled = logger.disabled, True
    try:
        with entered(mode), mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext():
            yield
    finally:
        logger.disabled = disabled


def _one_storage(x: torch.Tensor | None, others: Iterable[torch.Tensor]) -> bool:
    return x is not None and any(storage_of(x) == storage_of(other) for other in others)


class _Counter:
    """Turns probes into work, in graph order: follows views, gradients, and what is kept already.

    Args:
        graph: the task graph.
        resize: as in :func:`node_works`.
    """

    def __init__(self, graph: TaskGraph, resize: Callable[[fx.Node, Any], Any]) -> None:
        self._module = graph.graph_module
        self._resize = resize
        self._trained = ancestors([loss_node(graph)])
        self._grads: set[fx.Node] = set(graph.trained_nodes().values())
        self._roots: dict[fx.Node, fx.Node] = {}
        self._kept: set[fx.Node] = set()

    def needs_grad(self, node: fx.Node) -> bool:
        """Whether a node's value requires a gradient."""
        if node.op == "get_attr":
            found = read(self._module, node)
            return isinstance(found, torch.Tensor) and found.requires_grad
        return node in self._grads

    def count(self, node: fx.Node, probe: Probe) -> tuple[Work, Held]:
        """The work of a call, and what it holds."""
        inputs, outputs = [n for n in node.all_input_nodes if tensors(value(n))], tensors(value(node))
        if probe.needs_grad:
            self._grads.add(node)
        alias = probe.aliases[0] if probe.aliases else None
        part = node.target is operator.getitem  # of a result, which holds its storage
        self._roots[node] = self._root(inputs[alias or 0]) if part or alias is not None else node
        fused = node.target is _SDPA
        mask = _converted_mask(node) if fused else None
        saved_from = [inputs[i] for i in sorted(probe.saved_arguments)]
        if fused and probe.needs_grad:
            saved_from = [x for x in inputs if x is not mask]
        if probe.saved_outputs or (fused and probe.needs_grad):
            saved_from = [*saved_from, node]
        fresh = self._resize(node, _beside_operands(outputs[0], mask) if fused else probe.saved_bytes)
        trains = probe.needs_grad and node in self._trained
        kept = self._keep(saved_from) + fresh if trains else 0
        written = 0 if alias is not None else self._size(node)
        read = 0 if alias is not None else self._read(node, inputs, written)
        if not trains or alias is not None:
            back_read = back_written = 0
        else:
            back_read = written + sum(map(self._size, saved_from)) + fresh
            back_written = sum(self._size(n) for n in inputs if self.needs_grad(n))
        forward, backward = self._resize(node, probe.forward), self._resize(node, probe.backward) if trains else 0
        work = Work(forward, backward, read, written, back_read, back_written, kept)
        storages = frozenset(map(self._root, saved_from)) if trains else frozenset()
        passed = {inputs[i] for i in probe.passed}
        gradients = {n: n in passed for n in inputs if self.needs_grad(n)} if trains else {}
        return work, Held(
            self._root(node), self._size(node), storages, fresh if trains else 0, gradients, probe.workspace
        )

    def _root(self, node: fx.Node) -> fx.Node:
        return self._roots.get(node, node)

    def _read(self, node: fx.Node, inputs: list[fx.Node], written: Any) -> Any:
        if traits(node.target).lookup:
            return written + sum(map(self._size, inputs[1:]))
        return sum(map(self._size, inputs))

    def _keep(self, saved: list[fx.Node]) -> Any:
        """Bytes that these add to what is kept; parameters and inputs are there anyway."""
        new = {self._root(n) for n in saved if self._root(n).op == "call_function"} - self._kept
        self._kept |= new
        return sum(map(self._size, new))

    def _size(self, node: fx.Node) -> Any:
        return self._resize(node, sum(map(_bytes, tensors(value(node)))))


def _converted_mask(attention: fx.Node) -> fx.Node | None:
    """The mask of a fused attention if it is boolean: kernels add one of the operands' type, and keep that."""
    mask = argument(attention, "attn_mask")
    found = tensor(mask)
    return mask if found is not None and found.dtype is torch.bool else None


def _beside_operands(output: torch.Tensor, mask: fx.Node | None) -> Any:
    """Bytes that fused attention keeps beside operands and result: a normaliser for each query and head, a mask."""
    normaliser = prod(_shape(output)[:-1], start=max(4, output.element_size()))
    return normaliser + (prod(_shape(tensor(mask)), start=output.element_size()) if mask is not None else 0)

"""A task's graph as one flat ATen graph whose parameters are inputs, every node of which knows where it comes from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from tokgraph.errors import ExportError, InternalError
from tokgraph.ir.devices import captured_device
from tokgraph.ir.names import STEP
from tokgraph.ir.node import fake_mode, forget_fresh_symbols, is_write, output_args, value, where
from tokgraph.ir.open_sizes import within_reach
from tokgraph.ir.program import COMPACT_OUTPUTS, TIED, TaskGraph, loss_node
from tokgraph.ir.spec import LOSS_KEY
from tokgraph.ir.tensors import CONSTANTS, read, tensor_name

from .decompositions import runtime_decompositions
from .origins import Origins
from .places import PLACE, Place, carried, places_of

aten = torch.ops.aten
STATE, ROWS = "state", "rows"
"""Prefixes of names: inputs that are the state of an optimizer; outputs that are row indices."""


@dataclass(frozen=True)
class Lowered:
    """A graph for a runtime: functional, flat, without attributes.

    Args:
        task: the task's name.
        kind: ``"forward"``, ``"train-step"`` or ``"update-step"``.
        module: placeholders for ``state``, then for ``inputs``; a flat tuple of tensors out. Every node carries its
            :class:`Place` and ``"phase"`` (``"forward"``, ``"backward"`` or ``"update"``) in ``meta["custom"]``.
        state: name -> parameter, buffer or constant, in placeholder order; names are those of the model's ``state_dict``
            where it has them.
        inputs: names of the other inputs.
        outputs: names of the outputs.
        initial: input -> its first value, of inputs that are no inputs of the task (a step counter, optimizer state).
        fixed: position among the graph's outputs -> value, of those that are no tensors and therefore left out.
    """

    task: str
    kind: str
    module: fx.GraphModule
    state: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    initial: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fixed: Mapping[int, Any] = field(default_factory=dict)


class Source:
    """What lowering reads off a task's graph: its tensors, its inputs, and the places of its nodes.

    Args:
        graph: the captured or rewritten graph.
    """

    def __init__(self, graph: TaskGraph) -> None:
        self.graph = graph
        self.places = places_of(graph)
        self.state: dict[str, torch.Tensor] = {}
        self.names: dict[str, str] = {}
        self._collect()
        self.placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self.tensors = [n for n in self.placeholders if isinstance(value(n), torch.Tensor)]
        called = graph.leaf_names()
        self.inputs = tuple(called[n] for n in self.tensors)
        self.trained_inputs = graph.trained_inputs
        self.mode = fake_mode(graph.graph) or FakeTensorMode()
        self._device = captured_device(graph.graph_module)

    def _collect(self) -> None:
        """Tensors by name, the names of one tensor mapped to its first."""
        first: dict[int, str] = {}
        tied = self.graph.graph_module.meta.get(TIED, {})
        for node in self.graph.graph.nodes:
            if node.op == "get_attr":
                found, own = read(self.graph.graph_module, node), tensor_name(node)
                if not isinstance(found, torch.Tensor):
                    raise InternalError(f"{own} is a {type(found).__name__}, no tensor")
                name = first.setdefault(id(found), tied.get(own, own))
                self.names[own] = name
                self.state[name] = found

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that require gradients."""
        return [name for name, x in self.state.items() if isinstance(x, nn.Parameter) and x.requires_grad]

    @property
    def loss(self) -> int:
        """Position of the loss among the graph's outputs."""
        return output_args(self.graph.graph).index(loss_node(self.graph))

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor like ``x`` without values, on the device that the graph is for: the model may be on another one."""
        with self.mode:
            return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=self._device or x.device)

    def interpreter(self, state: Mapping[str, torch.Tensor]) -> Tracer:
        """Runs the graph on ``state``, leaving places on what it calls."""
        return Tracer(self, state)

    def leaves(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """All inputs of the graph, from those that are tensors."""
        given = dict(zip(self.tensors, tensors, strict=True))
        return [given.get(node, value(node)) for node in self.placeholders]

    def output_names(self) -> tuple[str, ...]:
        """Names of the graph's outputs: ``loss``, keys of mappings, ``output_1``, and ``rows/...`` of compact ones."""
        graph, loss = self.graph, self.loss
        positions = pytree.tree_unflatten(list(range(graph.out_spec.num_leaves)), graph.out_spec)
        paths = [_path_name(path) for path, _ in pytree.tree_flatten_with_path(positions)[0]]
        names = [LOSS_KEY if i == loss else name for i, name in enumerate(paths)]
        rows = {position: names[leaf] for leaf, position in graph.graph_module.meta.get(COMPACT_OUTPUTS, {}).items()}
        count = len(output_args(graph.graph))
        return (*names, *(f"{ROWS}/{rows[i]}" if i in rows else f"extra_{i}" for i in range(len(names), count)))


class Tracer(fx.Interpreter):
    """Runs a task's graph so that what it traces carries the places of the nodes it comes from.

    Args:
        source: the graph.
        state: name -> tensor to run on.
    """

    def __init__(self, source: Source, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__(source.graph.graph_module)
        self._source = source
        self._state = state
        self._origins: Origins[Place | None] = Origins()

    def fetch_attr(self, target: str) -> Any:
        """The tensor that stands for an attribute."""
        return self._state[self._source.names[tensor_name(target)]]

    def run_node(self, n: fx.Node) -> Any:
        """The node's result."""
        if is_write(n):  # into an input: there is no one to see it
            return None
        place = self._source.places.get(n.name)
        with fx_traceback.set_current_meta(n), self._origins.recording(place):
            fx_traceback.current_meta["custom"] = carried(place, "forward") if place else {}
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            try:
                return getattr(self, n.op)(n.target, args, kwargs)
            except GuardOnDataDependentSymNode as error:
                raise ExportError(
                    f"task {self._source.graph.name!r}: {n.target} asks for a size that depends on values in the batch",
                    where=where(n),
                    help="work such sizes out before the forward (Python numbers, NumPy arrays), or give it what they make",
                ) from error

    def mark_backward(self, loss: torch.Tensor) -> None:
        """Let what autograd runs for ``loss`` carry the places of the nodes whose gradients it computes."""
        for function, place in self._origins.functions(loss):
            function.register_prehook(self._marker(place))

    @staticmethod
    def _marker(place: Place | None) -> Callable[[Any], None]:
        return lambda _: mark(place, "backward")


def mark(place: Place | None, phase: str) -> None:
    """Let what is traced from here on carry a place; where none is known, it goes on carrying the last."""
    if place is not None:
        fx_traceback.current_meta["custom"] = carried(place, phase)


def _path_name(path: Sequence[Any]) -> str:
    names = [f"output_{key.idx}" if isinstance(key, pytree.SequenceKey) else str(_key(key)) for key in path]
    return ".".join(names) or "output"


def _key(key: Any) -> Any:
    return key.key if isinstance(key, pytree.MappingKey) else getattr(key, "name", key)


@contextmanager
def _tracing(source: Source, training: bool) -> Iterator[None]:
    """The modes of a trace: values without storage, symbolic sizes, and for training the attention that has gradients."""
    attention = sdpa_kernel(SDPBackend.MATH) if training else nullcontext()
    grad = torch.enable_grad() if training else torch.no_grad()
    inference = torch.inference_mode(False)  # that of a caller, in which nothing is recorded
    sizes = within_reach(source.mode)
    forget_fresh_symbols(source.mode)
    with sizes, inference, attention, fx_traceback.preserve_node_meta(), source.mode, enable_python_dispatcher(), grad:
        yield


def trace(
    function: Callable[..., Sequence[torch.Tensor]],
    source: Source,
    extra: Mapping[str, torch.Tensor],
    decompositions: Mapping[Any, Callable[..., Any]],
    *,
    training: bool,
    trained: Collection[str] = (),
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """Trace ``function(state, *tensors, **extra)`` into a flat functional graph.

    Args:
        function: what to trace; ``state`` maps names to tensors, ``tensors`` are the task's inputs.
        source: the graph it runs.
        extra: further inputs, after the task's.
        decompositions: operator -> function to trace instead.
        training: below autograd, attention as plain operators; else above it, operators as they are in the graph.
        trained: names in the state, among the task's inputs or the further ones, that gradients are computed of.

    Returns:
        The graph module, and its state: that of ``source`` and the constants that the trace met.

    Raises:
        ExportError: the graph changes a buffer.
    """
    _check_writes(source.graph)
    state = {name: source.fake(x).requires_grad_(training and name in trained) for name, x in source.state.items()}
    inputs = [
        value(node).detach().requires_grad_() if training and name in trained else value(node)
        for name, node in zip(source.inputs, source.tensors, strict=True)
    ]
    more = {name: source.fake(x).requires_grad_(training and name in trained) for name, x in extra.items()}

    def flat(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = iter(leaves)
        mine = {name: next(rest) for name in state}
        given = [next(rest) for _ in inputs]
        return tuple(function(mine, *given, **{name: next(rest) for name in more}))

    with _tracing(source, training):
        module = make_fx(
            flat,
            decomposition_table=dict(decompositions),
            tracing_mode="real",
            pre_dispatch=not training,
            _allow_non_fake_inputs=True,
        )(*state.values(), *inputs, *more.values())
    _without_mutations(module.graph)
    _distinct_outputs(module.graph)
    module.graph.eliminate_dead_code()
    names = [*state, *(node.name for node in source.tensors), *more]
    _name_placeholders(module.graph, names, len(state))
    return module, {**source.state, **_lift_constants(module, len(state), source)}


def _without_mutations(graph: fx.Graph) -> None:
    """Replace in-place operators, which some composite operators use on values of their own, by functional ones."""
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        namespace, name = node.target._schema.name.split("::")
        packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
        mutated, overload = node.args[0], node.target._overloadname
        if packet is None or overload not in packet.overloads() or mutated.op == "placeholder" or _is_view(mutated):
            raise InternalError(f"a trace changed {mutated} in place: {node.format_node()}")
        with graph.inserting_after(node):
            made = graph.call_function(getattr(packet, overload), node.args, node.kwargs)
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        mutated.replace_all_uses_with(made, lambda user, made=made: user > made)
        graph.erase_node(node)


def _distinct_outputs(graph: fx.Graph) -> None:
    """Every output becomes a node of its own: runtimes name outputs, and know no output that is an input."""
    output = graph.output_node()
    seen: set[fx.Node] = set()
    outputs = []
    for node in output_args(graph):
        if node in seen or node.op != "call_function":
            with graph.inserting_before(output):
                copy = graph.call_function(aten.clone.default, (node,))
            copy.meta.update(node.meta)
            node = copy
        seen.add(node)
        outputs.append(node)
    output.args = (tuple(outputs),)


def _is_view(node: fx.Node) -> bool:
    return any(r.alias_info is not None for r in getattr(getattr(node.target, "_schema", None), "returns", ()))


def _name_placeholders(graph: fx.Graph, names: list[str], states: int) -> None:
    """Inputs get their names; what stands for state gets out of their way."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    for number, node in enumerate(placeholders[:states]):
        node._rename(f"state_{number}")
    for node, name in zip(placeholders[states:], names[states:], strict=True):
        node._rename(name.replace("/", "_").replace(".", "_"))
    for node in placeholders:
        node.target = node.name


def _lift_constants(module: fx.GraphModule, states: int, source: Source) -> dict[str, torch.Tensor]:
    """Turn attributes, which are constants that the trace met, into placeholders after the other state."""
    found: dict[str, torch.Tensor] = {}
    prefix = source.graph.graph_module.meta.get(CONSTANTS, "_constants")
    last = list(module.graph.find_nodes(op="placeholder"))[states - 1] if states else None
    for node in list(module.graph.find_nodes(op="get_attr")):
        constant = operator.attrgetter(node.target)(module)
        if not isinstance(constant, torch.Tensor):
            raise InternalError(f"a trace met {node.target}, a {type(constant).__name__}")
        name = f"{prefix}.{node.target}"
        while name in source.state:  # a constant that capture lifted
            name += "_"
        if name not in found:
            with module.graph.inserting_after(last):
                last = module.graph.placeholder(f"constant_{len(found)}")
            last.meta["val"] = node.meta.get("val", constant)
            found[name] = constant
            known = last
        node.replace_all_uses_with(known)
        module.graph.erase_node(node)
    module.recompile()
    return found


def _check_writes(graph: TaskGraph) -> None:
    """Refuse graphs that write into buffers: a file holds no tensor that a call may change.

    Raises:
        ExportError: the graph does.
    """
    for node in graph.graph.nodes:
        if is_write(node) and node.args[0].op == "get_attr":
            raise ExportError(
                f"task {graph.name!r} changes the buffer {tensor_name(node.args[0])!r}, which a graph in a file cannot",
                where=where(node),
                help="export it with the model in eval mode, or with what changes the buffer left out of the forward",
            )


def step_counter(source: Source) -> dict[str, torch.Tensor]:
    """The step counter of a graph that draws at random, which becomes an input; empty for others."""
    return {STEP: source.state.pop(STEP).detach().clone()} if STEP in source.state else {}


def lower_forward(graph: TaskGraph, decompositions: Mapping[Any, Callable[..., Any]] | None = None) -> Lowered:
    """Loss and outputs, operators of ours written out, all others as they are in the graph.

    Args:
        graph: the captured or rewritten graph.
        decompositions: operator -> function to trace instead, besides :func:`runtime_decompositions`.
    """
    source = Source(graph)
    return _lower(source, step_counter(source), {**(decompositions or {}), **runtime_decompositions()})


def lower_program(graph: TaskGraph) -> Lowered:
    """The graph itself, operators of ours kept, a step counter among its state: what a file of the program holds."""
    return _lower(Source(graph), {}, {})


def _lower(
    source: Source, counter: Mapping[str, torch.Tensor], decompositions: Mapping[Any, Callable[..., Any]]
) -> Lowered:
    names = source.output_names()
    made = [value(node) if isinstance(node, fx.Node) else node for node in output_args(source.graph.graph)]
    fixed = {i: x for i, x in enumerate(made) if not isinstance(x, torch.Tensor)}
    if any(isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) for x in fixed.values()):
        raise ExportError(
            f"task {source.graph.name!r} returns a number that follows the batch's sizes",
            help="return tensors, and numbers that are the same for every batch",
        )

    def forward(state: Mapping[str, torch.Tensor], *tensors: torch.Tensor, **extra: torch.Tensor) -> Any:
        outputs = source.interpreter({**state, **extra}).run(*source.leaves(tensors), enable_io_processing=False)
        return [x for i, x in enumerate(outputs) if i not in fixed]

    module, state = trace(forward, source, counter, decompositions, training=False)
    inputs = (*source.inputs, *counter)
    kept = tuple(name for i, name in enumerate(names) if i not in fixed)
    return Lowered(source.graph.name, "forward", module, state, inputs, kept, counter, fixed)


def lowered_place(node: fx.Node) -> dict[str, Any]:
    """The place and phase of a node of a lowered graph; of the task's own forward where nothing is known."""
    custom = node.meta.get("custom") or {}
    return dict(custom.get(PLACE) or {"node": "", "module": "", "block": None, "kind": "input", "phase": "forward"})

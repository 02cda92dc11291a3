"""Capture: a task's forward becomes a functional ATen graph over the model's own parameters."""

from __future__ import annotations

import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from itertools import takewhile
from keyword import iskeyword
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from tokgraph.errors import CaptureError, TokgraphError, Where
from tokgraph.ir.collector import collector_paused
from tokgraph.ir.conditions import Autocast
from tokgraph.ir.names import check_tensor_names
from tokgraph.ir.node import value
from tokgraph.ir.open_sizes import REACH
from tokgraph.ir.program import TIED, Dimension, Program, TaskGraph, is_training, model_device, tied_names
from tokgraph.ir.spec import ModelSpec, Task
from tokgraph.ir.tensors import CONSTANTS, constants_prefix, named_tensors, read, target_of, tensor_name

from ..contract import GraphPass
from ..pipeline import Observer, Pipeline
from .autocast import CastsInside, MergeParameterCasts
from .batch_axis import KeepBatchAxis
from .batch_first import BatchFirst
from .buffers import read_before_written, rebound_buffers
from .checks import keeping_checks
from .composites import composites
from .conditions import conditions_of
from .copies import copies
from .devices import check_devices
from .dispatch import RowsInOrder
from .eager import held_against_eager
from .failures import not_traceable
from .flex import flex_traced
from .grad_mode import keep_grad_modes, noted_modes
from .keys_last import KeysLast
from .lines import whole_traces
from .masked_rows import MaskedRows
from .normalize import (
    CopiesToViews,
    FusedToPlain,
    RemoveAssertions,
    RemoveNoOps,
    SplitToSlices,
    TypeAsToCast,
    ViewToReshape,
)
from .numbers import as_tensors, leaves_of, numbers_of, only_computed_with
from .products import products
from .reads import Reads
from .routed_rows import RoutedRows
from .row_averages import RowAverages
from .row_losses import row_losses
from .sinks import SinksToSoftmax
from .whole_rows import WholeRows

log = logging.getLogger(__name__)
CLEANUPS: tuple[type[GraphPass], ...] = (
    RemoveAssertions, CopiesToViews, RemoveNoOps, TypeAsToCast, FusedToPlain, SplitToSlices, ViewToReshape, WholeRows,
    RowsInOrder, RoutedRows, MaskedRows, SinksToSoftmax, KeysLast, KeepBatchAxis, RowAverages, BatchFirst,
)  # fmt: skip
"""The passes that make a fresh export plain, in order."""
IN_AUTOCAST: tuple[type[GraphPass], ...] = (MergeParameterCasts,)
"""The passes after them where a task is captured in a region of autocast."""
_TENSORS = (
    InputKind.PARAMETER,
    InputKind.BUFFER,
    InputKind.CONSTANT_TENSOR,
    OutputKind.BUFFER_MUTATION,
    OutputKind.PARAMETER_MUTATION,
)
"""Inputs and outputs of an exported program that stand for tensors of the model."""
_LOGGERS = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
"""Where torch.export and what it calls log tracebacks of errors that they raise as well."""


def capture(
    spec: ModelSpec,
    *,
    observer: Observer | None = None,
    stop_after: str | None = None,
    autocast: Autocast | None = None,
) -> Program:
    """Capture every task of a model.

    Each task's forward runs on the example batch (models build tables lazily), then ``torch.export`` traces it, non strict,
    with the dimensions of ``Task.dynamic`` symbolic where the model allows it. What the graph computes is then compared with
    the forward (:class:`~tokgraph.ir.fidelity.CaptureCheck`). The model is left as it was.

    Args:
        spec: the model and its tasks.
        observer: called after every pass that cleans up (:data:`CLEANUPS`).
        stop_after: name of the last pass to run; the graphs are then not fit for the stages that follow.
        autocast: capture what the forward does in such a region; a region around this call does not count.

    Raises:
        CaptureError: a forward fails on its example batch, or cannot be traced, or does what a graph would lose, or the
            graph computes something else; or a submodule has a name that PyTorch cannot look up, or is of ``torch.jit``.
        SpecError: a forward returns no scalar loss, a tensor of the model has a name that is reserved, the model is on
            several devices, or the example batch has no values.
    """
    _check_names(spec.model)
    check_devices(spec)
    cleanups = CLEANUPS if autocast is None else (*CLEANUPS, *IN_AUTOCAST)
    clean = Pipeline([cleanup() for cleanup in cleanups], observer, stop_after=stop_after)

    def captured(name: str, task: Task) -> TaskGraph:
        def make(task: Task, reads: Reads) -> TaskGraph:
            return clean.run_task(_capture_task(spec.model, name, task, reads, autocast))

        return held_against_eager(spec.model, name, task, make, autocast, stop_after is None)

    return Program(spec, {name: captured(name, task) for name, task in spec.tasks.items()})


def _check_names(model: nn.Module) -> None:
    """Refuse names of tensors that are tokgraph's, modules that attributes of their parents' classes hide, and those of jit."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{path or 'the model'} is a module of torch.jit ({type(module).__name__}), which torch.export cannot trace",
                where=Where(module=path) if path else None,
                help="use the Python module that it was scripted or traced from; functions under torch.jit.script are fine",
            )
        for name, child in module.named_children():
            if getattr(module, name, child) is not child:
                raise CaptureError(
                    f"the submodule {name!r} of {path or 'the model'} is hidden by an attribute of {type(module).__name__}",
                    where=Where(module=f"{path}.{name}" if path else name),
                    help="give the submodule another name: PyTorch finds submodules by getattr",
                )
    check_tensor_names(named_tensors(model))


class _Forward(nn.Module):
    """The task's forward as a module, so that export sees the model's parameters."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.training = is_training(model)

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        for sizes in _sizes_of_one_name(self.task, inputs):
            for size in sizes[1:]:  # where dimensions are inferred, one of them may have a symbol for each input
                torch._check(size == sizes[0])
        with rebound_buffers(self.model):
            return self.task.forward(self.model, **inputs)


def _sizes_of_one_name(task: Task, inputs: Mapping[str, Any]) -> list[list[Any]]:
    """The sizes of the inputs that the user gave one name."""
    found: dict[str, list[Any]] = {}
    for key, dims in (task.dynamic or {}).items():
        for dim, name in dims.items():
            found.setdefault(name, []).append(inputs[key].shape[dim])
    return list(found.values())


def _capture_task(model: nn.Module, name: str, task: Task, reads: Reads, autocast: Autocast | None) -> TaskGraph:
    device = model_device(model)
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(device, copy=True), dict(task.inputs))
    numbers = (
        numbers_of(inputs) if device.type != "meta" else {}
    )  # without storage, no loss tells whether they may be tensors
    if numbers:
        try:
            graph = _trace(model, name, task, inputs, numbers, reads, autocast)
        except CaptureError:  # the forward needs a number, not a tensor
            pass
        else:
            if only_computed_with(graph, model, task, inputs):
                return graph
    return _trace(model, name, task, inputs, {}, reads, autocast)


def _trace(
    model: nn.Module,
    name: str,
    task: Task,
    inputs: dict[str, Any],
    numbers: Mapping[str, type],
    reads: Reads,
    autocast: Autocast | None,
) -> TaskGraph:
    """The task's graph, the given ones of its numbers as tensors."""
    if numbers:
        task = replace(task, inputs=as_tensors(task.inputs, numbers, torch.device("cpu")))
        inputs = as_tensors(inputs, numbers, model_device(model))
    exported = _export(_Forward(model, task), name, inputs)
    out_spec = exported.call_spec.out_spec
    if out_spec is None:
        raise CaptureError(f"task {name!r}: forward returns nothing")
    module = _plain_module(model, exported, inputs)
    read_before_written(module)
    graph = TaskGraph(name, task, module, pytree.tree_structure(dict(task.inputs)), out_spec)
    if graph.precomputed is not None:
        graph = replace(graph, trained_inputs=graph.precomputed.trained)
    dimensions = _dimensions(graph)
    fixed = [f"{d.input}[{d.dim}] ({d.name} = {d.size})" for d in dimensions if d.symbol is None]
    if fixed:
        log.warning("task %s: the model fixes %s to the example batch", name, ", ".join(fixed))
    graph = replace(graph, dimensions=dimensions, numbers=leaves_of(task.inputs, numbers))
    return replace(graph, conditions=conditions_of(graph, exported, model, reads, autocast))


def _export(wrapper: _Forward, name: str, inputs: dict[str, Any]) -> ExportedProgram:
    """Export with the user's dimension names; where the model's guards rule that out, let export fix what it must."""
    try:
        try:
            return _export_in_reach(wrapper, inputs, named=True)
        except (UserError, AssertionError) as error:
            if not wrapper.task.dynamic or not _is_about_dimensions(error):
                raise
            sizes = _sizes_asked_for(str(error))
            if sizes:  # equal names stay equal sizes then, which labels and logits need
                with suppress(UserError):
                    return _export_in_reach(wrapper, inputs, named=True, sizes=sizes)
            log.info("task %s: named dimensions do not fit the model, inferring them", name)
            return _export_in_reach(wrapper, inputs, named=False)
    except TokgraphError:
        raise
    except Exception as error:
        raise not_traceable(name, error, wrapper.task.forward, wrapper.model) from error


def _is_about_dimensions(error: UserError | AssertionError) -> bool:
    """Whether named dimensions do not fit the model, also where export cannot say so, of a bound that is no whole number."""
    if isinstance(error, UserError):
        return bool(error.error_type is UserErrorType.CONSTRAINT_VIOLATION)
    return "Expected op to be" in str(error)


def _sizes_asked_for(violation: str) -> dict[str, tuple[int, bool]]:
    """Dimension -> a size, and whether it is the only one that the model takes, or the least; where that is all that
    torch.export has against the dimensions. A slice that leaves out a position takes sizes from 3, since 1 is special.
    """
    asked = [line.strip() for line in violation.partition("Suggested fixes:")[2].strip().splitlines()]
    forms = r"(dim_\d+) = (?:(\d+)|Dim\('\1', min=(\d+)(?:, max=\d+)?\))"
    found = [re.fullmatch(forms, line) for line in takewhile(bool, asked)]
    return (
        {match[1]: (int(match[2] or match[3]), match[2] is not None) for match in found if match} if all(found) else {}
    )


def _export_in_reach(wrapper: _Forward, inputs: dict[str, Any], **options: Any) -> ExportedProgram:
    """Export; where PyTorch's own rounding of bounds is in the way, with open sizes of no more than an axis can have."""
    try:
        return _export_once(wrapper, inputs, **options)
    except AssertionError as error:
        if "src_bound" not in str(error):
            raise
        return _export_once(wrapper, inputs, most=REACH, **options)


def _export_once(
    wrapper: _Forward,
    inputs: dict[str, Any],
    named: bool,
    sizes: Mapping[str, tuple[int, bool]] = MappingProxyType({}),
    most: int | None = None,
) -> ExportedProgram:
    dynamic = wrapper.task.dynamic or {}
    wanted = dict.fromkeys(name for of_input in dynamic.values() for name in of_input.values())
    dims: dict[str, Any] = {}
    for i, name in enumerate(wanted):
        identifier = f"dim_{i}"  # Dim takes no other names
        size, fixed = sizes.get(identifier, (None, False))
        dims[name] = Dim.AUTO(max=most) if not named else None if fixed else Dim(identifier, min=size, max=most)

    def dims_of(key: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {dim: dims[name] for dim, name in dynamic.get(key, {}).items()} or None
        return pytree.tree_map(lambda _: None, value)

    shapes = ({key: dims_of(key, value) for key, value in inputs.items()},) if dynamic else None
    with (
        torch.inference_mode(False),
        collector_paused(),
        noted_modes(),
        whole_traces(below=__file__),
        warnings.catch_warnings(),
        _quiet_torch(),
    ):  # which records gradients
        warnings.simplefilter("ignore")
        with keeping_checks(), CastsInside(model_device(wrapper.model).type), flex_traced():
            exported = torch.export.export(wrapper, (inputs,), strict=False, dynamic_shapes=shapes)
        keep_grad_modes(exported)
        _rename_tensors(exported, target_of)
        functional: ExportedProgram = exported.run_decompositions(
            {**composites(), **products(), **row_losses(), **copies()}
        )
        return functional


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep what torch.export prints on failure (a partial graph, advice on its own code) out of the user's way."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    printed = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with redirect_stderr(printed):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if printed.getvalue():
            log.debug("torch.export: %s", printed.getvalue())


def _rename_tensors(exported: ExportedProgram, target: Callable[[str], str]) -> None:
    """Give the tensors of an exported program other names: torch writes them into code, and looks them up by getattr."""
    signature = exported.graph_signature
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.kind in _TENSORS and spec.target is not None:
            spec.target = target(spec.target)
    for tensors in (exported.state_dict, exported.constants):
        for name, x in list(tensors.items()):
            if isinstance(x, torch.Tensor):
                del tensors[name]
                tensors[target(name)] = x


def _plain_module(model: nn.Module, exported: ExportedProgram, inputs: Mapping[str, Any]) -> fx.GraphModule:
    """The exported graph with flat inputs and outputs; it holds the user's objects under the user's names."""
    module = exported.module(check_guards=False)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    mine = named_tensors(model)
    constants = constants_prefix((*mine, *(name for name, _ in model.named_modules() if name), *vars(model)))
    attributes: dict[str, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        elif node.op == "get_attr":
            name, found = _users_tensor(model, mine, tensor_name(node))
            check_tensor_names([name])  # it may be a tensor that is no buffer
            if found is None:  # a constant that export lifted out of the code
                name, found = f"{constants}.{name.replace('.', '_')}", read(module, node)
            node.target = target_of(name)
            attributes[node.target] = found
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), kind) for key, (path, kind) in stack.items()
            }
    placeholders = list(graph.find_nodes(op="placeholder"))
    leaves = {key: len(pytree.tree_leaves(x)) for key, x in inputs.items()}
    if all(count == 1 for count in leaves.values()):  # the graph can use the user's names, or like ones
        for node, key in zip(placeholders, leaves, strict=True):
            node._rename(
                f"{key}_" if key == "self" or iskeyword(key) else key
            )  # which no further argument can be called
            node.target = node.name
    plain = fx.GraphModule(attributes, graph)
    plain.meta[TIED] = tied_names(model)
    plain.meta[CONSTANTS] = constants
    plain.train(is_training(model))
    return plain


def _users_tensor(model: nn.Module, mine: Mapping[str, torch.Tensor], path: str) -> tuple[str, torch.Tensor | None]:
    """The name of a tensor of the exported wrapper in the user's model, and the user's object, if it is one."""
    name = path.removeprefix("model.")
    if name == path or name in mine:
        return name, mine.get(name) if name != path else None
    try:
        return name, operator.attrgetter(name)(model)  # a tensor that is no buffer
    except AttributeError:
        return path, None


def _dimensions(graph: TaskGraph) -> tuple[Dimension, ...]:
    nodes, task = graph.input_nodes(), graph.task
    found = []
    for key, dims in (task.dynamic or {}).items():
        for dim, name in dims.items():
            size = value(nodes[key][0]).shape[dim]
            free = isinstance(size, torch.SymInt) and not size.node.expr.is_number  # export may say "2" of a fixed one
            symbol = str(size.node.expr) if free else None
            found.append(Dimension(key, dim, name, symbol, task.inputs[key].shape[dim]))
    return tuple(found)

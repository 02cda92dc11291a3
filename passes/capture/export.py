"""Capture: a task's forward becomes a functional ATen graph over the model's own parameters."""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tokgraph.errors import CaptureError, TokgraphError, Where
from tokgraph.ir.node import value
from tokgraph.ir.program import TIED, Dimension, Program, TaskGraph, model_device, tied_names
from tokgraph.ir.spec import ModelSpec, Task, split_outputs

from ..contract import GraphPass
from ..pipeline import Observer, Pipeline
from .batch_axis import KeepBatchAxis
from .normalize import RemoveAssertions, RemoveNoOps, SplitToSlices, TypeAsToCast, ViewToReshape

log = logging.getLogger(__name__)
CLEANUPS: tuple[type[GraphPass], ...] = (
    RemoveAssertions, RemoveNoOps, TypeAsToCast, SplitToSlices, ViewToReshape, KeepBatchAxis,
)  # fmt: skip
"""The passes that make a fresh export plain, in order."""


def capture(spec: ModelSpec, *, observer: Observer | None = None, stop_after: str | None = None) -> Program:
    """Capture every task of a model.

    Each task's forward runs once on the example batch (models build tables lazily), then ``torch.export`` traces it, non
    strict, with the dimensions of ``Task.dynamic`` symbolic where the model allows it.

    Args:
        spec: the model and its tasks.
        observer: called after every pass that cleans up (:data:`CLEANUPS`).
        stop_after: name of the last pass to run; the graphs are then not fit for the stages that follow.

    Raises:
        CaptureError: a forward fails on its example batch, or cannot be traced.
        SpecError: a forward returns no scalar loss.
    """
    clean = Pipeline([cleanup() for cleanup in CLEANUPS], observer, stop_after=stop_after)
    return Program(
        spec, {name: clean.run_task(_capture_task(spec.model, name, task)) for name, task in spec.tasks.items()}
    )


class _Forward(nn.Module):
    """The task's forward as a module, so that export sees the model's parameters."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        return self.task.forward(self.model, **inputs)


def _capture_task(model: nn.Module, name: str, task: Task) -> TaskGraph:
    device = model_device(model)
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(device), dict(task.inputs))
    wrapper = _Forward(model, task).train(model.training)
    if device.type != "meta":  # nothing to run without storage; lazily built tables are then traced with the rest
        _warm_up(wrapper, name, inputs)
    exported = _export(wrapper, name, inputs)
    out_spec = exported.call_spec.out_spec
    if out_spec is None:
        raise CaptureError(f"task {name!r}: forward returns nothing")
    module = _plain_module(model, exported, list(inputs))
    dimensions = _dimensions(task, module)
    fixed = [f"{d.input}[{d.dim}] ({d.name} = {d.size})" for d in dimensions if d.symbol is None]
    if fixed:
        log.warning("task %s: the model fixes %s to the example batch", name, ", ".join(fixed))
    return TaskGraph(name, task, module, pytree.tree_structure(dict(task.inputs)), out_spec, dimensions)


def _warm_up(wrapper: _Forward, name: str, inputs: Mapping[str, Any]) -> None:
    """Run the forward once, so that models which build tables lazily have built them."""
    try:
        with torch.no_grad():
            result = wrapper(inputs)
    except TokgraphError:
        raise
    except Exception as error:
        raise CaptureError(
            f"task {name!r}: forward fails on its example batch: {type(error).__name__}: {error}",
            where=_user_frame(error),
            help="call spec.tasks[name].forward(model, **inputs) yourself and make it run first",
        ) from error
    split_outputs(result)


def _export(wrapper: _Forward, name: str, inputs: dict[str, Any]) -> ExportedProgram:
    """Export with the user's dimension names; where the model's guards rule that out, let export fix what it must."""
    try:
        try:
            return _export_once(wrapper, inputs, named=True)
        except UserError as error:
            if not wrapper.task.dynamic or error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
                raise
            log.info("task %s: named dimensions do not fit the model, inferring them", name)
            return _export_once(wrapper, inputs, named=False)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        branch = "data-dependent" in str(error) or "DataDependent" in type(error).__name__
        raise CaptureError(
            f"task {name!r}: torch.export cannot trace its forward: {type(error).__name__}: {first_line}",
            where=_user_frame(error),
            help=(
                "the forward branches on the value of a tensor: replace the branch by torch.where or torch.cond, or pass "
                "the value as a plain Python input"
                if branch
                else "dimensions that a model fixes must not be dynamic; run torch.export.export on the forward to debug"
            ),
        ) from error


def _export_once(wrapper: _Forward, inputs: dict[str, Any], named: bool) -> ExportedProgram:
    dynamic = wrapper.task.dynamic or {}
    dims = {name: Dim(name) if named else Dim.AUTO for of_input in dynamic.values() for name in of_input.values()}

    def dims_of(key: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {dim: dims[name] for dim, name in dynamic.get(key, {}).items()} or None
        return pytree.tree_map(lambda _: None, value)

    shapes = ({key: dims_of(key, value) for key, value in inputs.items()},) if dynamic else None
    with torch.no_grad(), warnings.catch_warnings(), _quiet_torch():
        warnings.simplefilter("ignore")
        exported = torch.export.export(wrapper, (inputs,), strict=False, dynamic_shapes=shapes)
        functional: ExportedProgram = exported.run_decompositions({})
        return functional


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep what torch.export prints on failure (a partial graph, advice on its own code) out of the user's way."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
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


def _user_frame(error: BaseException) -> Where | None:
    """The innermost frame of the traceback that is not inside an installed package."""
    found, trace = None, error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "site-packages" not in file and not file.startswith("<") and file != __file__ and "/lib/python" not in file:
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return Where(source=found) if found else None


def _plain_module(model: nn.Module, exported: ExportedProgram, keys: list[str]) -> fx.GraphModule:
    """The exported graph with flat inputs and outputs; its attributes are the user's objects under the user's names."""
    module = exported.module(check_guards=False)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    attributes: dict[str, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        elif node.op == "get_attr":
            path, own = str(node.target), str(node.target).removeprefix("model.")
            try:
                attributes[own] = operator.attrgetter(own)(model)
            except AttributeError:  # a constant that export lifted out of the code
                own = f"_constants.{path.replace('.', '_')}"
                attributes[own] = operator.attrgetter(path)(module)
            node.target = own
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), kind) for key, (path, kind) in stack.items()
            }
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) == len(keys):  # one leaf an input: the graph can use the user's names
        for node, key in zip(placeholders, keys, strict=True):
            node._rename(key)
            node.target = node.name
    plain = fx.GraphModule(attributes, graph)
    plain.meta[TIED] = tied_names(model)
    plain.train(model.training)
    return plain


def _dimensions(task: Task, module: fx.GraphModule) -> tuple[Dimension, ...]:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = dict(zip(task.inputs, placeholders, strict=False)) if len(placeholders) == len(task.inputs) else {}
    found = []
    for key, dims in (task.dynamic or {}).items():
        for dim, name in dims.items():
            size = value(values[key]).shape[dim] if key in values else None
            symbol = str(size.node.expr) if isinstance(size, torch.SymInt) else None
            found.append(Dimension(key, dim, name, symbol, task.inputs[key].shape[dim]))
    return tuple(found)

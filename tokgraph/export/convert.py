"""A lowered graph as an ONNX model whose weights lie in another file and whose nodes say where they come from."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from tokgraph.errors import ExportError
from tokgraph.ir.node import fake_mode, forget_fresh_symbols
from tokgraph.passes.lower import Lowered, exported_program
from tokgraph.passes.lower.graph import lowered_place

from .files import OTHERS, PREFIX, NodePlace
from .packages import missing

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten
MIN_OPSET, DEFAULT_OPSET = 18, 23
_OWN_TRANSLATIONS = {aten.sort.stable}
_SHAPES = 64
"""Numbers up to which a constant counts as a shape, which is folded."""
_UNKNOWN: Mapping[str, Any] = {"node": "", "module": "", "block": None, "kind": "input", "phase": "forward"}


class _Decomposed(ExportedProgram):
    """A program of operators that have ONNX counterparts, all of them: there is nothing left to decompose."""

    def run_decompositions(self, *args: Any, **options: Any) -> ExportedProgram:
        """The program as it is; tracing it again would take longer than all the rest."""
        return self


def onnx_decompositions(opset: int) -> dict[Any, Callable[..., Any]]:
    """The decompositions that the converter would apply, to be applied while a graph is lowered."""
    from torch.onnx._internal.exporter._decomp import create_onnx_friendly_decomposition_table

    table = create_onnx_friendly_decomposition_table(_implemented(opset))
    return {op: function for op, function in table.items() if op not in _OWN_TRANSLATIONS}


@cache
def _implemented(opset: int) -> set[Any]:
    from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with _quiet():
        return set(get_onnx_implemented_overloads(ONNXRegistry.from_torchlib(opset_version=opset)))


def is_decomposed(lowered: Lowered, opset: int) -> bool:
    """Whether all operators of a graph have ONNX counterparts, so that the converter need not trace it once more."""
    calls = [node.target for node in lowered.module.graph.nodes if node.op == "call_function"]
    known = _implemented(opset) | _OWN_TRANSLATIONS
    return all(call in known for call in calls if isinstance(call, torch._ops.OpOverload))


def to_onnx(
    lowered: Lowered, about: Mapping[str, str], symbols: Mapping[str, str], opset: int = DEFAULT_OPSET
) -> ir.Model:
    """Convert a lowered graph.

    Args:
        lowered: the graph.
        about: what the model says of itself in its metadata.
        symbols: symbol of a size -> the user's name for it.
        opset: version of the ONNX operator set.

    Raises:
        ExportError: an operator has no ONNX counterpart, or two of inputs, weights and outputs have one name.
        DependencyError: the packages that convert are not installed.
    """
    _refuse_equal_names(lowered)
    program = exported_program(lowered, into=_Decomposed if is_decomposed(lowered, opset) else ExportedProgram)
    forget_fresh_symbols(fake_mode(lowered.module.graph))
    with _quiet():
        try:
            converted = torch.onnx.export(
                program,
                input_names=list(lowered.inputs),
                output_names=list(lowered.outputs),
                custom_translation_table={aten.sort.stable: _stable_sort()},
                opset_version=opset,
                optimize=False,  # it would fold transposed copies of weights into the graph
                verbose=False,
            )
        except ImportError as error:
            raise missing(error) from error
        except Exception as error:
            raise _failed(lowered, error) from error
    assert converted is not None
    assert converted.exported_program is not None
    model: ir.Model = converted.model
    nodes = {node.name: lowered_place(node) for node in converted.exported_program.graph.nodes}
    _annotate(model, nodes)
    _rename_values(model)
    _simplify(model)
    _name_sizes(model, symbols)
    model.metadata_props.clear()
    model.metadata_props.update({f"{PREFIX}{key}": value for key, value in about.items()})
    model.producer_name, model.producer_version = "tokgraph", about.get("version", "")
    return model


def _refuse_equal_names(lowered: Lowered) -> None:
    """Inputs, weights and outputs of an ONNX graph have their names in one table; those of a task need not."""
    seen: dict[str, str] = {}
    for name in lowered.inputs:
        if name.startswith(OTHERS) and name not in lowered.initial:
            raise ExportError(
                f"task {lowered.task!r}: an input called {name!r} cannot be told from inputs that tokgraph adds",
                help=f"call it otherwise: names that begin with {', '.join(OTHERS)} are taken in ONNX graphs",
            )
    for what, names in (("an input", lowered.inputs), ("a weight", lowered.state), ("an output", lowered.outputs)):
        for name in names:
            if name in seen:
                raise ExportError(
                    f"task {lowered.task!r}, {lowered.kind}: {name!r} names {seen[name]} and {what}",
                    help="ONNX tells them apart by name only: call the task's input, or what its forward returns, otherwise",
                )
            seen[name] = what


def _rename_values(model: ir.Model) -> None:
    """Give values inside a graph, which the converter named after operators, names that nothing else has."""
    outside = {id(value) for value in model.graph.outputs}
    used = {str(x.name) for x in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs)}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if id(value) in outside:
                continue
            name, number = str(value.name), 0
            while value.name in used:
                number += 1
                value.name = f"{name}_{number}"
            used.add(str(value.name))


def _failed(lowered: Lowered, error: BaseException) -> ExportError:
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    text = str(causes[-1]).splitlines()[0] if str(causes[-1]) else type(causes[-1]).__name__
    return ExportError(
        f"task {lowered.task!r}, {lowered.kind}: conversion to ONNX failed: {text}",
        help="an operator without an ONNX counterpart needs a decomposition (passes/lower/decompositions.py)",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's remarks on packages and metadata that it does not need out of the user's way."""
    loggers = [logging.getLogger(f"torch.onnx._internal.exporter.{name}") for name in ("_registration", "_core")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _stable_sort() -> Any:
    """The translation of a stable sort: ONNX's TopK puts the earlier of equal values first."""
    try:
        import onnx_ir
        from onnxscript import opset18
    except ImportError as error:
        raise missing(error) from error

    op: Any = opset18

    def sort_stable(x: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        dtype = x.dtype
        small = dtype in (onnx_ir.DataType.UINT8, onnx_ir.DataType.BOOL)  # which TopK does not take everywhere
        keys = op.Cast(x, to=onnx_ir.DataType.INT32) if small else x
        size = op.Gather(op.Shape(keys), op.Constant(value_ints=[dim]))
        values, indices = op.TopK(keys, size, axis=dim, largest=bool(descending), sorted=True)
        return (op.Cast(values, to=dtype) if small else values), indices

    return sort_stable


def _annotate(model: ir.Model, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Every ONNX node gets the place of the FX node that it was converted from; what the converter wrote goes."""
    for node in model.graph.all_nodes():
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        place = nodes.get(scopes[-1], _UNKNOWN) if scopes else _UNKNOWN
        node.metadata_props.clear()
        node.metadata_props.update(NodePlace(**place).metadata())
        for output in node.outputs:
            output.metadata_props.clear()
    for held in (*model.graph.inputs, *model.graph.initializers.values()):
        held.metadata_props.clear()


def _simplify(model: ir.Model) -> None:
    """Compute shapes once, and at export where sizes are fixed; weights are left alone."""
    import onnx_ir.passes.common as common
    from onnxscript import optimizer

    weights = set(model.graph.initializers.values())
    common.CommonSubexpressionEliminationPass()(model)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=_SHAPES,
        output_size_limit=_SHAPES,
        should_fold=lambda node: False if weights & set(node.inputs) else None,
    )
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    for node in model.graph.all_nodes():  # what folding made belongs where its inputs come from
        if f"{PREFIX}kind" not in node.metadata_props:
            before = [x.producer() for x in node.inputs if x is not None]
            known = next((n for n in before if n is not None and f"{PREFIX}kind" in n.metadata_props), None)
            place = dict(known.metadata_props) if known is not None else NodePlace(**_UNKNOWN).metadata()
            node.metadata_props.update(place)


def _name_sizes(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Symbolic sizes of inputs, outputs and values get the user's names."""
    import onnx_ir

    def named(text: str) -> str:
        return re.sub(r"\b[su]\d+\b", lambda found: symbols.get(found.group(), found.group()), text)

    values = [*model.graph.inputs, *model.graph.outputs]
    values += [output for node in model.graph.all_nodes() for output in node.outputs]
    for held in {id(x): x for x in values}.values():
        if held.shape is not None:
            dims = [
                d if isinstance(d, int) or d.value is None else onnx_ir.SymbolicDim(named(d.value)) for d in held.shape
            ]
            held.shape = onnx_ir.Shape(dims)


def link_weights(model: ir.Model, folder: Path, files: Mapping[str, tuple[str, Any]]) -> None:
    """Point initializers at tensors in safetensors files of ``folder``.

    Args:
        model: the model.
        folder: where the files are, and where the model will be.
        files: initializer -> (file, :class:`~tokgraph.store.weights.Stored`).
    """
    import onnx_ir

    for name, held in model.graph.initializers.items():
        if name in files and held.const_value is not None:
            file, stored = files[name]
            held.const_value = onnx_ir.ExternalTensor(
                file,
                stored.offset,
                stored.length,
                held.const_value.dtype,
                shape=onnx_ir.Shape(stored.shape),
                name=name,
                base_dir=folder,
            )

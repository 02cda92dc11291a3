"""Loading a saved program: callables over one set of parameters, without the code of the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tokgraph.errors import FileError
from tokgraph.ir.conditions import NumberInput
from tokgraph.ir.names import OWN, input_name
from tokgraph.ir.node import value
from tokgraph.ir.plan import Plan
from tokgraph.ir.program import COMPACT_OUTPUTS, TIED, Dimension, Program, TaskGraph, tied_names
from tokgraph.ir.spec import ModelSpec, Task, VisualTokens, no_forward
from tokgraph.ir.tensors import CONSTANTS, constants_prefix, named_tensors
from tokgraph.passes.lower import captured_form
from tokgraph.runtime import Accelerated

from .archive import read_graph
from .batches import EXAMPLE, read_batches
from .conditions import loaded_conditions
from .manifest import Manifest, SavedTask, read_manifest
from .saving import PLAN, graph_file
from .weights import WEIGHTS, read_weights

log = logging.getLogger(__name__)


def load_accelerated(folder: str | Path) -> Accelerated:
    """Load a program that :meth:`tokgraph.Accelerated.save` wrote.

    The tasks share one set of parameters, as they did; they run and train. The model's code is not needed, nor the
    packages that it needs: ``model`` of the result holds its parameters and buffers, under their names, and nothing else.

    Args:
        folder: where it was saved.

    Raises:
        FileError: the folder holds no program, or a file in it was changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    saved = manifest.versions.get("torch", "of an unknown version")
    if saved.split("+")[0] != torch.__version__.split("+")[0]:
        log.warning("%s was saved with torch %s, this is torch %s", folder, saved, torch.__version__)
    try:
        return _loaded(folder, manifest)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration) as error:
        raise FileError(
            f"the files in {folder} do not belong together: {type(error).__name__}: {str(error)[:200]}",
            help="they were changed; save the program again",
        ) from error


def _loaded(folder: Path, manifest: Manifest) -> Accelerated:
    stored = read_weights(folder / WEIGHTS)
    lacking = [name for name in manifest.state if name not in stored]
    if lacking:
        raise FileError(f"{folder / WEIGHTS} lacks {lacking[0]!r}", help="save the program again")
    tensors = _shared({name: stored[name] for name in manifest.state}, {**manifest.parameters, **manifest.own})
    model = _Parameters({name: x for name, x in tensors.items() if not name.startswith(f"{OWN}.")})
    model.train(manifest.training)
    spec = ModelSpec(model, _tasks(folder, manifest))
    variants = sorted({variant for task in manifest.tasks.values() for variant in task.variants})
    programs = {variant: _program(folder, manifest, variant, spec, tensors) for variant in variants}
    captured = programs.get("baseline")
    return Accelerated(programs["accelerated"], Plan.load(folder / PLAN), captured=captured)


class _Parameters(nn.Module):
    """A model's parameters and buffers under their names, without its code.

    Names that attributes of ``nn.Module`` have are kept in its tables only; its own methods refuse them.

    Args:
        tensors: name -> parameter or buffer.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, x in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                module = module._modules.setdefault(part, _Parameters({}))  # type: ignore[assignment]
            if isinstance(x, nn.Parameter):
                module._parameters[leaf] = x
            else:
                module._buffers[leaf] = x

    def train(self, mode: bool = True) -> _Parameters:
        """Set the mode, which a tensor of that name must not get in the way of."""
        self.__dict__["training"] = mode
        for module in self.children():
            module.train(mode)
        return self


def _shared(tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, bool]) -> dict[str, torch.Tensor]:
    """Tensors as parameters and buffers; names of one tied weight have the same parameter."""
    made: dict[int, torch.Tensor] = {}
    found = {}
    for name, x in tensors.items():
        if id(x) not in made:
            made[id(x)] = nn.Parameter(x, requires_grad=parameters[name]) if name in parameters else x
        found[name] = made[id(x)]
    return found


def _tasks(folder: Path, manifest: Manifest) -> dict[str, Task]:
    examples = read_batches(folder / EXAMPLE)
    tasks = {}
    for name, saved in manifest.tasks.items():
        inputs: dict[str, Any] = {}
        for key, given in saved.inputs.items():
            structure = pytree.treespec_loads(given.structure)
            count = structure.num_leaves
            leaves = [
                given.plain[i] if i in given.plain else examples[name][0][input_name(key, i, count)]
                for i in range(count)
            ]
            inputs[key] = pytree.tree_unflatten(leaves, structure)
        tasks[name] = _task(saved, inputs)
    return tasks


def _task(saved: SavedTask, inputs: dict[str, Any]) -> Task:
    return Task(
        forward=no_forward,
        inputs=inputs,
        dynamic={key: dict(dims) for key, dims in saved.dynamic.items()} or None,
        visual=None if saved.visual is None else VisualTokens(**saved.visual.model_dump()),
        visual_inputs=saved.visual_inputs,
        reads=saved.reads,  # type: ignore[arg-type]
        outputs=saved.outputs,  # type: ignore[arg-type]
    )


def _program(
    folder: Path, manifest: Manifest, variant: str, spec: ModelSpec, tensors: Mapping[str, torch.Tensor]
) -> Program:
    graphs = {}
    for name, saved in manifest.tasks.items():
        exported = read_graph(folder / graph_file(name, variant))
        inputs = spec.tasks[name].inputs
        about = saved.variants[variant]  # type: ignore[index]
        _check_types(folder, exported, about.state, tensors)
        module = captured_form(exported, about.state, tensors, pytree.tree_leaves(dict(inputs)), about.fixed)
        module.train(manifest.training)
        module.meta[TIED] = tied_names(spec.model)
        module.meta[CONSTANTS] = constants_prefix(named_tensors(spec.model))
        module.meta[COMPACT_OUTPUTS] = dict(about.compact)
        in_spec, out_spec = pytree.tree_structure(dict(inputs)), pytree.treespec_loads(saved.result)
        conditions = loaded_conditions(saved.conditions, manifest.training)
        numbers = {i: found.kind for i, found in enumerate(conditions.inputs) if isinstance(found, NumberInput)}
        graph = TaskGraph(name, spec.tasks[name], module, in_spec, out_spec, (), numbers, conditions)
        graph = replace(graph, dimensions=_dimensions(saved, graph), trained_inputs=saved.trained_inputs)
        _check_trained(folder, graph)
        graphs[name] = graph
    return Program(spec, graphs)


def _check_types(
    folder: Path, exported: ExportedProgram, state: Sequence[str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """That the tensors of a graph have the types and shapes that its operators were captured for.

    Raises:
        FileError: one has not.
    """
    for node, name in zip(exported.graph.find_nodes(op="placeholder"), state, strict=False):
        expected, x = value(node), tensors.get(name)
        if x is not None and (x.dtype is not expected.dtype or list(x.shape) != list(expected.shape)):
            raise FileError(
                f"{folder / WEIGHTS}: {name!r} is {x.dtype} of shape {tuple(x.shape)}; the graph takes {expected.dtype} of "
                f"shape {tuple(expected.shape)}",
                help="save the program again",
            )


def _check_trained(folder: Path, graph: TaskGraph) -> None:
    """That gradients are said to flow back into inputs that can have some.

    Raises:
        FileError: another input is named.
    """
    nodes = graph.trained_nodes()
    for name in graph.trained_inputs:
        x = value(nodes[name]) if name in nodes else None
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise FileError(
                f"{folder}: task {graph.name!r} has no input {name!r} that a gradient flows back into",
                help="save the program again",
            )


def _dimensions(saved: SavedTask, graph: TaskGraph) -> tuple[Dimension, ...]:
    """The dimensions, with the symbols that the file's graph has for them."""
    of_input = graph.input_nodes()
    found = []
    for entry in saved.dimensions:
        nodes = of_input[entry.input]
        size = value(nodes[0]).shape[entry.dim] if entry.symbol is not None and len(nodes) == 1 else None
        symbol = str(size.node.expr) if isinstance(size, torch.SymInt) else None
        found.append(Dimension(**{**entry.model_dump(), "symbol": symbol}))
    return tuple(found)

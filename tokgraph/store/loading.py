"""Loading a saved program: callables over one set of parameters, without the code of the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.ir.conditions import NumberInput
from tokgraph.ir.names import OWN, input_name
from tokgraph.ir.node import value
from tokgraph.ir.plan import Plan
from tokgraph.ir.program import COMPACT_OUTPUTS, TIED, Dimension, Program, TaskGraph, tied_names
from tokgraph.ir.spec import ModelSpec, VisualTokens, no_forward
from tokgraph.ir.tensors import CONSTANTS, constants_prefix, named_tensors
from tokgraph.passes.lower import captured_form
from tokgraph.runtime import Accelerated

from .batches import EXAMPLE, read_batches
from .conditions import conditions_from_json
from .saving import PLAN, graph_file, read_manifest, task_of
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
    saved = manifest["versions"]["torch"]
    if saved.split("+")[0] != torch.__version__.split("+")[0]:
        log.warning("%s was saved with torch %s, this is torch %s", folder, saved, torch.__version__)
    stored = read_weights(folder / WEIGHTS)
    tensors = _shared({name: stored[name] for name in manifest["state"]}, {**manifest["parameters"], **manifest["own"]})
    model = _Parameters({name: x for name, x in tensors.items() if not name.startswith(f"{OWN}.")})
    model.train(manifest["training"])
    spec = ModelSpec(model, _tasks(folder, manifest))
    variants = sorted({variant for task in manifest["tasks"].values() for variant in task["variants"]})
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


def _tasks(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    examples = read_batches(folder / EXAMPLE)
    tasks = {}
    for name, described in manifest["tasks"].items():
        inputs: dict[str, Any] = {}
        for key, saved in described["inputs"].items():
            structure, plain = pytree.treespec_loads(saved["structure"]), saved["plain"]
            count = structure.num_leaves
            leaves = [
                plain[str(i)] if str(i) in plain else examples[name][0][input_name(key, i, count)] for i in range(count)
            ]
            inputs[key] = pytree.tree_unflatten(leaves, structure)
        visual = described["visual"]
        if visual is not None:
            span = visual.pop("span")
            visual = VisualTokens(**visual, span=None if span is None else tuple(span))
        tasks[name] = task_of(described, inputs, no_forward, visual)
    return tasks


def _program(
    folder: Path, manifest: Mapping[str, Any], variant: str, spec: ModelSpec, tensors: Mapping[str, torch.Tensor]
) -> Program:
    graphs = {}
    for name, described in manifest["tasks"].items():
        exported = torch.export.load(folder / graph_file(name, variant))
        inputs = spec.tasks[name].inputs
        about = described["variants"][variant]
        fixed = {int(position): value for position, value in about["fixed"].items()}
        module = captured_form(exported, about["state"], tensors, pytree.tree_leaves(dict(inputs)), fixed)
        module.train(manifest["training"])
        module.meta[TIED] = tied_names(spec.model)
        module.meta[CONSTANTS] = constants_prefix(named_tensors(spec.model))
        module.meta[COMPACT_OUTPUTS] = {int(leaf): position for leaf, position in about["compact"].items()}
        in_spec, out_spec = pytree.tree_structure(dict(inputs)), pytree.treespec_loads(described["result"])
        conditions = conditions_from_json(described["conditions"], manifest["training"])
        numbers = {i: found.kind for i, found in enumerate(conditions.inputs) if isinstance(found, NumberInput)}
        graph = TaskGraph(name, spec.tasks[name], module, in_spec, out_spec, (), numbers, conditions)
        graphs[name] = replace(graph, dimensions=_dimensions(described, graph))
    return Program(spec, graphs)


def _dimensions(described: Mapping[str, Any], graph: TaskGraph) -> tuple[Dimension, ...]:
    """The dimensions, with the symbols that the file's graph has for them."""
    of_input = graph.input_nodes()
    found = []
    for entry in described["dimensions"]:
        nodes = of_input[entry["input"]]
        size = value(nodes[0]).shape[entry["dim"]] if entry["symbol"] is not None and len(nodes) == 1 else None
        symbol = str(size.node.expr) if isinstance(size, torch.SymInt) else None
        found.append(Dimension(**{**entry, "symbol": symbol}))
    return tuple(found)

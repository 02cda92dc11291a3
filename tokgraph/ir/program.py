"""The captured program: one ATen FX graph per task, over the parameters of one model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tokgraph.errors import AnalysisError, BatchError

from .conditions import Conditions
from .fidelity import CaptureCheck
from .names import OWN, input_name
from .node import output_args, tensor
from .precomputed import Precomputed
from .spec import ModelSpec, Task
from .tensors import tensor_name

TIED = "tokgraph.tied"
"""Key of ``GraphModule.meta``: ``{name of a tied parameter: its first name in the model}``."""
COMPACT_OUTPUTS = "tokgraph.compact_outputs"
"""Key of ``GraphModule.meta``: ``{output leaf: position of its row index among the outputs}``."""


@dataclass(frozen=True)
class Dimension:
    """A dimension that the user asked to keep dynamic.

    Args:
        input: name of the input.
        dim: which of its dimensions.
        name: the user's name for it.
        symbol: its symbol in the graph, ``None`` where the model fixed it.
        size: its size in the example batch.
    """

    input: str
    dim: int
    name: str
    symbol: str | None
    size: int


@dataclass(frozen=True)
class TaskGraph:
    """One task, captured.

    Args:
        name: the task's name.
        task: what the user wrote.
        graph_module: functional ATen graph: flat placeholders in, a flat tuple out; its parameters are the model's own.
        in_spec: pytree of the inputs mapping.
        out_spec: pytree of what the task's forward returns; its leaves are the first outputs of the graph.
        dimensions: the dimensions asked to be dynamic, and what became of them.
        numbers: leaf of the inputs -> type, of Python numbers that the graph takes as tensors; ``task`` holds them as such.
        conditions: what the graph takes for granted of a call.
        check: how capture held the graph against the user's forward; ``None`` for a graph that it did not make, or not whole.
        trained_inputs: inputs that stand for results of submodules which train: gradients flow back into them.
    """

    name: str
    task: Task
    graph_module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    dimensions: tuple[Dimension, ...] = ()
    numbers: Mapping[int, type] = field(default_factory=dict)
    conditions: Conditions = field(default_factory=Conditions)
    check: CaptureCheck | None = None
    trained_inputs: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.graph_module.graph

    @property
    def precomputed(self) -> Precomputed | None:
        """What runs before the graph; ``None``: nothing, or, in a loaded program, nothing that there is code of."""
        return self.task.forward if isinstance(self.task.forward, Precomputed) else None

    def completed(self, inputs: Mapping[str, Any], aside: bool = False) -> Mapping[str, Any]:
        """Inputs of the user's forward, with those that stand for what is precomputed, which runs where they are missing.

        Args:
            inputs: by name.
            aside: without gradients, and leaving the model's buffers as they are.

        Raises:
            BatchError: what is precomputed is of another structure than in the example batch.
        """
        before = self.precomputed
        if before is None or inputs.keys() - set(before.names) != self.task.inputs.keys() - set(before.names):
            return inputs
        return before.aside(inputs) if aside else before.complete(inputs)

    def flatten(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Inputs in placeholder order; what is precomputed is computed, with its gradients, where it is not given.

        Raises:
            BatchError: the mapping's structure is not that of the example batch.
        """
        inputs = self.completed(inputs)
        ordered = {key: inputs[key] for key in self.task.inputs if key in inputs}
        ordered |= {key: value for key, value in inputs.items() if key not in ordered}
        leaves, spec = pytree.tree_flatten(ordered)
        for leaf in self.numbers:
            if spec == self.in_spec and type(leaves[leaf]) in (int, float):
                leaves[leaf] = number_tensor(leaves[leaf], model_device(self.graph_module))
        if spec != self.in_spec:
            same = inputs.keys() == self.task.inputs.keys()
            raise BatchError(
                self._nested_otherwise(inputs)
                if same
                else f"task {self.name!r} takes the inputs {', '.join(self._expected)}; got {', '.join(inputs) or 'none'}",
                help="pass every input of the task's example batch by name, with the same nesting",
            )
        return leaves

    @property
    def _expected(self) -> list[str]:
        """Names of the inputs that a call has to give."""
        return [key for key in self.task.inputs if self.precomputed is None or key not in self.precomputed.names]

    def _nested_otherwise(self, inputs: Mapping[str, Any]) -> str:
        """Which inputs hold other numbers of tensors, or hold them otherwise, than in the example batch."""
        structures = ((key, *map(pytree.tree_structure, (inputs[key], x))) for key, x in self.task.inputs.items())
        names = [repr(key) for key, given, expected in structures if given != expected]
        return f"task {self.name!r}: {', '.join(names)}: nested otherwise than in the example batch"

    def unflatten(self, outputs: Any) -> Any:
        """What the task's forward returns, from the graph's flat outputs."""
        return pytree.tree_unflatten(list(outputs)[: self.out_spec.num_leaves], self.out_spec)

    @property
    def compact_outputs(self) -> dict[int, int]:
        """Output leaves that hold the demanded rows only -> position of the output that is their row index."""
        return dict(self.graph_module.meta.get(COMPACT_OUTPUTS, {}))

    def copy(self) -> TaskGraph:
        """A copy whose graph can be edited; parameters stay the same objects."""
        module = fx.GraphModule(self.graph_module, copy.deepcopy(self.graph_module.graph))
        module.meta.update(self.graph_module.meta)
        return replace(self, graph_module=module)

    def example(self) -> dict[str, Any]:
        """The example batch, on the model's device."""
        device = model_device(self.graph_module)
        moved: dict[str, Any] = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), dict(self.task.inputs))
        return moved

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of those that the graph reads, tied ones under each of their names."""
        return {tensor_name(key): p for key, p in self.graph_module.named_parameters(remove_duplicate=False)}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of those that a plan added to the model's, by name: optimizers count them."""
        named = self.named_parameters()
        return {name: named[name] for name in sorted(named) if name.startswith(f"{OWN}.")}

    def input_nodes(self) -> dict[str, list[fx.Node]]:
        """Input -> its placeholders, one for each of its leaves: a node's name is not always that of its input."""
        nodes = iter(self.graph.find_nodes(op="placeholder"))
        return {key: [next(nodes) for _ in pytree.tree_leaves(x)] for key, x in self.task.inputs.items()}

    def leaf_names(self) -> dict[fx.Node, str]:
        """Placeholder -> name of what it takes: that of the input, with a number where that holds several tensors."""
        return {
            node: input_name(key, i, len(nodes))
            for key, nodes in self.input_nodes().items()
            for i, node in enumerate(nodes)
        }

    def trained_nodes(self) -> dict[str, fx.Node]:
        """Name -> placeholder, of the inputs that gradients flow back into."""
        return {name: node for node, name in self.leaf_names().items() if name in self.trained_inputs}

    def symbol_names(self) -> dict[str, str]:
        """Symbol -> the user's name for it."""
        return {d.symbol: d.name for d in self.dimensions if d.symbol is not None}


class Program(Mapping[str, TaskGraph]):
    """Task name -> :class:`TaskGraph`, all over one model.

    Args:
        spec: the model and tasks that were captured.
        graphs: the task graphs.
    """

    def __init__(self, spec: ModelSpec, graphs: Mapping[str, TaskGraph]) -> None:
        self.spec = spec
        self._graphs = dict(graphs)

    @property
    def model(self) -> nn.Module:
        """The user's model; every task graph holds its parameters."""
        return self.spec.model

    def __getitem__(self, task: str) -> TaskGraph:
        return self._graphs[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def copy(self) -> Program:
        """A program whose graphs can be edited without touching this one."""
        return Program(self.spec, {name: graph.copy() for name, graph in self.items()})

    def replacing(self, graphs: Mapping[str, TaskGraph]) -> Program:
        """The same program with some task graphs replaced."""
        return Program(self.spec, {**self._graphs, **graphs})

    def __repr__(self) -> str:
        tasks = ", ".join(f"{name}: {len(graph.graph.nodes)} nodes" for name, graph in self.items())
        return f"Program({tasks})"


def number_tensor(number: float, device: torch.device) -> torch.Tensor:
    """A Python number as the tensor without dimensions that computes alike: it does not change the type of others."""
    return torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else None, device=device)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several -> the first, by which ``named_parameters`` knows them."""
    first = {id(p): name for name, p in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in everything if first[id(p)] != name}


def is_training(model: nn.Module) -> bool:
    """Whether the model is in training mode; so a new module is, if a tensor or submodule has the mode's name."""
    mode: object = model.training
    return mode if isinstance(mode, bool) else True


def is_meta(module: nn.Module) -> bool:
    """Whether any parameter or buffer of ``module`` has no storage."""
    return any(t.device.type == "meta" for t in (*module.parameters(), *module.buffers()))


def model_device(module: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer, the CPU if it has none."""
    for x in (*module.parameters(), *module.buffers()):
        return x.device
    return torch.device("cpu")


def cuda_devices(module: nn.Module) -> list[torch.device]:
    """The devices, beside the CPU, whose random numbers a forward of ``module`` may draw; for ``fork_rng``."""
    return [device] if (device := model_device(module)).type == "cuda" else []


def loss_node(graph: TaskGraph) -> fx.Node:
    """The node that is the task's loss: the first scalar float output."""
    for node in output_args(graph.graph):
        val = tensor(node)
        if val is not None and val.dim() == 0 and val.is_floating_point():
            return node
    raise AnalysisError(f"task {graph.name!r}: no output of the graph is a scalar loss")

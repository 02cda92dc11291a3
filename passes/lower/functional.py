"""A task's graph as a function of plain tensors, for compilers: it returns what it checks and writes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from tokgraph import ops
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import ancestors, call, is_write, output_args, rank, value
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.tensors import read

from ..contract import GraphPass
from ..emitter import is_check
from ..pipeline import Pipeline
from .inline import arguments, inlined
from .scatter import ScattersByIndex

aten = torch.ops.aten

CHECKS = "tokgraph.checks"
"""Key of ``GraphModule.meta``: ``(message, positions of the inputs that it is about)`` of each check among the outputs."""
WRITES = "tokgraph.writes"
"""Key of ``GraphModule.meta``: what is to be written of the outputs, a ``get_attr`` target or the position of an input."""
TENSORS = "tokgraph.given_tensors"
"""Key of ``GraphModule.meta``: targets of the tensors that follow the inputs."""

LEARNED = "tokgraph.learned"
"""Key of ``meta`` of an input that is a tensor of the model: whether it is a parameter."""


@dataclass(frozen=True)
class Functional:
    """A graph that computes on its arguments alone, and returns all that it does.

    Args:
        graph_module: inputs: the task's, then ``tensors``; outputs: the task's, then one bool scalar for each of ``checks``,
            then one value for each of ``writes``.
        outputs: how many outputs are the task's.
        checks: ``(message, names of the inputs that the check is about)``.
        writes: targets of the buffers, and positions of the inputs, that the last outputs are to be written into.
        tensors: what to give after the inputs: targets of tensors that the graph module of the task holds.
    """

    graph_module: fx.GraphModule
    outputs: int
    checks: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str | int, ...]
    tensors: tuple[str, ...]


def functional(graph: TaskGraph, *, checking: bool = False) -> Functional:
    """A task's graph as a function; its operators of rows stay operators, of which ``ops.decompositions()`` tells ATen.

    Their gradients are theirs: rows of an index are unique, which autograd, by itself, could not know of a ``gather``.

    Args:
        graph: the task's graph.
        checking: leave checks where they are, for a run operator by operator, in which they raise.
    """
    unchecked = [] if checking else [ScattersByIndex(), ChecksToOutputs(), CountsToSizes()]
    made = Pipeline([*unchecked, WritesToOutputs(), TensorsToInputs()]).run_task(graph).graph_module
    names = list(graph.leaf_names().values())
    checks = tuple((message, tuple(names[i] for i in inputs)) for message, inputs in made.meta.get(CHECKS, ()))
    outputs = len(output_args(graph.graph))
    return Functional(made, outputs, checks, tuple(made.meta.get(WRITES, ())), tuple(made.meta.get(TENSORS, ())))


@dataclass(frozen=True)
class ChecksToOutputs(GraphPass):
    """What operators ask of a batch becomes outputs, true where it holds: compiled code neither raises nor waits."""

    name: ClassVar[str] = "checks-to-outputs"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Compute each condition beside its operator; checks that do nothing else are removed."""
        graph, conditions = graph_module.graph, ops.conditions()
        inputs = list(graph.find_nodes(op="placeholder"))
        asked: list[tuple[str, list[int]]] = list(graph_module.meta.get(CHECKS, ()))
        holds = []
        for node in [node for node in graph.nodes if node.target in conditions]:
            condition = conditions[node.target]
            args = fx.node.map_arg(arguments(node), value)
            above = ancestors([node])
            asked.append((condition.says(*args), [i for i, x in enumerate(inputs) if x in above]))
            with graph.inserting_before(node):
                holds.append(inlined(node, condition.holds, self.name))
            if is_check(node):
                graph.erase_node(node)
        graph_module.meta[CHECKS] = asked
        _append_outputs(graph, holds)


@dataclass(frozen=True)
class CountsToSizes(GraphPass):
    """Numbers of elements become products of sizes: torch.compile takes no ``numel`` of a tensor whose sizes it fixes.

    So it does with those that are 0 or 1, of batches without an image or of one sample.
    """

    name: ClassVar[str] = "counts-to-sizes"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Replace every one of them."""
        graph = graph_module.graph
        for node in graph.find_nodes(op="call_function", target=aten.sym_numel.default):
            with graph.inserting_before(node):
                product: int | fx.Node = 1
                for i in range(rank(node.args[0])):
                    size = call(graph, aten.sym_size.int, node.args[0], i, origin=node, made_by=self.name)
                    product = call(graph, operator.mul, product, size, origin=node, made_by=self.name)
            node.replace_all_uses_with(product)
            graph.erase_node(node)


@dataclass(frozen=True)
class WritesToOutputs(GraphPass):
    """Values that the graph writes into buffers and inputs become outputs, to be written when the checks hold."""

    name: ClassVar[str] = "writes-to-outputs"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Return what is written, and write nothing."""
        graph = graph_module.graph
        inputs = list(graph.find_nodes(op="placeholder"))
        writes: list[str | int] = list(graph_module.meta.get(WRITES, ()))
        values = []
        for node in [node for node in graph.nodes if is_write(node)]:
            into, new = node.args[:2]
            writes.append(str(into.target) if into.op == "get_attr" else inputs.index(into))
            values.append(new)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        graph_module.meta[WRITES] = writes
        _append_outputs(graph, values)


@dataclass(frozen=True)
class TensorsToInputs(GraphPass):
    """Tensors of the model become inputs, after those of the task: equal blocks are then equal functions."""

    name: ClassVar[str] = "tensors-to-inputs"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """One input for each tensor that is read."""
        graph = graph_module.graph
        inputs = list(graph.find_nodes(op="placeholder"))
        given: dict[str, fx.Node] = {}
        for node in list(graph.find_nodes(op="get_attr")):
            target = str(node.target)
            if target not in given:
                held = read(graph_module, node)
                with graph.inserting_before(node):
                    given[target] = graph.placeholder(f"given_{len(given)}")
                given[target].meta = {"val": node.meta.get("val", held), LEARNED: isinstance(held, nn.Parameter)}
            node.replace_all_uses_with(given[target])
            graph.erase_node(node)
        for node in reversed([*inputs, *given.values()]):
            first = next(iter(graph.nodes))
            if node is not first:
                first.prepend(node)
        graph_module.meta[TENSORS] = [*graph_module.meta.get(TENSORS, ()), *given]


def _append_outputs(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    if nodes:
        graph.output_node().args = ((*output_args(graph), *nodes),)

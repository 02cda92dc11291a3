"""The measured counterpart of pathway profiles: gradients split into what flows through visual rows and through all others.

Every parameter becomes two leaves of equal values. A node that combines parameters with rows of the token axis is computed
once with each, and its visual rows are taken from the one result, its other rows from the other: the loss is what it was,
and the gradients of the two leaves add up to that of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from math import nan, sqrt
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from tokgraph.errors import BatchError
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.interpreter import GraphInterpreter, in_dtype
from tokgraph.ir.node import output_args, rank, tensor
from tokgraph.ir.program import TaskGraph, loss_node, model_device
from tokgraph.ir.tensors import tensor_name
from tokgraph.passes.cost.pathways import lean_graph, parameter_values
from tokgraph.passes.cost.rows import SAMPLES, held_rows, place_rows, visual_rows

from .batch import on_batch
from .segments import visual_of


@dataclass(frozen=True)
class GradientNorms:
    """The size of one parameter's gradient, by the rows it flows through.

    Args:
        visual: L2 norm of the part through visual rows.
        text: L2 norm of the part through all other rows.
    """

    visual: float
    text: float


@dataclass(frozen=True, eq=False)
class GradientSplit:
    """The gradient of a task's loss, split by the rows it flows through.

    Args:
        visual: parameter name -> the part through visual rows, of the parameter's shape. Frozen parameters and those that
            the task's demanded outputs are not computed from are left out; a tied parameter appears once, under the name
            that the graph gives it.
        text: the part through all other rows.
    """

    visual: Mapping[str, torch.Tensor]
    text: Mapping[str, torch.Tensor]

    def whole(self) -> dict[str, torch.Tensor]:
        """The whole gradients: both parts together."""
        return {name: self.visual[name] + self.text[name] for name in self.visual}

    def norms(self) -> dict[str, GradientNorms]:
        """Parameter name -> L2 norms of its parts."""
        return {name: GradientNorms(_norm(self.visual[name]), _norm(self.text[name])) for name in self.visual}


@dataclass(frozen=True)
class BlockCosine:
    """How much the gradients of two tasks agree in one block: cosines over all its parameters, NaN where a norm is 0.

    Args:
        tasks: the tasks.
        block: number of the block in the first task.
        module: its module path.
        whole: cosine of the whole gradients.
        visual: cosine of the parts through visual rows.
        text: cosine of the parts through all other rows.
    """

    tasks: tuple[str, str]
    block: int
    module: str
    whole: float
    visual: float
    text: float


def measure_gradients(
    graph: TaskGraph,
    facts: TaskFacts,
    batches: Iterable[Mapping[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
) -> GradientSplit:
    """Measure a captured task's gradients, split into what flows through visual rows and what through all others.

    It is measured on the graph that profiles are read off, without work that no demanded output reads, and by the same
    rows: a node that holds rows of the token axis is split by them; one that makes visual rows before they meet the text
    (image encoder, aligner) is visual; one that holds no rows (a pooled value, a loss, what an operator without a rule
    gives) is text. A convolution over the token axis goes by the row it computes, though it reads the neighbours; a score
    of a query and a key goes by the query. Dropout is left out.

    Args:
        graph: the captured task graph.
        facts: its facts.
        batches: inputs by name, of any size where the graph's dimensions are dynamic; the gradients are averaged over
            them. ``None``: the example batch.
        dtype: the type to compute in; ``None``: the model's own.

    Raises:
        AnalysisError: the model is on the meta device.
        BatchError: a batch does not fit the graph, a sample has more demanded rows than those of the example batch, or
            there is no batch.
    """
    lean = lean_graph(graph, facts)
    plan = _Plan.of(lean, facts)
    total: dict[str, _Pair] = {}
    count = 0
    for batch in [None] if batches is None else batches:
        here = on_batch(graph, batch)
        split = _gradients(replace(lean, task=here.task), visual_of(here, facts), plan, dtype)
        total = {name: split[name].added_to(total.get(name)) for name in split}
        count += 1
    if not count:
        raise BatchError(
            f"task {graph.name!r}: there is no batch to measure gradients on", help="pass a batch, or None"
        )
    return GradientSplit(
        {name: pair.visual / count for name, pair in total.items()},
        {name: pair.text / count for name, pair in total.items()},
    )


def gradient_cosines(splits: Mapping[str, GradientSplit], facts: Mapping[str, TaskFacts]) -> tuple[BlockCosine, ...]:
    """How much the tasks' gradients agree, block by block, for every pair of tasks.

    A block's parameters are those under its module path. Where that is unknown, or no block of the other task, the block
    is left out. A parameter that one task does not use counts as one with a gradient of 0.

    Args:
        splits: task -> its gradients.
        facts: task -> its facts.
    """
    found = []
    for a, b in combinations(splits, 2):
        shared = {block.module for block in facts[b].blocks} - {""}
        for block in facts[a].blocks:
            if block.module in shared:
                mine, theirs = (_of_module(splits[task], block.module) for task in (a, b))
                cosines = (_cosine(x, y) for x, y in zip(mine, theirs, strict=True))
                found.append(BlockCosine((a, b), block.index, block.module, *cosines))
    return tuple(found)


_Gradients = dict[str, torch.Tensor]


def _of_module(split: GradientSplit, module: str) -> tuple[_Gradients, _Gradients, _Gradients]:
    """``(whole, visual, text)`` gradients of the parameters under a module path."""
    parts = (split.whole(), split.visual, split.text)
    whole, visual, text = ({n: g for n, g in part.items() if n.startswith(f"{module}.")} for part in parts)
    return whole, visual, text


def _cosine(a: _Gradients, b: _Gradients) -> float:
    sizes = [sqrt(sum(_norm(g) ** 2 for g in part.values())) for part in (a, b)]
    if 0.0 in sizes:
        return nan
    product = sum(float((a[name].double() * b[name].double()).sum()) for name in a.keys() & b.keys())
    return product / (sizes[0] * sizes[1])


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


# ------------------------------------------------------------------ running a graph on pairs


@dataclass(frozen=True, eq=False)
class _Pair:
    """A value with two copies: one that visual rows are to be computed with, and one for all other rows.

    Args:
        visual: for visual rows.
        text: for all other rows.
    """

    visual: Any
    text: Any

    def added_to(self, other: _Pair | None) -> _Pair:
        """The sum, member by member."""
        return self if other is None else _Pair(self.visual + other.visual, self.text + other.text)

    @classmethod
    def map(cls, function: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> _Pair:
        """A call with the members of all pairs among its arguments."""

        def member(name: str) -> Any:
            tree = pytree.tree_map(lambda x: getattr(x, name) if isinstance(x, cls) else x, (args, kwargs))
            return function(*tree)

        return cls(member("visual"), member("text"))


@dataclass(frozen=True)
class _Plan:
    """What is known of a graph's values before it runs.

    Args:
        held: what the axes of values hold.
        unmixed: values made of parameters alone, which stay pairs.
        branch: values that make visual rows before text and visual rows meet.
    """

    held: Mapping[Any, Any]
    unmixed: frozenset[fx.Node]
    branch: frozenset[str]

    @classmethod
    def of(cls, graph: TaskGraph, facts: TaskFacts) -> _Plan:
        """The plan of a lean graph."""
        held = held_rows(graph.graph, facts)
        return cls(held, frozenset(parameter_values(graph.graph)), frozenset(facts.visual.branch))

    def stays_pair(self, node: fx.Node) -> bool:
        """Whether a value that no mask can be placed on is merged later: it is a parameter's, or rows of all samples."""
        return node in self.unmixed or self._has_rows(node)

    def _has_rows(self, node: fx.Node) -> bool:
        return any(set(self.held.get((node, axis), ())) - {SAMPLES} for axis in range(rank(node)))


class _SplitRun(GraphInterpreter):
    """Runs a task graph on pairs of parameters, without dropout.

    Args:
        graph: the lean task graph, its inputs the batch.
        visual: ``[batch, tokens]`` bool, the visual tokens of the batch.
        plan: what is known of the graph.
        dtype: the type to compute in, ``None``: the model's own.
    """

    def __init__(self, graph: TaskGraph, visual: torch.Tensor, plan: _Plan, dtype: torch.dtype | None) -> None:
        self._device = model_device(graph.graph_module)
        _, constants = maps = in_dtype(dtype, graph.graph_module)
        maps = maps if dtype is not None else (lambda x: x.to(self._device), constants)
        super().__init__(graph.graph_module, *maps)
        chains = {part for parts in plan.held.values() for part in parts if part != SAMPLES}
        self._rows = visual_rows(graph, visual, chains)
        self._plan = plan
        self._dtype = dtype
        self._named: dict[int, str] = {}
        self.leaves: dict[str, _Pair] = {}

    def fetch_attr(self, target: str) -> Any:
        """Two leaves for a parameter that is trained, the same ones for all names of a tied parameter."""
        found = fx.Interpreter.fetch_attr(self, target)
        if not (isinstance(found, torch.Tensor) and found.requires_grad):
            return super().fetch_attr(target)
        name = self._named.setdefault(id(found), tensor_name(target))
        if name not in self.leaves:
            self.leaves[name] = _Pair(*(found.detach().to(self._dtype).requires_grad_() for _ in range(2)))
        return self.leaves[name]

    def run_node(self, n: fx.Node) -> Any:
        """One node, twice where an argument is a pair."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not any(isinstance(x, _Pair) for x in pytree.tree_leaves((args, kwargs))):
            return super().run_node(n)
        if n.op == "output":
            return super().output(n.target, *_Pair.map(lambda a, k: (a, k), args, kwargs).text)
        pair = _Pair.map(lambda a, k: self.call_function(n.target, tuple(a), k), args, kwargs)
        return self._merged(n, pair)

    def _merged(self, n: fx.Node, pair: _Pair) -> Any:
        """Visual rows of the one member and other rows of the other, or what else becomes of the pair."""
        if n in self._plan.unmixed:
            return pair
        mask = place_rows(n, self._plan.held, self._rows) if tensor(n) is not None else None
        if mask is not None:
            mask = mask.to(self._device)
            return pytree.tree_map(lambda a, b: torch.where(mask, a, b), pair.visual, pair.text)
        if n.name in self._plan.branch:
            return pair.visual
        return pair if tensor(n) is not None and self._plan.stays_pair(n) else pair.text


def _gradients(graph: TaskGraph, visual: torch.Tensor, plan: _Plan, dtype: torch.dtype | None) -> dict[str, _Pair]:
    """Parameter name -> gradients of its two leaves on the task's inputs."""
    run = _SplitRun(graph, visual, plan, dtype)
    with torch.enable_grad():
        outputs = run.run(*graph.flatten(graph.task.inputs))
    loss = outputs[output_args(graph.graph).index(loss_node(graph))]
    leaves = [leaf for pair in run.leaves.values() for leaf in (pair.visual, pair.text)]
    if not leaves or not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return {name: _Pair(*found[2 * i : 2 * i + 2]) for i, name in enumerate(run.leaves)}

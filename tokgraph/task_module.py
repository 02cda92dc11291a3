"""One task of an accelerated program: a callable module over the model's own parameters, which checks each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.ir.compilation import By, Compilation
from tokgraph.ir.conditions import Autocast
from tokgraph.ir.names import STEP
from tokgraph.ir.program import TaskGraph, is_training
from tokgraph.ir.tensors import held

from .calls.diagnosis import FAILURES, explain
from .calls.draws import Draws
from .calls.variants import Variants
from .errors import InternalError, TokgraphError


class TaskModule(nn.Module):
    """One task's graph, called like the task's forward without its model.

    Each call checks that the model and the batch are what the graph takes for granted (docs/calls.md).

    Args:
        model: the user's model.
        variants: the task's graphs.
    """

    def __init__(self, model: nn.Module, variants: Variants) -> None:
        super().__init__()
        self._draws = Draws()
        self._how: Compilation | None = None
        self.use(model, variants)

    def use(self, model: nn.Module, variants: Variants) -> None:
        """Run other graphs from now on."""
        self._of = (model, variants)  # a tuple: the model is no submodule of this one
        self.graph_module = variants.first.graph.graph_module
        super().train(is_training(model))

    @property
    def task_graph(self) -> TaskGraph:
        """The graph that the plan was made for."""
        return self.variants.first.graph

    @property
    def variants(self) -> Variants:
        """The task's graphs, and the checks that choose between them."""
        return self._of[1]

    @property
    def compilation(self) -> Compilation | None:
        """How the task's graphs are compiled; ``None``: not at all."""
        return self._how

    def compile(  # type: ignore[override]
        self, mode: bool | str | Compilation = True, *, by: By = "graph", backend: str | Callable[..., Any] = "inductor"
    ) -> TaskModule:
        """Compile the task's graph with ``torch.compile`` from the next call on, and those of other modes and types as well.

        Args:
            mode: as for :meth:`Accelerated.compile`, and so the others.
            by: what is compiled at once.
            backend: by what.
        """
        how = Compilation.of(mode)
        given = how is None or isinstance(mode, Compilation)
        self._how = how if given else Compilation(how.mode, by, backend)  # type: ignore[union-attr]
        return self

    def train(self, mode: bool = True) -> TaskModule:
        """Set the mode of the user's model, unless that is in it already, whose submodules then stay as they are.

        The next call runs the graph of that mode, which is captured when it is first needed.
        """
        model = self._of[0]
        if is_training(model) is not mode:
            model.train(mode)
        return super().train(mode)

    @property
    def step(self) -> int:
        """Training steps so far: a plan that drops at random draws anew at each; 0 for other plans."""
        counter = held(self.graph_module, STEP)
        return 0 if counter is None else int(counter)

    @step.setter
    def step(self, number: int) -> None:
        counter = held(self.graph_module, STEP)
        if counter is not None:
            counter.fill_(number)

    def __call__(self, /, **inputs: Any) -> Any:
        """The task's result, hooks run as of any module; an input may be called ``self``."""
        return super().__call__(**inputs) if "self" not in inputs else super().__call__(inputs)

    def _run(self, inputs: Mapping[str, Any]) -> tuple[TaskGraph, Any]:
        """The graph for this call, and its outputs."""
        model, variants = self._of
        if torch.compiler.is_compiling():  # Dynamo guards on what it traces
            graph = self.task_graph
            outputs = self.graph_module(*graph.flatten(inputs))
            drawn = held(self.graph_module, STEP) if self.training else None
            if drawn is not None:
                drawn.add_(1)
            return graph, outputs
        leaves = self.task_graph.flatten(inputs)
        variant = variants.current(leaves)
        graph = variant.graph
        error = variant.refuse(leaves)
        if error is not None:
            raise error
        counter = held(graph.graph_module, STEP) if is_training(model) else None
        with no_autocast(variant.autocast), self._draws.of_call(counter):
            try:
                return graph, variant.run(leaves, self._how)
            except (TokgraphError, InternalError, torch.OutOfMemoryError):
                raise
            except FAILURES as failure:
                raise explain(graph, leaves, failure) from failure

    def forward(self, named: Mapping[str, Any] = MappingProxyType({}), /, **inputs: Any) -> Any:
        """What the task's forward returns; tensors beside the loss may hold the demanded rows only.

        In training mode each call counts as a step (:attr:`step`).

        Args:
            named: inputs by name that cannot be passed as keywords of a module (``self``).
            inputs: the task's inputs, by name.

        Raises:
            BatchError: the inputs are not those that the graph was captured for, or hold another number of visual tokens.
            StaleError: the model is no longer what was captured, in a way that needs :meth:`Accelerated.refresh`.
        """
        graph, outputs = self._run({**named, **inputs})
        return graph.unflatten(outputs)

    def with_rows(self, /, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        """The result, and the row index of every compact tensor in it.

        Returns:
            ``(result, {path in the result: [batch, rows] int64})``: row ``j`` of the compact tensor is row
            ``index[:, j]`` of the tensor that the task's forward returns.
        """
        graph, outputs = self._run(inputs)
        result = graph.unflatten(outputs)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(result)[0]]
        rows = {paths[leaf]: outputs[position] for leaf, position in graph.compact_outputs.items()}
        return result, rows


def no_autocast(captured: Autocast | None) -> AbstractContextManager[Any]:
    """Run a graph whose casts are in it without those of the region around it."""
    return nullcontext() if captured is None else torch.autocast(captured.device, enabled=False)

"""Accelerated programs: callable modules, one a task, over the model's own parameters. Data and calls; no file format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.ir.facts import Facts
from tokgraph.ir.names import STEP, copied_name
from tokgraph.ir.plan import Plan
from tokgraph.ir.program import Program, TaskGraph
from tokgraph.ir.tensors import held
from tokgraph.ir.verification import Verification
from tokgraph.passes.analyze import analyze
from tokgraph.passes.lower.places import mark_places

from .errors import FileError


class TaskModule(nn.Module):
    """One task's graph, called like the task's forward without its model.

    Args:
        graph: the task graph.
    """

    def __init__(self, graph: TaskGraph) -> None:
        super().__init__()
        self.task_graph = graph
        self.graph_module = graph.graph_module
        self.train(graph.graph_module.training)

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

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        outputs = self.graph_module(*self.task_graph.flatten(inputs))
        counter = held(self.graph_module, STEP) if self.training else None
        if counter is not None:
            counter.add_(1)
        return outputs

    def forward(self, named: Mapping[str, Any] = MappingProxyType({}), /, **inputs: Any) -> Any:
        """What the task's forward returns; tensors beside the loss may hold the demanded rows only.

        In training mode each call counts as a step (:attr:`step`).

        Args:
            named: inputs by name that cannot be passed as keywords of a module (``self``).
            inputs: the task's inputs, by name.

        Raises:
            BatchError: the inputs are not those of the example batch, or hold another number of visual tokens.
        """
        return self.task_graph.unflatten(self._run({**named, **inputs}))

    def with_rows(self, /, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        """The result, and the row index of every compact tensor in it.

        Returns:
            ``(result, {path in the result: [batch, rows] int64})``: row ``j`` of the compact tensor is row
            ``index[:, j]`` of the tensor that the task's forward returns.
        """
        outputs = self._run(inputs)
        result = self.task_graph.unflatten(outputs)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(result)[0]]
        rows = {paths[leaf]: outputs[position] for leaf, position in self.task_graph.compact_outputs.items()}
        return result, rows


class Accelerated(Mapping[str, TaskModule]):
    """Task name -> :class:`TaskModule`; all hold the parameters of the user's model, which stays what it was.

    Args:
        program: the rewritten program.
        plan: the plan that was applied.
        facts: facts of the captured program; ``None`` for one that was loaded, whose baseline is analysed when they are
            asked for.
        captured: the program that a loaded one was made from, where it was saved with it.
    """

    def __init__(
        self, program: Program, plan: Plan, facts: Facts | None = None, *, captured: Program | None = None
    ) -> None:
        self.program = program
        self.plan = plan
        self.captured = captured if facts is None else facts.program
        self.loaded = facts is None
        self.verification: Verification | None = None
        self.report: dict[str, Any] = {}
        self._facts = facts
        self._modules_by_task = {name: TaskModule(graph) for name, graph in program.items()}

    @property
    def facts(self) -> Facts:
        """Facts of the captured program.

        Raises:
            FileError: the program was saved without its baseline.
        """
        if self._facts is None:
            self._facts = analyze(self.variants(with_baseline=True)["baseline"])
        return self._facts

    def with_program(self, program: Program) -> Accelerated:
        """Another rewritten program for the same plan, not verified: what a pass of the user's own made of this one."""
        if self._facts is not None:
            for name, graph in program.items():
                mark_places(graph, self._facts[name])
        return Accelerated(program, self.plan, self._facts, captured=self.captured)

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.program.model

    @property
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """``tokgraph_own.<task>.<name>`` -> parameter that the plan added (sites with own projections)."""
        return {name: p for graph in self.program.values() for name, p in graph.own_parameters().items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the model, then those that the plan added."""
        yield from self.model.named_parameters()
        yield from self.own_parameters.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters and those that the plan added: one optimizer for all tasks."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """The model's state, under the model's keys, and the parameters that the plan added."""
        return {**self.model.state_dict(), **{name: p.detach() for name, p in self.own_parameters.items()}}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Load a checkpoint of this program, or of the model alone.

        Parameters that the plan added and the checkpoint lacks start as those they are copies of.
        """
        added = self.own_parameters
        keys = self.model.load_state_dict({k: v for k, v in state.items() if k not in added}, strict=strict)
        loaded = self.model.state_dict()
        with torch.no_grad():
            for name, parameter in added.items():
                parameter.copy_(state[name] if name in state else loaded[copied_name(name)])
        return keys

    def variants(self, with_baseline: bool) -> dict[str, Program]:
        """``"accelerated"``, and with it ``"baseline"``: the programs that can be exported, saved and profiled.

        Raises:
            FileError: the baseline is asked for, and this program was saved without it.
        """
        if with_baseline and self.captured is None:
            raise FileError("this program was saved without its baseline", help="save it with with_baseline=True")
        baseline = {"baseline": self.captured} if with_baseline and self.captured is not None else {}
        return {**baseline, "accelerated": self.program}

    def save(self, folder: str | Path, *, with_baseline: bool = True) -> None:
        """Write the program to a folder, for :func:`tokgraph.load_accelerated`: :func:`tokgraph.store.save`."""
        from .store import save

        save(self, folder, with_baseline=with_baseline)

    def export_onnx(
        self, folder: str | Path, kind: str | Sequence[str] = ("forward", "train-step"), **options: Any
    ) -> dict[str, Any]:
        """Export every task to ONNX over one ``weights.safetensors``, checked: :func:`tokgraph.export.export_onnx`."""
        from .export import export_onnx

        return export_onnx(self, folder, kind, **options)

    def __getitem__(self, task: str) -> TaskModule:
        return self._modules_by_task[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules_by_task)

    def __len__(self) -> int:
        return len(self._modules_by_task)

"""Accelerated programs: callable modules, one a task, over the model's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import FileError
from .export import ExportOptions, export_programs
from .facts import Facts
from .plan import Plan
from .program import STEP, Program, TaskGraph
from .saving import save_program
from .verdict import Verification
from .version import VERSION


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
        return int(getattr(self.graph_module, STEP, 0))

    @step.setter
    def step(self, number: int) -> None:
        if hasattr(self.graph_module, STEP):
            getattr(self.graph_module, STEP).fill_(number)

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        outputs = self.graph_module(*self.task_graph.flatten(inputs))
        if self.training and hasattr(self.graph_module, STEP):
            getattr(self.graph_module, STEP).add_(1)
        return outputs

    def forward(self, **inputs: Any) -> Any:
        """What the task's forward returns; tensors beside the loss may hold the demanded rows only.

        In training mode each call counts as a step (:attr:`step`).

        Args:
            inputs: the task's inputs, by name.

        Raises:
            BatchError: the inputs are not those of the example batch, or hold another number of visual tokens.
        """
        return self.task_graph.unflatten(self._run(inputs))

    def with_rows(self, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
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
        captured: the program it was made from; ``None`` for one that was saved without.
        plan: the plan that was applied.
        facts: facts of the captured program; ``None`` for a loaded one (``tg.analyze(accelerated.captured)``).
    """

    def __init__(self, program: Program, captured: Program | None, plan: Plan, facts: Facts | None) -> None:
        self.program = program
        self.captured = captured
        self.plan = plan
        self.facts = facts
        self.verification: Verification | None = None
        self.report: dict[str, Any] = {}
        self._modules_by_task = {name: TaskModule(graph) for name, graph in program.items()}

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
                parameter.copy_(state[name] if name in state else loaded[name.split(".", 2)[2]])
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
        """Write the program: ``TASK.pt2``, ``weights.safetensors``, ``plan.json``, example batches, ``manifest.json``.

        :func:`tokgraph.load_accelerated` reads it, without the model's code. Nothing of the user's is pickled.

        Args:
            folder: where to; what is there is replaced file by file, or, on a failure, stays as it was.
            with_baseline: also the captured graphs.

        Raises:
            FileError: the model has no values (meta device).
        """
        save_program(
            self.variants(with_baseline),
            self.facts,
            self.plan,
            self.state_dict(),
            Path(folder),
            report=self.report,
            version=VERSION,
        )

    def export_onnx(
        self,
        folder: str | Path,
        kind: str | Sequence[str] = ("forward", "train-step"),
        *,
        with_baseline: bool = False,
        progress: Callable[[str], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Export every task to ONNX over one ``weights.safetensors``, checked against PyTorch in ONNX Runtime.

        Args:
            folder: where the files go.
            kind: ``"forward"`` (loss and outputs), ``"train-step"`` (loss and ``grad/<name>`` of every parameter),
                ``"update-step"`` (parameters and optimizer state in and out), or several of them.
            with_baseline: also the captured graphs.
            progress: called with each file's name before it is made.
            options: further fields of :class:`tokgraph.export.ExportOptions`.

        Returns:
            What was written, and the errors found: :func:`tokgraph.export.export_programs`.

        Raises:
            ExportError: a graph cannot be converted, or disagrees with PyTorch; nothing is written then.
            DependencyError: a package is missing.
        """
        kinds: Any = (kind,) if isinstance(kind, str) else tuple(kind)
        return export_programs(
            self.variants(with_baseline),
            self.facts,
            self.state_dict(),
            Path(folder),
            ExportOptions(kinds=kinds, **options),
            report=self.report,
            version=VERSION,
            progress=progress,
        )

    def __getitem__(self, task: str) -> TaskModule:
        return self._modules_by_task[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules_by_task)

    def __len__(self) -> int:
        return len(self._modules_by_task)

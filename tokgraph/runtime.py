"""Accelerated programs: callable modules, one a task, over the model's own parameters. Data and calls; no file format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokgraph.ir.compilation import By, Compilation, CompilationCheck
from tokgraph.ir.facts import Facts
from tokgraph.ir.names import STEP, copied_name, step_name
from tokgraph.ir.plan import Plan
from tokgraph.ir.program import Program, TaskGraph
from tokgraph.ir.spec import no_forward
from tokgraph.ir.tensors import held
from tokgraph.ir.verification import Verification
from tokgraph.passes.analyze import analyze
from tokgraph.passes.capture.export import capture
from tokgraph.passes.cost.as_run import as_run
from tokgraph.passes.lower.places import mark_places
from tokgraph.planning.check import check_plan

from .calls.copies import Copied
from .calls.rewritten import rewritten, task_anew
from .calls.variants import Variants, share_own
from .errors import FileError, StaleError
from .task_module import TaskModule

if TYPE_CHECKING:
    from .blockwise import Blockwise
    from .trainable import TrainableTask


class Accelerated(Copied, Mapping[str, TaskModule]):
    """Task name -> :class:`TaskModule`; all hold the parameters of the user's model, which stays what it was.

    Args:
        program: the rewritten program.
        plan: the plan that was applied.
        facts: facts of the captured program; ``None`` for one that was loaded, whose baseline is analysed when they are
            asked for.
        captured: the program that a loaded one was made from, where it was saved with it.
        edited: passes of the user's own ran on the program, which another capture would not have.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        facts: Facts | None = None,
        *,
        captured: Program | None = None,
        edited: bool = False,
    ) -> None:
        self._edited = edited
        self.program = program
        self.plan = plan
        self.captured = captured if facts is None else facts.program
        self.loaded = facts is None
        self.verification: Verification | None = None
        self.compilation_check: CompilationCheck | None = None
        self.report: dict[str, Any] = {}
        self._facts = facts
        self._modules_by_task = {
            name: TaskModule(program.model, self._variants(name, graph)) for name, graph in program.items()
        }

    def _variants(self, name: str, graph: TaskGraph) -> Variants:
        spec, plan = self.program.spec, self.plan
        fixed = self._edited or spec.tasks[name].forward is no_forward
        anew = None if fixed else partial(task_anew, spec, name, plan)
        return Variants(self.model, graph, anew, None if self.captured is None else self.captured.get(name))

    def compile(
        self, mode: bool | str | Compilation = True, *, by: By = "graph", backend: str | Callable[..., Any] = "inductor"
    ) -> Accelerated:
        """Compile the tasks' graphs with ``torch.compile``, without graph breaks; their first calls then take a while.

        The checks of each call are made outside of the compiled code (docs/compile.md).

        Args:
            mode: a mode of ``torch.compile`` (``"default"``, ``"reduce-overhead"``, ``"max-autotune"``,
                ``"max-autotune-no-cudagraphs"``); ``True``: the default one; ``False``: run operators one by one again;
                or a :class:`tokgraph.Compilation`, which says all.
            by: ``"graph"``: each graph as a whole; ``"block"``: decoder blocks one by one, equal ones once.
            backend: ``"inductor"``, the name of another backend of ``torch.compile``, or such a backend.

        Raises:
            CompileError: there is no such mode. What cannot be compiled is found by the first call.
        """
        for module in self.values():
            module.compile(mode, by=by, backend=backend)
        return self

    def train(self, mode: bool = True) -> Accelerated:
        """Set the mode of the user's model; the tasks' next calls run graphs of that mode."""
        for module in self.values():
            module.train(mode)
        return self

    def eval(self) -> Accelerated:
        """Set the user's model to evaluation mode: ``train(False)``."""
        return self.train(False)

    def refresh(self) -> Accelerated:
        """Capture the model as it is now and apply the same plan, after a change that was meant: a new head, adapters.

        The task modules stay the same objects, own projections and steps are kept. What was said of the program before,
        ``verification``, ``compilation_check`` and ``report``, is cleared; compiled tasks are compiled again.

        Raises:
            StaleError: the program was loaded, and has no code of the model.
            TokgraphError: the model as it is now cannot be captured, or the plan does not fit it; nothing has changed then.
        """
        spec = self.program.spec
        if any(task.forward is no_forward for task in spec.tasks.values()):
            raise StaleError("a loaded program has no code of the model to capture", help="optimize the model again")
        facts = analyze(capture(spec))
        plan = check_plan(self.plan, facts)
        program = rewritten(facts, plan)
        for name, graph in program.items():
            share_own(self.program[name], graph)
        self.program, self.plan, self._facts, self.captured = program, plan, facts, facts.program
        self.verification, self.compilation_check, self.report = None, None, {}
        for name, module in self._modules_by_task.items():
            module.use(self.model, self._variants(name, program[name]))
        return self

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
        return Accelerated(program, self.plan, self._facts, captured=self.captured, edited=True)

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
        """:meth:`weights`, and ``tokgraph_step.<task>`` of tasks whose plan drops at random, so that training resumes there."""
        steps = {name: held(module.graph_module, STEP) for name, module in self.items()}
        return {**self.weights(), **{step_name(name): x.clone() for name, x in steps.items() if x is not None}}

    def weights(self) -> dict[str, Any]:
        """The model's state, under the model's keys, and the parameters that the plan added."""
        return {**self.model.state_dict(), **{name: p.detach() for name, p in self.own_parameters.items()}}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint of this program, or of the model alone.

        Parameters that the plan added and the checkpoint lacks start as those they are copies of; steps that it lacks stay.

        Args:
            state: the checkpoint.
            strict: refuse one that lacks tensors of the model, or holds others.
            assign: let the model have the tensors of the checkpoint, as a model on the meta device needs it, instead of
                copying from them.
        """
        added, steps = self.own_parameters, {step_name(name): module for name, module in self.items()}
        keys = self.model.load_state_dict(
            {k: v for k, v in state.items() if k not in added and k not in steps}, strict=strict, assign=assign
        )
        loaded = self.model.state_dict()
        with torch.no_grad():
            for name, parameter in added.items():
                x = state[name] if name in state else loaded[copied_name(name)]
                if assign:  # in place: graphs of several plans and modes hold it
                    taken = x if name in state else x.clone()
                    torch.utils.swap_tensors(parameter, nn.Parameter(taken.detach(), parameter.requires_grad))
                else:
                    parameter.copy_(x)
        for name, module in steps.items():
            if name in state:
                module.step = int(state[name])
        return keys

    def trainable(self, task: str | None = None) -> TrainableTask:
        """A task as a model for trainers, such as that of ``transformers``: it returns a mapping with the loss.

        Args:
            task: its name; ``None``: all tasks in a step, each input being the batch of the task of its name, and the loss
                the sum of theirs.

        Raises:
            BatchError: there is no such task.
        """
        from .trainable import TrainableTask

        return TrainableTask(self, task)

    def module(self, *, checkpoint: bool | Sequence[Any] = False) -> Blockwise:
        """The program as one module of blocks, for FSDP2, DDP and activation checkpointing (docs/training.md).

        Args:
            checkpoint: values of blocks that are computed again in the backward pass: ``False``: none; ``True``: all;
                operators (``torch.ops.aten.mm.default``, ...): all but the results of these.

        Returns:
            A module to be called with one task's inputs, ``module(task="generation", **inputs)``, or with batches of
            several, ``module(batches={"generation": inputs, ...})``.
        """
        from .blockwise import Blockwise

        return Blockwise(self, checkpoint=checkpoint)

    def variants(self, with_baseline: bool, *, run: bool = False) -> dict[str, Program]:
        """``"accelerated"``, and with it ``"baseline"``: the programs that can be exported, saved and profiled.

        Args:
            with_baseline: the captured program too.
            run: as it is run, in its experts for modalities each row by the one it goes to; else as it was captured.

        Raises:
            FileError: the baseline is asked for, and this program was saved without it.
        """
        if with_baseline and self.captured is None:
            raise FileError("this program was saved without its baseline", help="save it with with_baseline=True")
        if not with_baseline or self.captured is None:
            return {"accelerated": self.program}
        found = {name: as_run(graph) for name, graph in self.captured.items()} if run else {}
        return {"baseline": self.captured.replacing(found) if run else self.captured, "accelerated": self.program}

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

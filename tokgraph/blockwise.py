"""Accelerated programs as one module of blocks over the model's own parameters: what distributed training takes hold of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.errors import BatchError, PlanError, StaleError
from tokgraph.ir.compilation import Compilation
from tokgraph.ir.names import STEP
from tokgraph.ir.program import is_training
from tokgraph.ir.spec import check_tasks
from tokgraph.ir.tensors import held

from .calls.copies import Copied
from .calls.cutting import AFTER, Added, Cut
from .calls.diagnosis import explain
from .calls.parted import PartedCall, PartedTask
from .calls.parts import GraphFailure, Holder, Inner, Part, Registered, kept_operators
from .calls.sharded import is_fsdp, parameters_as, views_allowed
from .calls.variants import Variants
from .runtime import Accelerated
from .task_module import no_autocast


class Blockwise(Copied, nn.Module):
    """Every task of accelerated programs in the parts of one model: ``prologue``, ``blocks``, ``epilogue``.

    Each part registers the parameters that only it reads, once for all tasks, in the user's own modules: what shards them
    here shards the user's model. The keys of the state are those of :meth:`tokgraph.Accelerated.state_dict`.

    Several programs of one model, made by other plans, are in one module: :meth:`use` says which is called. What their plans
    added under the same names, own projections and steps, they share from then on, as that of the first.

    Args:
        accelerated: the program; or name of a plan -> the program that it made, of which the first is in force.
        checkpoint: values of blocks that are computed again in the backward pass: ``False``: none; ``True``: all;
            operators: all but the results of these.

    Raises:
        PlanError: the programs are of several models, or what is to be kept are no operators.

    Attributes:
        prologue: what comes before the blocks: embeddings, encoders, masks, rows that are chosen by the batch alone.
        blocks: one :class:`~tokgraph.calls.parts.Part` for each decoder block.
        epilogue: what comes after them.
        shared: parameters that several parts read (tied weights, a layer that is used twice), and buffers.
    """

    def __init__(
        self, accelerated: Accelerated | Mapping[str, Accelerated], *, checkpoint: bool | Sequence[Any] = False
    ) -> None:
        super().__init__()
        self._programs: dict[str, Accelerated] = (
            {"": accelerated} if isinstance(accelerated, Accelerated) else dict(accelerated)
        )
        self._model = (_model_of(self._programs),)  # a tuple: no submodule
        self._plan = next(iter(self._programs))
        self._resting: set[str] = set()
        self._resting_for: str | None = None
        self._told_of_views = False  # FSDP2 warns that a result is a view, not to be written to: once is enough
        self._dtype: torch.dtype | None = None
        self._tasks = _parted(self._programs)
        every = [task for tasks in self._tasks.values() for task in tasks.values()]
        cuts = [task.cut_of(task.variants.first) for task in every]
        kept = kept_operators(checkpoint)
        self.prologue = Part()
        self.blocks = _Blocks(Part(kept) for _ in range(max(found.blocks for found in cuts)))
        self.epilogue = Part()
        self.shared = Inner()
        holders = dict(self._register(every, cuts))
        for task in every:
            task.holders = holders
        super().train(is_training(self._model[0]))

    @property
    def plan(self) -> str:
        """Name of the plan that is in force."""
        return self._plan

    def use(self, plan: str) -> Blockwise:
        """Let calls from now on run the program of another plan. Nothing is captured, cut or registered for it.

        Raises:
            PlanError: the module was made without it.
        """
        if plan not in self._programs:
            raise PlanError(
                f"the module holds no plan {plan!r}; it holds {', '.join(map(repr, self._programs))}",
                help="make it of all plans that are to come: tg.Blockwise({name: accelerated, ...})",
            )
        self._plan = plan
        return self

    @torch.compiler.disable(reason="module.compile() compiles what runs in its parts; what hands values on is Python")
    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """:meth:`forward`; FSDP2's hooks run in between, and what they gather is to know whether it learns."""
        if len(self._programs) > 1 and self._resting_for != self._plan and self._is_sharded():
            self._reshard()
            self._rest(self._plan)
        with views_allowed() if self._told_of_views else nullcontext():
            result = super().__call__(*args, **inputs)
        if not self._told_of_views and is_fsdp(self):
            self._told_of_views = any(isinstance(x, torch.Tensor) and x._is_view() for x in pytree.tree_leaves(result))
        return result

    def _rest(self, plan: str | None) -> None:
        """Let what only other plans added learn nothing: FSDP2 would give it gradients of zeros, by which AdamW decays it.

        Args:
            plan: that is in force; ``None``: let everything learn that did.
        """
        added = {name: p for program in self._programs.values() for name, p in program.own_parameters.items()}
        read = added if plan is None else self._programs[plan].own_parameters
        for name, p in added.items():
            if name not in read and p.requires_grad:
                p.requires_grad_(False)
                self._resting.add(name)
            elif name in read and name in self._resting:
                p.requires_grad_()
                self._resting.remove(name)
        self._resting_for = plan

    def _part(self, index: int) -> nn.Module:
        """As it is registered now: it may have been wrapped."""
        return self.prologue if index == 0 else self.epilogue if index == AFTER else self.blocks[index - 1]

    def _register(self, tasks: Sequence[PartedTask], cuts: Sequence[Cut]) -> Iterator[tuple[str, int]]:
        """Register what the tasks read; first name of a parameter -> the part that alone reads it."""
        readers: dict[str, set[int]] = {}
        places: dict[str, list[Registered]] = {}
        for task, found in zip(tasks, cuts, strict=True):
            for name, floor in found.readers():
                if at := task.places.of(name):
                    places[at[0].name] = at
                    readers.setdefault(at[0].name, set()).add(found.part(floor))
        for name, at in places.items():
            if len(readers[name]) == 1 and isinstance(at[0].now(), nn.Parameter):
                (part,) = readers[name]
                yield name, part
                self._part(part).hold(at)  # type: ignore[operator]
            else:
                self.shared.hold(at)

    def prepare(self, dtype: torch.dtype | None = None) -> Blockwise:
        """Capture the tasks of all plans for the mode and the region of autocast that hold here: sharded models cannot be.

        Args:
            dtype: the type that parameters and inputs will have in the forward, as ``param_dtype`` of FSDP2's
                ``MixedPrecisionPolicy`` gives them; ``None``: that of the model.
        """
        with parameters_as(self._model[0], dtype):
            for tasks in self._tasks.values():
                for task in tasks.values():
                    task.prepare(dtype)
        self._dtype = dtype
        return self

    @property
    def steps(self) -> dict[str, int]:
        """Task -> its training steps so far, of those that a plan drops at random from."""
        tasks = [item for program in self._programs.values() for item in program.items()]
        return {name: task.step for name, task in tasks if held(task.graph_module, STEP) is not None}

    @steps.setter
    def steps(self, numbers: Mapping[str, int]) -> None:
        for program in self._programs.values():
            for name, number in numbers.items():
                if name in program:
                    program[name].step = number

    def compile(  # type: ignore[override]
        self, mode: bool | str | Compilation = True, *, backend: str | Callable[..., Any] = "inductor"
    ) -> Blockwise:
        """Compile what runs in each part with ``torch.compile`` from the next call on; equal pieces of all plans once.

        Args:
            mode: as for :meth:`tokgraph.Accelerated.compile`; what is compiled at once is a block.
            backend: by what.
        """
        how = Compilation.of(mode)
        if how is not None and not isinstance(mode, Compilation):
            how = Compilation(how.mode, "block", backend)
        functions: dict[Any, Callable[..., Any]] = {}
        for tasks in self._tasks.values():
            for task in tasks.values():
                task.use(how, functions)
        return self

    def train(self, mode: bool = True) -> Blockwise:
        """Set the mode of the user's model, as a task of the program does."""
        if is_training(self._model[0]) is not mode:
            for program in self._programs.values():
                program.train(mode)
        return super().train(mode)

    def forward(
        self, task: str | None = None, batches: Mapping[str, Mapping[str, Any]] | None = None, **inputs: Any
    ) -> Any:
        """What the task's forward returns; of several tasks at once, ``{task: result}``.

        Args:
            task: the task of ``inputs``.
            batches: task -> its inputs by name: each part runs once, for all of them.
            inputs: the task's inputs by name. One that is called ``task`` or ``batches`` is given in ``batches``.

        Raises:
            BatchError: the inputs are not those that a graph was captured for, or hold another number of visual tokens.
            StaleError: the model is no longer what was captured.
        """
        if (task is None) is (batches is None) or (batches is not None and inputs) or batches == {}:
            raise BatchError(
                "a call needs a task and its inputs, or batches",
                help='module(task="generation", **inputs), or module(batches={"generation": inputs, ...})',
            )
        given: Mapping[str, Mapping[str, Any]] = {str(task): inputs} if batches is None else batches
        accelerated, tasks = self._programs[self._plan], self._tasks[self._plan]
        self._check_tasks(given)
        sharded = self._is_sharded()
        with ExitStack() as stack:
            calls = []
            for name, named in given.items():
                if accelerated[name].variants is not tasks[name].variants:
                    raise StaleError(
                        "the program was refreshed after this module was made",
                        help="make another: accelerated.module(), or tg.Blockwise of all plans",
                    )
                calls.append(tasks[name].call(named, sharded, self._dtype))
            stack.enter_context(no_autocast(calls[0].variant.autocast))
            for call in calls:
                stack.enter_context(call.begun(is_training(accelerated.model)))
            try:
                self._run(calls, sharded)
            except GraphFailure as failure:
                call = next(call for call in calls if call.graph.name == failure.task)
                if isinstance(failure.__cause__, torch._dynamo.exc.TorchDynamoException):
                    raise call.uncompiled(failure.__cause__, sharded) from failure.__cause__
                raise explain(call.graph, call.leaves, failure.__cause__, again=not sharded) from failure.__cause__  # type: ignore[arg-type]
            results = {call.graph.name: call.result(sharded) for call in calls}
        return results[task] if task is not None else results

    def _check_tasks(self, named: Iterable[str]) -> None:
        """Refuse tasks that there are not, in no plan or not in the one in force."""
        check_tasks(named, {name: task for tasks in self._tasks.values() for name, task in tasks.items()})
        for name in named:
            if name not in self._tasks[self._plan]:
                having = (repr(plan) for plan, tasks in self._tasks.items() if name in tasks)
                raise BatchError(
                    f"plan {self._plan!r} is in force, whose program has no task {name!r}",
                    help=f"module.use({' or '.join(having)})",
                )

    def _run(self, calls: Sequence[PartedCall], sharded: bool) -> None:
        """Run each part once, with what every call has to do there.

        Sharded parts run in any case, with values that go through, and with one that has a gradient as soon as a parameter
        before them has one: other processes, which may run other tasks, wait for them in the forward and in the backward pass.
        """
        learning = sharded and torch.is_grad_enabled() and _learns_any(self.shared)
        for index in (*range(len(self.blocks) + 1), AFTER):
            part = self._part(index)
            if learning:
                for call in calls:
                    call.learn(index)
            doing = [(call, step) for call in calls if (step := call.step(index, sharded)) is not None]
            if doing:
                given = [tuple(call.values[name] for name in step.inputs) for call, step in doing]
                with views_allowed() if sharded else nullcontext():
                    found = part([step for _, step in doing], given)
                for (call, step), values in zip(doing, found, strict=True):
                    call.take(step, values, index)
            learning = learning or (sharded and torch.is_grad_enabled() and _learns_any(part))

    def _is_sharded(self) -> bool:
        """Whether FSDP2 shards any part: the tensors that are registered then change from one moment to the next."""
        return any(is_fsdp(x) for x in self.modules())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._reshard()
        for program in self._programs.values():
            destination.update({f"{prefix}{name}": x for name, x in program.state_dict().items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._reshard()
        mine = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            keys = [program.load_state_dict(mine, strict=False, assign=assign) for program in self._programs.values()]
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + name for name in keys[0].missing_keys]  # of the model, which is that of all
        unexpected_keys += [
            prefix + name for name in keys[0].unexpected_keys if all(name in k.unexpected_keys for k in keys)
        ]

    def _reshard(self) -> None:
        """Let the registered tensors be the sharded ones, which a forward without backward leaves gathered."""
        for module in self.modules():
            if is_fsdp(module):
                module.reshard()  # type: ignore[operator]

    def keyed(self) -> nn.Module:
        """The same tensors under the names of the user's model, and of what the plan added.

        It is what ``torch.distributed.checkpoint.state_dict`` is to be given, which names tensors after the modules that
        register them: checkpoints are then those of the model, whatever it was trained as.
        """
        self._reshard()
        self._rest(
            None
        )  # an optimizer's state is saved and loaded for what learns; the next call lets the rest rest again
        model, found = self._model[0], Holder()
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            found.__dict__[name] = model.__dict__[name]
        found._modules.update(model._modules)
        for tasks in self._tasks.values():
            for task in tasks.values():
                found.hold(x for name in task.variants.first.graph.own_parameters() for x in task.places.of(name))
        return found


class _Blocks(nn.ModuleList):
    """Parts that save and load nothing: keys of the user's may begin as their names do."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing."""


def _model_of(programs: Mapping[str, Accelerated]) -> nn.Module:
    """The model of some programs.

    Raises:
        PlanError: there are no programs, or they are of several models.
    """
    models = {id(program.model): program.model for program in programs.values()}
    if len(models) != 1:
        raise PlanError(
            f"a module of blocks is made of programs of one model, these are of {len(models) or 'none'}",
            help="apply each plan to the same facts: tg.apply(facts, plan)",
        )
    return next(iter(models.values()))


def _parted(programs: Mapping[str, Accelerated]) -> dict[str, dict[str, PartedTask]]:
    """Plan -> task -> what calls it part by part; what the plans added to a task under the same names is one from now on."""
    variants: dict[str, list[Variants]] = {}
    for program in programs.values():
        for name, task in program.items():
            variants.setdefault(name, []).append(task.variants)
    for each in variants.values():
        for i, other in enumerate(each):
            for before in each[:i]:
                other.share_added(before)
    added = {name: Added([of.first.graph for of in each]) for name, each in variants.items()}
    return {
        plan: {name: PartedTask(program.model, task.variants, added[name]) for name, task in program.items()}
        for plan, program in programs.items()
    }


def _learns_any(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())

"""An accelerated program as one module of blocks over the model's own parameters: what distributed training takes hold of."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tokgraph.errors import BatchError, CompileError, StaleError
from tokgraph.ir.compilation import Compilation
from tokgraph.ir.names import STEP
from tokgraph.ir.program import TaskGraph, is_training
from tokgraph.ir.spec import check_tasks
from tokgraph.ir.tensors import held
from tokgraph.passes.lower.pieces import Piece, last_reads

from .calls.backends import backend_of
from .calls.compiled import gist, raise_what_is_wrong
from .calls.cutting import AFTER, Cut, Places, cut
from .calls.diagnosis import explain
from .calls.draws import Draws
from .calls.parts import GraphFailure, Holder, Inner, Part, Registered, Step, passing
from .calls.variants import Variant, Variants
from .runtime import Accelerated, no_autocast


class Blockwise(nn.Module):
    """Every task of an accelerated program in the parts of one model: ``prologue``, ``blocks``, ``epilogue``.

    Each part registers the parameters that only it reads, once for all tasks, in the user's own modules: what shards them
    here shards the user's model. The keys of the state are those of :meth:`tokgraph.Accelerated.state_dict`.

    Args:
        accelerated: the program.
        checkpoint: values of blocks that are computed again in the backward pass: ``False``: none; ``True``: all;
            operators: all but the results of these.

    Attributes:
        prologue: what comes before the blocks: embeddings, encoders, masks, rows that are chosen by the batch alone.
        blocks: one :class:`~tokgraph.calls.parts.Part` for each decoder block.
        epilogue: what comes after them.
        shared: parameters that several parts read (tied weights, a layer that is used twice), and buffers.
    """

    def __init__(self, accelerated: Accelerated, *, checkpoint: bool | Sequence[Any] = False) -> None:
        super().__init__()
        self._program = (accelerated,)  # a tuple: no submodule
        self._dtype: torch.dtype | None = None
        self._tasks = {name: _Task(accelerated.model, task.variants) for name, task in accelerated.items()}
        cuts = [task.cut_of(task.variants.first) for task in self._tasks.values()]
        kept = None if checkpoint is False else () if checkpoint is True else tuple(checkpoint)
        self.prologue = Part()
        self.blocks = _Blocks(Part(kept) for _ in range(max(found.blocks for found in cuts)))
        self.epilogue = Part()
        self.shared = Inner()
        holders = dict(self._register(cuts))
        for task in self._tasks.values():
            task.holders = holders
        super().train(is_training(accelerated.model))

    def _part(self, index: int) -> nn.Module:
        """As it is registered now: it may have been wrapped."""
        return self.prologue if index == 0 else self.epilogue if index == AFTER else self.blocks[index - 1]

    def _register(self, cuts: Sequence[Cut]) -> Iterator[tuple[str, int]]:
        """Register what the tasks read; first name of a parameter -> the part that alone reads it."""
        readers: dict[str, set[int]] = {}
        places: dict[str, list[Registered]] = {}
        for task, found in zip(self._tasks.values(), cuts, strict=True):
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
        """Capture the tasks for the mode and the region of autocast that hold here: sharded models cannot be captured.

        Args:
            dtype: the type that parameters and inputs will have in the forward, as ``param_dtype`` of FSDP2's
                ``MixedPrecisionPolicy`` gives them; ``None``: that of the model.
        """
        (accelerated,) = self._program
        with parameters_as(accelerated.model, dtype):
            for task in self._tasks.values():
                task.prepare(dtype)
        self._dtype = dtype
        return self

    @property
    def steps(self) -> dict[str, int]:
        """Task -> its training steps so far, of those whose plan drops at random."""
        return {name: task.step for name, task in self._program[0].items() if held(task.graph_module, STEP) is not None}

    @steps.setter
    def steps(self, numbers: Mapping[str, int]) -> None:
        for name, number in numbers.items():
            self._program[0][name].step = number

    def compile(  # type: ignore[override]
        self, mode: bool | str | Compilation = True, *, backend: str | Callable[..., Any] = "inductor"
    ) -> Blockwise:
        """Compile what runs in each part with ``torch.compile`` from the next call on; equal pieces of all tasks once.

        Args:
            mode: as for :meth:`tokgraph.Accelerated.compile`; what is compiled at once is a block.
            backend: by what.
        """
        how = Compilation.of(mode)
        if how is not None and not isinstance(mode, Compilation):
            how = Compilation(how.mode, "block", backend)
        functions: dict[Any, Callable[..., Any]] = {}
        for task in self._tasks.values():
            task.use(how, functions)
        return self

    def train(self, mode: bool = True) -> Blockwise:
        """Set the mode of the user's model, as a task of the program does."""
        (accelerated,) = self._program
        if is_training(accelerated.model) is not mode:
            accelerated.train(mode)
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
        check_tasks(given, self._tasks)
        (accelerated,) = self._program
        sharded = self._is_sharded()
        with ExitStack() as stack:
            calls = []
            for name, named in given.items():
                if accelerated[name].variants is not self._tasks[name].variants:
                    raise StaleError(
                        "the program was refreshed after this module was made",
                        help="make another: accelerated.module()",
                    )
                calls.append(self._tasks[name].call(named, sharded, self._dtype))
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

    def _run(self, calls: Sequence[_Call], sharded: bool) -> None:
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
                with _views_allowed() if sharded else nullcontext():
                    found = part([step for _, step in doing], given)
                for (call, step), values in zip(doing, found, strict=True):
                    call.take(step, values, index)
            learning = learning or (sharded and torch.is_grad_enabled() and _learns_any(part))

    def _is_sharded(self) -> bool:
        """Whether FSDP2 shards any part: the tensors that are registered then change from one moment to the next."""
        fsdp = sys.modules.get("torch.distributed.fsdp")  # else nothing is sharded by it
        return fsdp is not None and any(isinstance(x, fsdp.FSDPModule) for x in self.modules())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        (accelerated,) = self._program
        self._reshard()
        destination.update({f"{prefix}{name}": x for name, x in accelerated.state_dict().items()})

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
        (accelerated,) = self._program
        self._reshard()
        mine = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        try:
            keys = accelerated.load_state_dict(mine, strict=False)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + name for name in keys.missing_keys]
        unexpected_keys += [prefix + name for name in keys.unexpected_keys]

    def _reshard(self) -> None:
        """Let the registered tensors be the sharded ones, which a forward without backward leaves gathered."""
        if self._is_sharded():
            fsdp = sys.modules["torch.distributed.fsdp"]
            for module in self.modules():
                if isinstance(module, fsdp.FSDPModule):
                    module.reshard()

    def keyed(self) -> nn.Module:
        """The same tensors under the names of the user's model, and of what the plan added.

        It is what ``torch.distributed.checkpoint.state_dict`` is to be given, which names tensors after the modules that
        register them: checkpoints are then those of the model, whatever it was trained as.
        """
        (accelerated,) = self._program
        self._reshard()
        model, found = accelerated.model, Holder()
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            found.__dict__[name] = model.__dict__[name]
        found._modules.update(model._modules)
        for task in self._tasks.values():
            found.hold(x for name in task.variants.first.graph.own_parameters() for x in task.places.of(name))
        return found


class _Blocks(nn.ModuleList):
    """Parts that save and load nothing: keys of the user's may begin as their names do."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing."""


class _Task:
    """The graphs of a task, cut when they are first called.

    Args:
        model: the user's model.
        variants: the task's graphs.
    """

    def __init__(self, model: nn.Module, variants: Variants) -> None:
        self.variants = variants
        self.places = Places(model, variants.first.graph)
        self.holders: Mapping[str, int] = {}
        self._draws = Draws()
        self.use(None, {})

    def use(self, how: Compilation | None, functions: dict[Any, Callable[..., Any]]) -> None:
        """Run pieces from now on as they are, or compiled; equal ones are compiled once.

        Args:
            how: how they are compiled.
            functions: of other tasks, by what they compute.
        """
        self._how, self._functions = how, functions
        self._cuts: dict[int, Cut] = {}
        self._steps: dict[int, _Steps] = {}

    def _function(self, piece: Piece) -> Callable[..., Any]:
        if self._how is None:
            return piece.graph_module.forward
        if piece.key() not in self._functions:
            self._functions[piece.key()] = torch.compile(
                piece.graph_module.forward, backend=backend_of(self._how), fullgraph=True, dynamic=None
            )
        return partial(_with_open_sizes, self._functions[piece.key()], piece.open)

    def cut_of(self, variant: Variant) -> Cut:
        """A graph of the task in pieces."""
        if id(variant) not in self._cuts:  # variants are kept as long as their task is
            self._cuts[id(variant)] = cut(variant.graph, checking=self._how is None)
        return self._cuts[id(variant)]

    def prepare(self, dtype: torch.dtype | None) -> None:
        """Capture the task for the model as it is, and inputs of a type."""
        graph = self.variants.first.graph
        leaves = graph.flatten(graph.example())
        self.variants.current([_as(x, dtype) for x in leaves])

    def call(self, inputs: Mapping[str, Any], sharded: bool, dtype: torch.dtype | None) -> _Call:
        """A call of the task, checked."""
        leaves = self.variants.first.graph.flatten(inputs)
        variant = self.variants.of_sharded(dtype) if sharded else self.variants.current(leaves)
        error = variant.refuse(leaves)
        if error is not None:
            raise error
        if id(variant) not in self._steps:
            self._steps[id(variant)] = _Steps.of(self.cut_of(variant), self.places, self.holders, self._function)
        return _Call(variant, self._steps[id(variant)], self._draws, leaves)


@dataclass(frozen=True)
class _Steps:
    """What a graph does in each part.

    Args:
        cut: the graph in pieces.
        of_part: part -> the step there.
        read: name of a value -> the tensor that it is, of those that are not read inside of a part.
        last: part -> names of the values that nothing reads after it.
        writes: where the graph's last outputs are to be written: a tensor, or the position of an input.
    """

    cut: Cut
    of_part: Mapping[int, Step]
    read: Mapping[str, Registered]
    last: Mapping[int, Sequence[str]]
    writes: tuple[Registered | int, ...]

    @classmethod
    def of(
        cls, found: Cut, places: Places, holders: Mapping[str, int], function: Callable[[Piece], Callable[..., Any]]
    ) -> _Steps:
        """The steps over tensors that parts register.

        Args:
            found: the graph in pieces.
            places: where its tensors are registered.
            holders: first name of a parameter -> the part that registers it.
            function: what runs a piece.
        """
        registered = {value: places.read(name, found.graph) for value, name in found.tensors.items()}
        steps: dict[int, Step] = {}
        inside: set[str] = set()
        for piece in found.pieces:
            part = found.part(piece.floor)
            mine = {
                i: registered[name]
                for i, name in enumerate(piece.inputs)
                if name in registered and holders.get(registered[name].name) == part
            }
            inside |= {piece.inputs[i] for i in mine}
            others = tuple(name for i, name in enumerate(piece.inputs) if i not in mine)
            steps[part] = Step(found.graph.name, function(piece), mine, others, piece.outputs)
        return cls(
            found,
            steps,
            {value: x for value, x in registered.items() if value not in inside},
            dict(zip(steps, last_reads(found.pieces, found.outputs), strict=True)),
            tuple(x if isinstance(x, int) else places.read(x, found.graph) for x in found.writes),
        )


class _Call:
    """One call of a task.

    Args:
        variant: the graph for it.
        steps: what the graph does in each part.
        draws: recognises calls that are repeated.
        leaves: the inputs, in the order of the graph's.
    """

    def __init__(self, variant: Variant, steps: _Steps, draws: Draws, leaves: Sequence[Any]) -> None:
        self.variant, self.leaves = variant, leaves
        self.graph: TaskGraph = variant.graph
        self._steps, self._draws = steps, draws
        self.values: dict[str, Any] = {}

    @contextmanager
    def begun(self, training: bool) -> Iterator[None]:
        """Make the call, at its step, with the tensors that are registered now."""
        with self._draws.of_call(held(self.graph.graph_module, STEP) if training else None):
            self.values = dict(zip(self._steps.cut.inputs, self.leaves, strict=True))
            changing = {STEP, *(x.name for x in self._steps.writes if isinstance(x, Registered))}
            for name, x in self._steps.read.items():  # what is computed again must find what was there
                self.values[name] = x.now().clone() if x.name in changing else x.now()
            yield

    def step(self, part: int, sharded: bool) -> Step | None:
        """What the call does in a part; where that is nothing, and others wait for the part, values go through."""
        step = self._steps.of_part.get(part)
        if step is None and sharded:
            learned = [name for name, x in self.values.items() if _learns(x) and name not in self._steps.read]
            return passing(self.graph.name, learned)
        return step

    def learn(self, part: int) -> None:
        """Let a value that goes into a part have a gradient, where none has."""
        step = self._steps.of_part.get(part)
        given = [name for name in self.values if name not in self._steps.read and (not step or name in step.inputs)]
        if not any(_learns(self.values[name]) for name in given):
            for name in reversed(given):  # what was made last: the stream, rather than what all blocks read
                x = self.values[name]
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    self.values[name] = x.detach().requires_grad_()
                    return

    def take(self, step: Step, values: Sequence[Any], part: int) -> None:
        """Keep what came out of a step as long as anything reads it."""
        self.values.update(zip(step.outputs, values, strict=True))
        for name in self._steps.last.get(part, ()):
            self.values.pop(name, None)

    def uncompiled(self, failure: Exception, sharded: bool) -> CompileError:
        """The error for a piece that cannot be compiled, if nothing is wrong with the batch."""
        if not sharded:
            raise_what_is_wrong(self.graph, self.leaves)
        return CompileError(
            f"task {self.graph.name!r} cannot be compiled: {gist(failure)}",
            help="module.compile(False) runs operators one by one; accelerated[task].compile(by='block') names the block",
        )

    def result(self, sharded: bool) -> Any:
        """What the task's forward returns; what it writes into buffers and inputs is written, if its checks hold."""
        found = self._steps.cut
        outputs = [self.values[x] if isinstance(x, str) else x for x in found.outputs]
        for (message, inputs), ok in zip(found.checks, outputs[found.count :], strict=False):
            said = f"task {self.graph.name!r}: {message} (inputs: {', '.join(inputs)})"
            if ok.device.type != "cpu":
                torch._assert_async(ok, said)
            elif not ok:
                if not sharded:
                    raise_what_is_wrong(self.graph, self.leaves)
                raise BatchError(said, help="correct the batch")
        for into, new in zip(self._steps.writes, outputs[found.count + len(found.checks) :], strict=True):
            (self.leaves[into] if isinstance(into, int) else into.now()).copy_(new)
        return self.graph.unflatten(outputs)


def _as(x: Any, dtype: torch.dtype | None) -> Any:
    return x.to(dtype) if dtype is not None and isinstance(x, torch.Tensor) and x.is_floating_point() else x


@contextmanager
def parameters_as(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let floating-point parameters of a model be of a type, as FSDP2 gives them to a forward; buffers stay."""
    tables = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    made: dict[int, nn.Parameter] = {}
    try:
        for table, before in tables:
            for name, p in before.items():
                if dtype is not None and p is not None and p.is_floating_point() and p.dtype is not dtype:
                    table[name] = made.setdefault(id(p), nn.Parameter(p.detach().to(dtype), p.requires_grad))
        yield
    finally:
        for table, before in tables:
            table.update(before)


@contextmanager
def _views_allowed() -> Iterator[None]:
    """FSDP2 warns of parts that return views, which must not be written to: nothing here is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        yield


def _with_open_sizes(function: Callable[..., Any], sizes: Mapping[int, Sequence[int]], *given: Any) -> Any:
    """Call a compiled function, telling which dimensions of its arguments may have other sizes."""
    for i, dims in sizes.items():
        torch._dynamo.maybe_mark_dynamic(given[i], dims)
    return function(*given)


def _learns_any(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _learns(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad

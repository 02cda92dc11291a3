"""The user's own forward, run beside capture: what it keeps in Python is found, and the graph is held against it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.errors import CaptureError, TokgraphError, Where
from tokgraph.ir.conditions import Autocast
from tokgraph.ir.fidelity import CaptureCheck
from tokgraph.ir.frames import where_raised
from tokgraph.ir.precomputed import without_checkpoints
from tokgraph.ir.program import TaskGraph, model_device
from tokgraph.ir.spec import Task

from .autocast import in_autocast
from .buffers import rebound_buffers
from .check import Run, Runner, compare, copied
from .failures import does_not_run
from .fields import Fields, recorded_fields
from .flex import flex_with_gradients
from .precompute import precomputing
from .reads import Reads, is_setting, recorded_reads
from .state import Change, RandomState, State
from .uses import tracked
from .watch import Seen, check_hooks, place_of, watching

log = logging.getLogger(__name__)


def held_against_eager(
    model: nn.Module,
    name: str,
    task: Task,
    capture: Callable[[Task, Reads], TaskGraph],
    autocast: Autocast | None,
    whole: bool,
) -> TaskGraph:
    """Capture a task between runs of its forward, and compare them.

    The first run lets models build what they build lazily; what it builds stays. All else is put back: buffers, attributes,
    modes, random state; gradients are left alone.

    Args:
        model: the user's model.
        name: the task's name.
        task: the task.
        capture: traces the forward and cleans the graph up, given the task without what is precomputed, and what the forward
            reads of its modules.
        autocast: the region of autocast to capture in, whatever is active around.
        whole: whether the graph is complete, so that it can be compared.

    Raises:
        CaptureError: the forward does what a graph would lose, or the graph computes something else.
    """
    check_hooks(model, task.precomputed)
    random, first = RandomState.now(), State(model)
    built: set[tuple[str, str, str]] = set()
    try:
        device = model_device(model)
        with torch.inference_mode(False), in_autocast(autocast, device.type):
            inputs, users = copied(task.inputs, device), task
            task = precomputing(model, name, task, inputs, partial(_call, model, task, autocast))
            if device.type == "meta":
                with watching(model) as seen:
                    graph = capture(task, Reads())
                notes = _recomputation(seen)
                return replace(graph, check=CaptureCheck(skipped="the model is on the meta device", notes=notes))
            _check_trainable(model)
            eager = _Eager(model, name, task, copied(task.inputs, device), random, first, autocast)
            built |= eager.built
            return eager.judge(partial(capture, task), users, inputs, whole)
    finally:
        first.restore(lambda *key: key in built)
        random.set()


def _check_trainable(model: nn.Module) -> None:
    for path, p in model.named_parameters():
        if p.is_inference():
            raise CaptureError(
                f"the parameter {path} was made under torch.inference_mode(), and can never have a gradient",
                help="build the model outside of torch.inference_mode()",
            )


class _Eager:
    """A task's forward: warmed up, and run once for reference.

    Args:
        model: the user's model.
        name: the task's name.
        task: the task.
        inputs: its example batch, on the model's device.
        random: the state of the random generators for each run.
        first: the model's state before all runs.
        autocast: the region to run in.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        task: Task,
        inputs: Mapping[str, Any],
        random: RandomState,
        first: State,
        autocast: Autocast | None,
    ) -> None:
        self._model, self._name, self._inputs = model, name, inputs
        self._task, self._autocast = task, autocast
        with recorded_reads(model) as self._reads, recorded_fields(model, is_setting) as fields:
            without = self._warm_up(Runner(model, first, random))
        self.settled = State(model)
        self._runner = Runner(model, self.settled, random)
        with watching(model) as self._seen:
            self._reference = self._for_reference()
        changes = list(self.settled.changes())
        changing = {(c.path, c.table, c.name) for c in changes}
        self.settled.restore()
        for path, _, attribute in changing:  # what the forward sets itself is none of its settings
            self._reads.constants.get(path, {}).pop(attribute, None)
            self._reads.absent.get(path, set()).discard(attribute)
        self.built = {  # running statistics that come out the same twice (a momentum of 1) are not built, but kept up
            key
            for c in first.changes()
            if (key := (c.path, c.table, c.name)) not in changing and c.name != "training" and not c.unversioned
        }
        self._check_generators()
        self._check_fields(fields)
        self._check_changes(changes)
        self._notes = self._attributes([c for c in changes if not c.table])
        self._check_grad_mode(without)

    def _call(self, /, **inputs: Any) -> Any:
        return _call(self._model, self._task, self._autocast, **inputs)

    def _warm_up(self, runner: Runner) -> Run:
        """Run the forward once, without gradients, so that models which build tables lazily have built them."""
        try:
            with _ParameterWrites(self._model), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # what it says of missing gradients is our doing; other runs say the rest
                return runner.run(lambda: self._call(**self._inputs), grad=False, restore=False)
        except TokgraphError:
            raise
        except Exception as error:
            raise does_not_run(self._name, error, self._task.forward, self._model) from error

    def _for_reference(self) -> Run:
        try:
            return self._runner.run(lambda: self._call(**self._inputs), restore=False)
        except TokgraphError:
            raise
        except Exception as error:
            raise CaptureError(
                f"task {self._name!r}: forward and backward pass fail on the example batch: {type(error).__name__}: {error}",
                where=where_raised(error, self._model),
                help="call the forward and backward() on its loss yourself and make both run first",
            ) from error

    def judge(
        self, capture: Callable[[Reads], TaskGraph], users: Task, inputs: Mapping[str, Any], whole: bool
    ) -> TaskGraph:
        """The captured graph, compared with the forward.

        Args:
            capture: makes the graph.
            users: the task as the user wrote it: what is precomputed is compared as well.
            inputs: its example batch.
            whole: whether the graph can be compared.
        """
        with watching(self._model):
            graph = capture(self._reads)
        self.settled.restore()
        if not whole:
            return graph
        with in_autocast(None, model_device(self._model).type):  # the graph holds the casts of the region
            check = self._compared(graph, users, inputs)
        notes = (*self._notes, *self._recomputes(graph))
        for note in notes:
            log.warning("task %s: %s", self._name, note)
        return replace(graph, check=replace(check, notes=(*notes, *_beside(graph))))

    def _compared(self, graph: TaskGraph, users: Task, inputs: Mapping[str, Any]) -> CaptureCheck:
        """The graph, with what is precomputed for it, compared with the forward that the user wrote."""
        call = partial(_call, self._model, users, self._autocast)
        if users is self._task:
            return compare(self._runner, graph, call, self._reference, inputs)
        with without_checkpoints():  # through which torch.autograd.grad() does not go
            reference = self._runner.run(lambda: call(**inputs))
            return compare(self._runner, graph, call, reference, inputs)

    def _recomputes(self, graph: TaskGraph) -> tuple[str, ...]:
        if not self._seen.checkpoints:
            return ()

        def run() -> Any:
            return graph.graph_module(*graph.flatten(copied(self._inputs)))

        kept = []
        for call in (lambda: self._call(**self._inputs), run):
            self._runner.random.set()
            kept.append(_bytes_kept(call))
            self.settled.restore()
        return _recomputation(self._seen, (kept[0], kept[1]))

    def _check_generators(self) -> None:
        drawn = self._reference.random.other_generators(self._runner.random)
        if drawn:
            raise CaptureError(
                f"task {self._name!r}: the forward draws from {' and '.join(drawn)}: a graph would hold what it drew once",
                help="draw with torch (torch.rand, torch.randint) and use the result in tensors, or draw outside of the forward"
                " and pass it as an input",
            )
        if self._reference.random.same_tensors(self._runner.random):
            return
        elsewhere = Runner(self._model, self.settled, self._runner.random.elsewhere())
        again = elsewhere.run(lambda: self._call(**self._inputs), grad=False)
        if torch.equal(again.random.cpu, self._reference.random.cpu) and not torch.equal(
            again.random.cpu, self._runner.random.cpu
        ):
            raise CaptureError(
                f"task {self._name!r}: the forward seeds PyTorch's random generator: a graph draws from it as it is",
                help="seed before the call, or draw outside of the forward and pass what was drawn as an input",
            )

    def _check_changes(self, changes: Sequence[Change]) -> None:
        """Refuse changes that no call of a graph makes."""
        for c in changes:
            kept = c.table == "_buffers" and _like(c.before, c.after)
            if kept or (not c.table and c.name != "training" and (c.after is not c.before or not _is_tensor(c.after))):
                continue
            what, help = {
                "_parameters": ("the parameter", "change parameters outside of the forward: after a step, or before one"),
                "_buffers": ("shape or type of the buffer", "write into the buffer, in one shape; other values can be local"),
                "_modules": ("the submodule", "build submodules once"),
            }.get(c.table, ("the mode", "leave modes as they are")) if c.table or c.name == "training" else (
                "the tensor", "register it as a buffer: buffers are written as the forward does",
            )  # fmt: skip
            raise CaptureError(
                f"task {self._name!r}: the forward changes {what} {c.whole}, which a graph would not",
                where=Where(module=c.path or None),
                help=help,
            )

    def _check_fields(self, fields: Fields) -> None:
        """Take what was read of configurations for constants; refuse a field that the forward reads, and then sets.

        Raises:
            CaptureError: the next call would read something else.
        """
        for path, name in fields.changed(self._model):
            raise CaptureError(
                f"task {self._name!r}: the forward reads {path}.{name}, and sets it: a graph would hold one value for good",
                help="keep it in a buffer, as a tensor that the forward writes in place; or pass it as an input",
            )
        self._reads.constants.update(fields.read)

    def _attributes(self, changes: Sequence[Change]) -> tuple[str, ...]:
        """Notes on attributes that the forward sets; refused where what it computes depends on what the call before left."""
        if not changes:
            return ()
        self._runner.run(lambda: self._call(**self._inputs), restore=False)
        self.settled.restore(lambda path, table, name: not table)
        with tracked(self._model, changes) as uses:
            again = self._runner.run(lambda: self._call(**self._inputs))
        moved = not torch.equal(again.loss, self._reference.loss)
        left = []
        for c in changes:
            use = uses[id(dict(self._model.named_modules())[c.path]), c.name]
            if use.depends(isinstance(c.after, (list, dict, set))) or (moved and use.before):
                raise CaptureError(
                    f"task {self._name!r}: the forward reads the attribute {c.whole}, which the call before it set:"
                    " a graph would hold one value for good",
                    where=Where(
                        module=c.path or None, source=next(iter(use.elsewhere or use.reads or use.writes), None)
                    ),
                    help="keep it in a buffer, as a tensor that the forward writes in place; or pass it as an input",
                )
            if not use.after:
                left.append(c.whole)
        if not left:
            return ()
        more = f", and {len(left) - 3} more" if len(left) > 3 else ""
        return (f"the forward sets attributes that the captured graph leaves as they are: {', '.join(left[:3])}{more}",)

    def _check_grad_mode(self, without: Run) -> None:
        """Refuse a forward that computes something else where no gradients are recorded."""
        if torch.allclose(without.loss, self._reference.loss, rtol=1e-3, atol=0.0, equal_nan=True):
            return
        again = self._runner.run(lambda: self._call(**self._inputs), grad=False)
        with_grad = self._runner.run(lambda: self._call(**self._inputs))
        if torch.equal(again.loss, with_grad.loss) or not torch.equal(with_grad.loss, self._reference.loss):
            return  # the first run built something, or no two runs agree, which the comparison with the graph will say
        raise CaptureError(
            f"task {self._name!r}: the forward computes something else under torch.no_grad() (a loss of {float(again.loss):.6g}"
            f" instead of {float(with_grad.loss):.6g}): a graph holds one of the two",
            where=next(iter(self._seen.grad_modes), None),
            help="branch on a mode of the model (self.training) instead, and capture it in the mode wanted",
        )


def _call(model: nn.Module, task: Task, autocast: Autocast | None, /, **inputs: Any) -> Any:
    """A run of a task's forward."""
    region = nullcontext() if autocast is None else torch.autocast(autocast.device, autocast.dtype)
    with (
        rebound_buffers(model),
        region,
        flex_with_gradients(model_device(model).type),
    ):  # casts of parameters are shared
        return task.forward(model, **copied(inputs))


def _beside(graph: TaskGraph) -> tuple[str, ...]:
    """A note on what runs before the graph, which costs and pathways do not hold."""
    if graph.precomputed is None:
        return ()
    paths = ", ".join(graph.precomputed.paths)
    return (f"{paths}: computed before the graph, by the model's own code; costs and pathways are those of the graph",)


def _is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


def _like(a: object, b: object) -> bool:
    """Whether one tensor can be written into another."""
    return (
        isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
    )  # fmt: skip


def _bytes_kept(call: Callable[[], Any]) -> int:
    """Bytes of tensors that autograd keeps for the backward pass of a call, parameters among them."""
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(x)  # or another tensor might take its place
        return x

    held: list[torch.Tensor] = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call()
    return sum(kept.values())


def _recomputation(seen: Seen, kept: tuple[int, int] | None = None) -> tuple[str, ...]:
    """A note on gradient checkpointing inside the model, which graphs do not keep."""
    if not seen.checkpoints:
        return ()
    place = next((w.source or w.module for w in seen.checkpoints if w.source or w.module), "the model")
    more = "" if kept is None else f": {kept[1]:,} bytes instead of {kept[0]:,} on the example batch"
    return (
        f"the model recomputes activations (torch.utils.checkpoint at {place}), which the captured graph keeps instead{more}",
    )


class _ParameterWrites(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses operators that change a parameter of a model, before they do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
            for argument in func._schema.arguments:
                for x in pytree.tree_leaves(given.get(argument.name)) if argument.is_write else ():
                    name = self._names.get(x.untyped_storage()._cdata) if isinstance(x, torch.Tensor) else None
                    if name is not None:
                        raise CaptureError(
                            f"the forward changes the parameter {name} in place, which a graph would not",
                            where=place_of(self._model),
                            help="change parameters outside of the forward: after a step, or before one",
                        )
        return func(*args, **(kwargs or {}))

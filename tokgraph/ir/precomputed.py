"""What a task computes before its graph: submodules that run as the user wrote them, and whose results are inputs of the graph.

A call of the task runs the user's forward up to the last call of such a submodule (:meth:`Precomputed.complete`). The graph is
that of the same forward, in which these calls give the inputs that stand for their results (:meth:`Precomputed.__call__`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tokgraph.errors import BatchError, CaptureError, SpecError, TokgraphError, Where

from .frames import where_raised

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a result.

    Args:
        number: which of the result's tensors.
    """

    number: int


@dataclass(frozen=True)
class Shell:
    """A result without its tensors.

    Args:
        spec: its structure.
        leaves: a :class:`Slot`, a plain value or the shell of a dataclass for each leaf.
        of: the dataclass whose fields these are; ``None`` for what pytree knows.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    of: type | None = None

    def filled(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The result, of these tensors."""
        leaves = [
            tensors[x.number] if isinstance(x, Slot) else x.filled(tensors) if isinstance(x, Shell) else x
            for x in self.leaves
        ]
        found = pytree.tree_unflatten(leaves, self.spec)
        if self.of is None:
            return found
        made: Any = object.__new__(self.of)
        for name, x in found.items():
            object.__setattr__(made, name, x)
        return made


def parted(result: Any) -> tuple[list[torch.Tensor], Shell]:
    """The tensors of a result, each once, and what is left without them.

    Raises:
        TypeError: it holds something that is no tensor, no plain value and no structure of these.
    """
    found: dict[int, Slot] = {}
    tensors: list[torch.Tensor] = []

    def shell(x: Any, of: type | None = None) -> Shell:
        leaves, spec = pytree.tree_flatten(x)
        return Shell(spec, tuple(map(leaf, leaves)), of)

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            if id(x) not in found:
                found[id(x)] = Slot(len(tensors))
                tensors.append(x)
            return found[id(x)]
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return shell({f.name: getattr(x, f.name) for f in dataclasses.fields(x)}, type(x))
        if not isinstance(x, _PLAIN):
            raise TypeError(f"a {type(x).__name__}")
        return x

    return tensors, shell(result)


@dataclass(frozen=True)
class PrecomputedCall:
    """One call of a submodule in a forward.

    Args:
        path: what is called.
        shell: its result in the example batch, without its tensors.
        names: for each tensor of the result, the input that stands for it.
        trained: for each of them, whether gradients flow back into it.
    """

    path: str
    shell: Shell
    names: tuple[str, ...]
    trained: tuple[bool, ...]


class _Enough(BaseException):
    """Nothing of the rest of the forward is needed."""


class _Instead:
    """What takes the place of a method; no plain function, which capture would take for a setting of the module."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def called_at(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module, and the name of its method, that runs where ``path`` is called: for a module its call, with its hooks.

    Raises:
        SpecError: there is no module and no method of one by this path.
    """
    owner: Any = model
    *parts, last = path.split(".") if isinstance(path, str) else [""]
    for part in parts:
        owner = getattr(owner, part, None)
    found = getattr(owner, last, None) if isinstance(owner, nn.Module) and last else None
    if isinstance(found, nn.Module):
        return found, "_call_impl" if found._compiled_call_impl is None else "_compiled_call_impl"
    if not callable(found) or isinstance(found, type):
        raise SpecError(
            f"precomputed names {path!r}, which is no submodule of the model, and no method of one",
            help="give the path as it is in the model: 'model.visual', or 'model.get_image_features'",
        )
    return owner, last


@contextmanager
def replaced(model: nn.Module, calls: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let calls of submodules and methods run something else.

    Args:
        model: the user's model.
        calls: path -> what runs; it is given what runs otherwise, then the arguments.
    """
    with ExitStack() as stack:
        for path, call in calls.items():
            module, method = called_at(model, path)
            original = getattr(module, method)
            stack.callback(_put_back, module.__dict__, method, module.__dict__.get(method, _Enough))
            module.__dict__[method] = _Instead(partial(call, original))
        yield


def _put_back(attributes: dict[str, Any], name: str, before: Any) -> None:
    if before is _Enough:
        attributes.pop(name, None)
    else:
        attributes[name] = before


@dataclass
class Recorded:
    """What a forward called.

    Attributes:
        results: path and result of each call that was no part of another one.
        inside: whether one is running.
    """

    results: list[tuple[str, Any]] = field(default_factory=list)
    inside: bool = False


@contextmanager
def recording(model: nn.Module, paths: Sequence[str], enough: int | None = None) -> Iterator[Recorded]:
    """Record calls of submodules in a forward that runs inside.

    Args:
        model: the user's model.
        paths: the submodules and methods.
        enough: end the forward after so many calls.
    """
    recorded = Recorded()

    def run(path: str, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if recorded.inside:
            return original(*args, **kwargs)
        recorded.inside = True
        try:
            result = original(*args, **kwargs)
        finally:
            recorded.inside = False
        recorded.results.append((path, result))
        if len(recorded.results) == enough:
            raise _Enough
        return result

    calls = {path: partial(run, path) for path in paths}
    with replaced(model, calls), without_checkpoints(lambda: not recorded.inside), suppress(_Enough):
        yield recorded


@contextmanager
def without_checkpoints(where: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Let reentrant checkpoints keep what they compute: results inside of one have no gradients until it is recomputed.

    Args:
        where: whether one that is met is left out; others stay.
    """
    from torch.utils.checkpoint import CheckpointFunction  # imports torch._dynamo, which takes a second

    apply = CheckpointFunction.apply

    def run(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args) if where() else apply(function, preserve, *args)

    with mock.patch.object(CheckpointFunction, "apply", staticmethod(run)):
        yield


@dataclass(frozen=True)
class Precomputed:
    """The forward of a task whose precomputed calls are inputs; it takes the user's inputs and these.

    Args:
        model: the user's model.
        task: the task's name.
        forward: what the user wrote.
        paths: the submodules and methods that are precomputed.
        calls: their calls, in order.
    """

    model: nn.Module
    task: str
    forward: Callable[..., Any]
    paths: tuple[str, ...]
    calls: tuple[PrecomputedCall, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that stand for results."""
        return tuple(name for call in self.calls for name in call.names)

    @property
    def trained(self) -> tuple[str, ...]:
        """Those of them that gradients flow back into."""
        return tuple(n for call in self.calls for n, trained in zip(call.names, call.trained, strict=True) if trained)

    def __call__(self, model: nn.Module, /, **inputs: Any) -> Any:
        """The user's forward, whose precomputed calls give what the inputs say."""
        given = {name: inputs.pop(name) for name in self.names}
        left = iter(self.calls)

        def give(path: str, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            call = next(left, None)
            if call is None or call.path != path:
                raise CaptureError(
                    f"task {self.task!r}: {path} is called otherwise when its results are given than when it runs",
                    where=Where(module=path),
                    help="call precomputed submodules whatever they return, in one order",
                )
            return call.shell.filled([given[name] for name in call.names])

        with replaced(model, {path: partial(give, path) for path in self.paths}):
            return self.forward(model, **inputs)

    def complete(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs, and what the precomputed calls give for them, with its gradients; what is given already stays.

        Args:
            inputs: those of the user's forward.

        Raises:
            BatchError: the calls are others than those of the example batch, or give results of another structure.
        """
        if all(name in inputs for name in self.names):
            return dict(inputs)
        return {**inputs, **torch.compiler.disable(self._computed)(inputs)}

    def aside(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As :meth:`complete`, without gradients, and with the model's buffers left as they are."""
        before = [(x, x.clone()) for x in self.model.buffers()]
        try:
            with torch.no_grad():
                return self.complete(inputs)
        finally:
            for x, was in before:
                with torch.no_grad():
                    x.copy_(was)

    def _computed(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        mine = {key: x for key, x in inputs.items() if key not in self.names}
        try:
            with recording(self.model, self.paths, len(self.calls)) as recorded:
                self.forward(self.model, **mine)
        except (TokgraphError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise BatchError(
                f"task {self.task!r}: what is precomputed ({', '.join(self.paths)}) fails on this batch: {line}",
                where=where_raised(error, self.model),
                help="it runs by the model's own code, which refuses this batch without tokgraph as well",
            ) from error
        if [path for path, _ in recorded.results] != [call.path for call in self.calls]:
            raise self._other(
                f"calls {len(recorded.results)} precomputed submodules, and {len(self.calls)} in the example"
            )
        found: dict[str, torch.Tensor] = {}
        for call, (_, result) in zip(self.calls, recorded.results, strict=True):
            try:
                tensors, shell = parted(result)
            except TypeError as error:
                raise self._other(f"gets {error} from {call.path}") from None
            if len(tensors) != len(call.names):
                raise self._other(f"gets {len(tensors)} tensors from {call.path}, and {len(call.names)} in the example")
            if shell != call.shell:
                raise self._other(
                    f"gets another structure, or other plain values, from {call.path} than in the example"
                )
            found.update(zip(call.names, tensors, strict=True))
        return found

    def _other(self, text: str) -> BatchError:
        return BatchError(
            f"task {self.task!r}: for this batch the forward {text} batch",
            help="a graph takes one number of calls and of tensors: make batches alike in what the submodule returns lists "
            "of, or precompute a method that returns one tensor",
        )

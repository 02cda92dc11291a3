"""Calls of tasks part by part: what each has to do in a part, and the values that lead from part to part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tokgraph.errors import BatchError, CompileError
from tokgraph.ir.compilation import Compilation
from tokgraph.ir.names import STEP
from tokgraph.ir.program import TaskGraph
from tokgraph.ir.tensors import held
from tokgraph.passes.lower.pieces import Piece, last_reads

from .backends import backend_of
from .compiled import gist, raise_what_is_wrong
from .cutting import Added, Cut, Places, cut
from .draws import Draws
from .parts import Registered, Step, passing
from .variants import Variant, Variants


class PartedTask:
    """The graphs of a task, cut when they are first called.

    Args:
        model: the user's model.
        variants: the task's graphs.
        added: what plans added to the task.
    """

    def __init__(self, model: nn.Module, variants: Variants, added: Added) -> None:
        self.variants = variants
        self.places = Places(model, variants.first.graph, added)
        self.holders: Mapping[str, int] = {}
        self._draws = Draws()
        self.use(None, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> PartedTask:
        """Cut and compiled when it is first called, as any: pieces read the tensors of this one."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        memo.setdefault(id(self._functions), {})  # one for all tasks
        rest = {**self.__dict__, "_cuts": {}, "_steps": {}}
        made.__dict__.update({name: copy.deepcopy(x, memo) for name, x in rest.items()})
        return made

    def use(self, how: Compilation | None, functions: dict[Any, Callable[..., Any]]) -> None:
        """Run pieces from now on as they are, or compiled; equal ones are compiled once.

        Args:
            how: how they are compiled.
            functions: of other tasks, by what they compute.
        """
        self._how, self._functions = how, functions
        self._cuts: dict[Variant, Cut] = {}
        self._steps: dict[Variant, _Steps] = {}

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
        if variant not in self._cuts:
            self._cuts[variant] = cut(variant.graph, checking=self._how is None)
        return self._cuts[variant]

    def prepare(self, dtype: torch.dtype | None) -> None:
        """Capture the task for the model as it is, and inputs of a type."""
        graph = self.variants.first.graph
        leaves = graph.flatten(graph.example())
        self.variants.current([_as(x, dtype) for x in leaves])

    def call(self, inputs: Mapping[str, Any], sharded: bool, dtype: torch.dtype | None) -> PartedCall:
        """A call of the task, checked."""
        leaves = self.variants.first.graph.flatten(inputs)
        variant = self.variants.of_sharded(dtype) if sharded else self.variants.current(leaves)
        error = variant.refuse(leaves)
        if error is not None:
            raise error
        if variant not in self._steps:
            self._steps[variant] = _Steps.of(self.cut_of(variant), self.places, self.holders, self._function)
        return PartedCall(variant, self._steps[variant], self._draws, leaves)


@dataclass(frozen=True)
class _Steps:
    """What a graph does in each part.

    Args:
        cut: the graph in pieces.
        of_part: part -> the step there.
        read: name of a value -> the tensor that it is, of those that are not read inside of a part.
        given: name of a value -> the tensor that it is, of those that are read inside of a part and are outputs.
        last: part -> names of the values that nothing reads after it.
        writes: where the graph's last outputs are to be written: a tensor, or the position of an input.
    """

    cut: Cut
    of_part: Mapping[int, Step]
    read: Mapping[str, Registered]
    given: Mapping[str, Registered]
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
            {value: x for value, x in registered.items() if value in inside and value in found.outputs.names},
            dict(zip(steps, last_reads(found.pieces, found.outputs.names), strict=True)),
            tuple(x if isinstance(x, int) else places.read(x, found.graph) for x in found.writes),
        )


class PartedCall:
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
        given = {name: x.now() for name, x in self._steps.given.items()}
        outputs = found.outputs.of({**given, **self.values})
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


def _with_open_sizes(function: Callable[..., Any], sizes: Mapping[int, Sequence[int]], *given: Any) -> Any:
    """Call a compiled function, telling which dimensions of its arguments may have other sizes."""
    for i, dims in sizes.items():
        torch._dynamo.maybe_mark_dynamic(given[i], dims)
    return function(*given)


def _learns(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad

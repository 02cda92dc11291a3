"""A task's graph compiled by PyTorch: its checks are made outside of what is compiled, with the messages of the graph."""

from __future__ import annotations

import copy
import operator
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tokgraph.errors import CompileError, InternalError, Where
from tokgraph.ir.compilation import Compilation
from tokgraph.ir.node import is_write, module_path, where
from tokgraph.ir.program import TaskGraph
from tokgraph.passes.lower.functional import functional
from tokgraph.passes.lower.pieces import Outputs, Piece, last_reads, pieces

from .backends import backend_of
from .diagnosis import FAILURES

_RECORDED = ("reduce-overhead", "max-autotune")
"""Modes that record CUDA graphs."""


class Compiled:
    """A task's graph, compiled when it is first called; it computes on the tensors that the graph module holds then.

    Args:
        graph: the task's graph.
        how: how it is compiled.
    """

    def __init__(self, graph: TaskGraph, how: Compilation) -> None:
        self.graph = graph
        self.how = how
        self._lowered = functional(graph)
        self._inputs = [node.name for node in self._lowered.graph_module.graph.find_nodes(op="placeholder")]
        self._outputs = Outputs(self._lowered.graph_module)
        self._tensors = [operator.attrgetter(target) for target in self._lowered.tensors]
        self._pieces = self._compiled(pieces(self._lowered.graph_module, how.by))
        self._read_last = last_reads([piece for piece, _ in self._pieces], self._outputs.names)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        """Compiled when it is first called, as any: what PyTorch compiled reads nothing of a copy."""
        return Compiled(copy.deepcopy(self.graph, memo), self.how)

    @property
    def functions(self) -> int:
        """How many different functions are compiled."""
        return len({id(function) for _, function in self._pieces})

    def __call__(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The task's flat outputs.

        Raises:
            BatchError: a check does not hold for the batch; on the CPU as the graph raises it, before anything is written.
            CompileError: the graph cannot be compiled.
        """
        lowered, module = self._lowered, self.graph.graph_module
        values = self._values(leaves)
        try:
            self._run(values)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as failure:
            self._run_uncompiled(leaves)  # which raises what is wrong with the batch, if anything is
            if isinstance(failure, torch._dynamo.exc.TorchDynamoException):
                raise self._error(failure, leaves) from failure
            raise
        outputs = self._outputs.of(values)
        written = outputs[lowered.outputs + len(lowered.checks) :]
        self._check(outputs[lowered.outputs :], leaves)
        for into, new in zip(lowered.writes, written, strict=True):
            (leaves[into] if isinstance(into, int) else operator.attrgetter(into)(module)).copy_(new)
        return outputs[: lowered.outputs]

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether all that the graph checks of a batch holds; nothing raises, and nothing is written."""
        with torch.no_grad():
            found = self._lowered.graph_module(*self._values(leaves).values())
        return all(map(bool, found[self._lowered.outputs :][: len(self._lowered.checks)]))

    def _compiled(self, cut: list[Piece]) -> list[tuple[Piece, Callable[..., Any]]]:
        known: dict[Any, Callable[..., Any]] = {}
        for piece in cut:
            if piece.key() not in known:
                known[piece.key()] = torch.compile(
                    piece.graph_module.forward, backend=backend_of(self.how), fullgraph=True, dynamic=None
                )
        return [(piece, known[piece.key()]) for piece in cut]

    def _values(self, leaves: Sequence[Any]) -> dict[str, Any]:
        module = self.graph.graph_module
        held = [tensor(module) for tensor in self._tensors]
        if self.how.by == "graph" and self.how.mode in _RECORDED:
            for x in held:  # a recorded CUDA graph reads them where they are, instead of copies made for each step
                torch._dynamo.mark_static_address(x, guard=False)
        return dict(zip(self._inputs, [*leaves, *held], strict=True))

    def _run(self, values: dict[str, Any]) -> None:
        """Run the pieces, each on values by name, which their results join and what no further piece reads leaves."""
        for (piece, function), read_last in zip(self._pieces, self._read_last, strict=True):
            given = [values[name] for name in piece.inputs]
            for i, dims in piece.open.items():
                torch._dynamo.maybe_mark_dynamic(given[i], dims)
            try:
                found = function(*given)
            except torch._dynamo.exc.TorchDynamoException as failure:
                failure.tokgraph_piece = piece  # type: ignore[attr-defined]
                raise
            values.update(zip(piece.outputs, found, strict=True))
            given.clear()
            for name in read_last:
                del values[name]

    def _check(self, holds: Sequence[torch.Tensor], leaves: Sequence[Any]) -> None:
        for (message, inputs), ok in zip(self._lowered.checks, holds, strict=False):
            if ok.device.type != "cpu":
                torch._assert_async(ok, f"task {self.graph.name!r}: {message} (inputs: {', '.join(inputs)})")
            elif not ok:
                self._run_uncompiled(leaves)
                raise InternalError(f"task {self.graph.name!r}: a check holds for the graph, not for its compiled code")

    def _run_uncompiled(self, leaves: Sequence[Any]) -> None:
        raise_what_is_wrong(self.graph, leaves)

    def _failing_block(self, leaves: Sequence[Any]) -> tuple[Piece, Exception] | None:
        """The block that cannot be compiled, where the whole graph cannot: found by compiling them one by one."""
        alone = Compiled(self.graph, replace(self.how, by="block"))
        try:
            alone._run(alone._values(leaves))
        except torch._dynamo.exc.TorchDynamoException as failure:
            return failure.tokgraph_piece, failure  # type: ignore[attr-defined]
        except Exception:
            return None
        return None

    def _error(self, failure: Exception, leaves: Sequence[Any]) -> CompileError:
        piece = getattr(failure, "tokgraph_piece", None)
        if self.how.by == "graph":
            piece, failure = self._failing_block(leaves) or (piece, failure)
        at = "" if piece is None else f", at {piece.title}"
        return CompileError(
            f"task {self.graph.name!r} cannot be compiled by {self.how.title}{at}: {gist(failure)}",
            where=None if piece is None else _place(piece, str(failure)),
            help="the graph runs without compile=; if torch.compile takes the model's own forward, please report it",
        )


def raise_what_is_wrong(graph: TaskGraph, leaves: Sequence[Any]) -> None:
    """Run a task's graph operator by operator, for the error that it raises; it writes nothing."""
    with torch.no_grad():
        _WithoutWrites(graph.graph_module).run(*leaves, enable_io_processing=False)


class _WithoutWrites(fx.Interpreter):
    """Runs a graph that keeps its buffers."""

    extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        return None if is_write(n) else super().run_node(n)


def gist(failure: Exception) -> str:
    """The line of an error that says what happened: PyTorch's have a page of advice around it; or where, if none does."""
    cause = getattr(failure, "inner_exception", None) or failure.__cause__ or failure
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not lines and (frames := traceback.extract_tb(cause.__traceback__)):
        lines = [f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


def _place(piece: Piece, said: str) -> Where:
    """The operator of a piece that an error names, or the module that the piece is of."""
    calls = [node for node in piece.graph_module.graph.nodes if node.op == "call_function"]
    named = next((node for node in calls if str(node.target) in said), None)
    if named is not None:
        return where(named)
    paths = {path for node in calls if (path := module_path(node))}
    return Where(module=os.path.commonpath(p.replace(".", "/") for p in paths).replace("/", ".") if paths else None)

"""Profiled runs of task graphs in PyTorch, by ``torch.profiler``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, profile, record_function

from tokgraph.export.files import NodePlace
from tokgraph.ir.program import TaskGraph
from tokgraph.passes.device import on_device
from tokgraph.passes.lower import places_of
from tokgraph.passes.lower.graph import Source
from tokgraph.passes.lower.origins import Origins

from .events import Event, RunProfile

_MARK = "tokgraph"


class TorchSubject:
    """A task's graph with inputs, run with or without its backward pass.

    Args:
        graph: the captured or rewritten graph.
        inputs: the task's inputs.
        variant: ``"accelerated"`` or ``"baseline"``.
        kind: ``"forward"`` or ``"train-step"``.
        device: where to run.
    """

    def __init__(
        self,
        graph: TaskGraph,
        inputs: Mapping[str, Any],
        variant: str,
        kind: str,
        device: torch.device,
    ) -> None:
        self.task, self.variant, self.graph = graph.name, variant, kind
        graph = on_device(graph, device)
        self._module = graph.graph_module
        self._places = places_of(graph)
        self._leaves = [x.to(device) if isinstance(x, torch.Tensor) else x for x in graph.flatten(inputs)]
        self._loss = Source(graph).loss
        self._parameters = [p for p in graph.graph_module.parameters() if p.requires_grad]
        self._device = device
        self._profiles: list[RunProfile] = []
        self._profiling = False

    def run(self) -> float:
        """Seconds of one run."""
        return self._profiled_run() if self._profiling else self._timed(self._step)

    def start_profiling(self) -> None:
        """Profile the runs that follow."""
        self._profiling = True

    def profiled(self) -> list[RunProfile]:
        """The profiles of all runs since :meth:`start_profiling`."""
        return self._profiles

    def _timed(self, step: Callable[[], None]) -> float:
        self._wait()
        start = perf_counter()
        step()
        self._wait()
        return perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _step(self, run: Callable[..., Any] | None = None, mark: Callable[[torch.Tensor], None] | None = None) -> None:
        training = self.graph != "forward"
        with torch.set_grad_enabled(training):
            loss = (run or self._module)(*self._leaves)[self._loss]
            if training:
                if mark is not None:
                    mark(loss)
                torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def _profiled_run(self) -> float:
        marked = _Marked(self._module)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            wall = self._timed(lambda: self._step(marked.run, marked.mark))
        ranges = [e for e in profiler.events() if e.name.startswith(f"{_MARK}|") and e.device_type.name == "CPU"]
        begin = min((e.time_range.start for e in ranges), default=0.0)
        events = tuple(self._event(e, begin) for e in sorted(ranges, key=lambda e: e.time_range.start))
        self._profiles.append(RunProfile(wall, events))
        return wall

    def _event(self, event: Any, begin: float) -> Event:
        _, phase, name = event.name.split("|", 2)
        place = self._places.get(name)
        known = None if place is None else NodePlace(name, place.module, place.block, place.kind, phase)
        time = event.device_time_total if self._device.type == "cuda" else event.cpu_time_total
        return Event(f"{name} ({phase})", known, (event.time_range.start - begin) / 1e6, time / 1e6)


class _Marked(fx.Interpreter):
    """Runs a graph so that the profiler sees a range for each node, and for each node's backward."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._origins: Origins[str] = Origins()
        self._open: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        """The node's result."""
        if n.op != "call_function":
            return super().run_node(n)
        with record_function(f"{_MARK}|forward|{n.name}"), self._origins.recording(n.name):
            return super().run_node(n)

    def mark(self, loss: torch.Tensor) -> None:
        """Let each function that autograd runs for ``loss`` be a range."""
        for function, name in self._origins.functions(loss):
            function.register_prehook(lambda _, name=name: self._enter(name or "accumulate"))
            function.register_hook(lambda *_: self._leave())

    def _enter(self, name: str) -> None:
        opened = record_function(f"{_MARK}|backward|{name}")
        opened.__enter__()
        self._open.append(opened)

    def _leave(self) -> None:
        self._open.pop().__exit__(None, None, None)

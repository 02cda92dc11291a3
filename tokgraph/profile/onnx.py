"""Profiled runs of exported graphs in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from tokgraph.export.files import ExportedFile, NodePlace
from tokgraph.export.session import Device, Session

from .events import Event, RunProfile

_SUFFIX = "_kernel_time"
_LAYOUTS = ("_nchwc", "_nhwc")


class OnnxSubject:
    """An exported graph with inputs.

    Args:
        file: the graph.
        inputs: input -> tensor.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of an operator; 0: as many as the machine has cores.
    """

    def __init__(
        self, file: ExportedFile, inputs: Mapping[str, torch.Tensor], device: Device, threads: int = 0
    ) -> None:
        self.task, self.variant, self.graph = file.task, file.variant, file.kind
        self._file = file
        self._inputs = inputs
        self._device: Device = device
        self._threads = threads
        self._folder: TemporaryDirectory[str] | None = None
        self._start(None)

    def _start(self, profile: Path | None) -> None:
        self._session = Session(self._file.path, self._device, threads=self._threads, profile=profile)
        self._feeds = self._session.feeds(self._inputs)

    def run(self) -> float:
        """Seconds of one run."""
        start = perf_counter()
        self._session.execute(self._feeds)
        return perf_counter() - start

    def start_profiling(self) -> None:
        """Begin anew, with profiling."""
        self._folder = TemporaryDirectory()
        self._start(Path(self._folder.name) / "profile")

    def profiled(self) -> list[RunProfile]:
        """The profiles of all runs since :meth:`start_profiling`."""
        assert self._folder is not None
        events = json.loads(self._session.end_profiling().read_text(encoding="utf-8"))
        self._folder.cleanup()
        return read_profile(events, self._file.nodes)


def read_profile(events: list[dict[str, object]], nodes: Mapping[str, NodePlace]) -> list[RunProfile]:
    """Runs from the events that ONNX Runtime's profiler wrote.

    Args:
        events: Chrome trace events; times are microseconds.
        nodes: name of an exported node -> its place.
    """
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=_start)
    kernels = [e for e in events if e.get("cat") == "Node" and str(e.get("name")).endswith(_SUFFIX)]
    kernels.sort(key=_start)
    found = []
    for run in runs:
        begin, end = _start(run), _start(run) + _length(run)
        mine = [e for e in kernels if begin <= _start(e) < end]
        found.append(
            RunProfile(_length(run) / 1e6, tuple(_event(e, begin, nodes) for e in mine)),
        )
    return found


def _start(event: Mapping[str, object]) -> float:
    return float(event["ts"])  # type: ignore[arg-type]


def _length(event: Mapping[str, object]) -> float:
    return float(event["dur"])  # type: ignore[arg-type]


def _event(event: Mapping[str, object], begin: float, nodes: Mapping[str, NodePlace]) -> Event:
    name = str(event["name"]).removesuffix(_SUFFIX)
    return Event(name, place_of(name, nodes), (_start(event) - begin) / 1e6, _length(event) / 1e6)


def place_of(name: str, nodes: Mapping[str, NodePlace]) -> NodePlace | None:
    """The place of a node that ONNX Runtime may have fused: it appends to the name of one of those it replaces."""
    base = name.split("/")[0]
    for known in (name, base, *(base.removesuffix(layout) for layout in _LAYOUTS)):
        for candidate in (known, f"node_{known}"):
            if candidate in nodes:
                return nodes[candidate]
    while "_" in base:  # as in node_add_token_12
        base = base.rpartition("_")[0]
        if base in nodes:
            return nodes[base]
    return None

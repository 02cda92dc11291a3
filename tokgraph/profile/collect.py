"""Runs of all subjects, interleaved, first timed and then profiled, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from tokgraph.errors import DependencyError, ExportError, TokgraphError
from tokgraph.export.files import BASELINE, ExportedFile, find_exported
from tokgraph.export.session import Device
from tokgraph.ir.program import Program, is_meta, model_device
from tokgraph.ir.rates import Rates
from tokgraph.measurement import program_rates
from tokgraph.passes.capture.state import State

from .eager import TorchSubject
from .events import RunProfile, spread, summarise_runs
from .onnx import OnnxSubject
from .promise import kept_promise

SCHEMA = 1
Inputs = Mapping[str, Mapping[str, Any]]


class Subject(Protocol):
    """What can be run, timed and profiled."""

    task: str
    variant: str
    graph: str

    def run(self) -> float:
        """Seconds of one run."""

    def start_profiling(self) -> None:
        """Profile the runs that follow."""

    def profiled(self) -> list[RunProfile]:
        """The profiles of these runs."""


def profile_exported(
    folder: Path,
    inputs: Callable[[ExportedFile], Mapping[str, torch.Tensor]],
    *,
    device: Device = "cpu",
    threads: int = 0,
    runs: int = 10,
    warmup: int = 3,
    kinds: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, list[RunProfile]]]:
    """Profile the exported graphs of a folder in ONNX Runtime.

    Args:
        folder: what :func:`tokgraph.export.export_onnx` wrote.
        inputs: exported graph -> its inputs.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of an operator; 0: as many as the machine has cores.
        runs: measured runs of each graph.
        warmup: runs before them that do not count.
        kinds: graphs to take (``"forward"``, ...); ``None``: all.
        progress: called with what is done next.

    Returns:
        Schema 1 (:func:`measure`), and label -> profiles of the runs.

    Raises:
        ExportError: there are no such graphs, or one does not run.
        DependencyError: ONNX Runtime cannot run on the device.
    """
    files = [file for file in find_exported(folder) if kinds is None or file.kind in kinds]
    if not files:
        raise ExportError(f"{folder} holds no exported graphs of kind {', '.join(kinds or ())}")
    subjects = [OnnxSubject(file, inputs(file), device, threads) for file in files]
    found, profiles = measure(subjects, runs, warmup, progress)
    return {**found, "runtime": "onnxruntime", "device": device, "threads": threads}, profiles


def profile_programs(
    programs: Mapping[str, Program],
    inputs: Inputs,
    *,
    kinds: Sequence[str] = ("forward", "train-step"),
    device: Device | None = None,
    runs: int = 10,
    warmup: int = 3,
    rates: Rates | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, list[RunProfile]]]:
    """Profile programs in PyTorch.

    Args:
        programs: variant (``"accelerated"``, ``"baseline"``) -> program, over one model.
        inputs: task -> batch.
        kinds: ``"forward"``, ``"train-step"`` (with the backward pass).
        device: where the model must be; ``None``: wherever it is.
        runs: measured runs of each graph.
        warmup: runs before them that do not count.
        rates: of the machine; default: measured now.
        progress: called with what is done next.

    Returns:
        Schema 1 (:func:`measure`) with the ``rates`` and, where there is a baseline, ``promises``: for each task and graph
        :func:`~.promise.kept_promise`. And label -> profiles of the runs.

    Raises:
        DependencyError: the device is not there.
        TokgraphError: the model has no values, or is on another device.
    """
    model = next(iter(programs.values())).model
    where = _device(model, device)
    known = [kind for kind in kinds if kind in ("forward", "train-step")]
    if not known:
        raise TokgraphError(f"PyTorch runs no {', '.join(kinds)}", help="profile forward or train-step")
    subjects = [
        TorchSubject(graph, inputs[name], variant, kind, where)
        for kind in known
        for variant, program in programs.items()
        for name, graph in program.items()
    ]
    state = State(model)
    try:
        rates = rates or program_rates(next(iter(programs.values())))
        found, profiles = measure(subjects, runs, warmup, progress)
    finally:
        state.restore()  # runs that train may write buffers
    promises = [_promise(ratio, programs, rates, profiles) for ratio in found["ratios"]]
    machine = {"runtime": "torch", "device": where.type, "threads": torch.get_num_threads(), "rates": rates.to_data()}
    return {**found, **machine, "promises": promises}, profiles


def _promise(
    ratio: dict[str, Any], programs: Mapping[str, Program], rates: Rates, profiles: Mapping[str, list[RunProfile]]
) -> dict[str, Any]:
    task, kind = ratio["task"], ratio["graph"]
    accelerated = next(variant for variant in programs if variant != BASELINE)
    before, after = (programs[variant][task] for variant in (BASELINE, accelerated))
    runs = profiles[f"{BASELINE} {task} {kind}"], profiles[f"{accelerated} {task} {kind}"]
    kept = kept_promise(before, after, kind != "forward", rates, runs, ratio["median"])
    return {"task": task, "graph": kind, **kept}


def _device(model: torch.nn.Module, asked: Device | None) -> torch.device:
    if is_meta(model):
        raise TokgraphError("the model is on the meta device, so there is nothing to run", help="build it with storage")
    if asked == "cuda" and not torch.cuda.is_available():
        raise DependencyError("PyTorch finds no CUDA device", help="use --device cpu, or a CUDA build of PyTorch")
    there = model_device(model)
    if asked is not None and there.type != asked:
        raise TokgraphError(
            f"the model is on {there}, not on {asked}", help="build it there (model.to(...)) in the model file"
        )
    return there


def measure(
    subjects: Sequence[Subject], runs: int, warmup: int, progress: Callable[[str], None] | None = None
) -> tuple[dict[str, Any], dict[str, list[RunProfile]]]:
    """Time all subjects in turns, then profile them in turns.

    Returns:
        ``{"schema", "runs", "warmup", "graphs": [...], "ratios": [...]}``. A graph: ``task``, ``variant``, ``graph``,
        ``seconds`` (without profiling: median, min, max) and ``profile`` (:func:`~.events.summarise_runs`, seconds). A
        ratio: accelerated over baseline of the same turn, median, min, max.
    """
    tell = progress or (lambda what: None)
    tell("time")
    seconds = _in_turns(subjects, runs, warmup)
    for subject in subjects:
        subject.start_profiling()
    tell("profile")
    _in_turns(subjects, runs, warmup)
    profiles = {label(subject): subject.profiled()[warmup:] for subject in subjects}
    graphs = [
        {
            "task": subject.task,
            "variant": subject.variant,
            "graph": subject.graph,
            "seconds": spread(seconds[label(subject)]),
            "profile": summarise_runs(profiles[label(subject)]),
        }
        for subject in subjects
    ]
    found = {"schema": SCHEMA, "runs": runs, "warmup": warmup, "graphs": graphs, "ratios": _ratios(subjects, seconds)}
    return found, profiles


def label(subject: Subject) -> str:
    """``baseline understanding train-step``."""
    return f"{subject.variant} {subject.task} {subject.graph}"


def _in_turns(subjects: Sequence[Subject], runs: int, warmup: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {label(subject): [] for subject in subjects}
    for turn in range(warmup + runs):
        for subject in subjects:
            taken = subject.run()
            if turn >= warmup:
                found[label(subject)].append(taken)
    return found


def _ratios(subjects: Sequence[Subject], seconds: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    found = []
    for subject in subjects:
        baseline = f"{BASELINE} {subject.task} {subject.graph}"
        if subject.variant != BASELINE and baseline in seconds:
            pairs = zip(seconds[label(subject)], seconds[baseline], strict=True)
            turns = [mine / other for mine, other in pairs]
            found.append(
                {
                    "task": subject.task,
                    "graph": subject.graph,
                    "median": median(turns),
                    "min": min(turns),
                    "max": max(turns),
                }
            )
    return found

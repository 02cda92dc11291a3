"""Exporting programs: lower, convert, link to one weights file, check, and only then put the files in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokgraph.errors import ExportError, TokgraphError
from tokgraph.files import new_directory
from tokgraph.ir.interpreter import trains_with_dropout
from tokgraph.ir.program import Program, TaskGraph, is_meta
from tokgraph.passes.device import program_on_device
from tokgraph.passes.lower import (
    OPTIMIZERS,
    Lowered,
    Optimizer,
    lower_forward,
    lower_train_step,
    lower_update_step,
    real_valued,
)
from tokgraph.passes.lower.step import SGD, make_optimizer
from tokgraph.runtime import Accelerated
from tokgraph.store.batches import EXAMPLE, write_example
from tokgraph.store.weights import WEIGHTS, Stored, stored_tensors, write_weights
from tokgraph.version import VERSION

from .batches import other_sizes
from .check import Check, check_file
from .convert import DEFAULT_OPSET, MIN_OPSET, link_weights, onnx_decompositions, to_onnx
from .files import KINDS, GraphKind, file_name
from .packages import require_packages
from .reference import Reference
from .session import onnxruntime

SCHEMA = 1
CONSTANTS = "constants.safetensors"
"""Tensors that are not in the model's ``state_dict`` (tables, masks), of all graphs, each once."""
INLINE = 4096
"""Bytes up to which a constant stays inside its graph."""
Batches = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    Args:
        kinds: ``"forward"``, ``"train-step"``, ``"update-step"``.
        opset: version of the ONNX operator set, 18 or later.
        optimizer: the update rule of update steps, ``"sgd"`` or ``"adamw"``.
        optimizer_options: its options, named as in ``torch.optim`` (``beta1``, ``beta2`` for ``betas``).
        batches: task -> batches to check on, besides the example batch; where none are given, one of other sizes is made.

    Raises:
        ExportError: an option is unknown or out of range.
    """

    kinds: tuple[GraphKind, ...] = ("forward", "train-step")
    opset: int = DEFAULT_OPSET
    optimizer: str = SGD.name
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    batches: Batches | None = None

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ExportError(
                f"{unknown[0]!r} is no kind of graph" if unknown else "no kind of graph is asked for",
                help=f"kinds are {', '.join(KINDS)}",
            )
        if self.opset < MIN_OPSET:
            raise ExportError(f"opset {self.opset} is too old", help=f"the converter writes {MIN_OPSET} or later")
        self.rule()

    def rule(self) -> Optimizer:
        """The optimizer."""
        if self.optimizer not in OPTIMIZERS:
            raise ExportError(
                f"there is no optimizer {self.optimizer!r}", help=f"optimizers are {', '.join(OPTIMIZERS)}"
            )
        try:
            return make_optimizer(self.optimizer, self.optimizer_options)
        except TypeError as error:
            raise ExportError(str(error)) from None


@dataclass(frozen=True)
class _Job:
    """One file to be written."""

    variant: str
    graph: TaskGraph
    lowered: Lowered
    blocks: int
    trained: tuple[str, ...]

    @property
    def name(self) -> str:
        return file_name(self.graph.name, self.lowered.kind, self.variant)


def export_onnx(
    accelerated: Accelerated,
    folder: str | Path,
    kind: str | Sequence[str] = ("forward", "train-step"),
    *,
    with_baseline: bool = False,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Export every task over one ``weights.safetensors``, checked against PyTorch; on any failure the folder stays as it was.

    Args:
        accelerated: the program.
        folder: where the files go: ``TASK.KIND.onnx``, ``weights.safetensors``, ``report.json``.
        kind: ``"forward"`` (loss and outputs), ``"train-step"`` (loss and ``grad/<name>`` of every parameter),
            ``"update-step"`` (parameters and optimizer state in and out), or several of them.
        with_baseline: also the captured graphs.
        progress: called with each file's name before it is made.
        options: further fields of :class:`ExportOptions`.

    Returns:
        Schema 1: ``{"schema", "opset", "kinds", "files": {name: {"task", "kind", "variant", "nodes", "bytes", "inputs",
        "outputs", "without_gradient", "checks": [...]}}}``; it is in ``report.json`` under the key ``"onnx"``.

    Raises:
        ExportError: a graph cannot be converted, or disagrees with PyTorch; nothing is written then.
        DependencyError: a package is missing.
    """
    kinds: Any = (kind,) if isinstance(kind, str) else tuple(kind)
    chosen, folder = ExportOptions(kinds=kinds, **options), Path(folder)
    require_packages()
    onnxruntime()
    tell = progress or (lambda name: None)
    programs, state = accelerated.variants(with_baseline, run=True), accelerated.weights()
    _refuse(programs)
    _same_weights(folder, state)
    jobs = list(_jobs(programs, chosen, tell))
    with new_directory(folder) as temporary:
        write_weights(temporary / WEIGHTS, state)
        places = _write_constants(temporary, jobs)
        if not (folder / EXAMPLE).exists():  # that of a saved program stays
            write_example(temporary / EXAMPLE, accelerated.program)
        files = {}
        for job in jobs:
            tell(job.name)
            files[job.name] = _write(job, temporary, places, chosen)
        found = {"schema": SCHEMA, "opset": chosen.opset, "kinds": list(chosen.kinds), "files": files}
        whole = {**_old_report(folder), **accelerated.report, "onnx": found}
        (temporary / "report.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return found


def _refuse(programs: Mapping[str, Program]) -> None:
    for program in programs.values():
        if is_meta(program.model):
            raise ExportError(
                "the model is on the meta device, so there are no weights to export",
                help="build the model with storage, or a smaller size of it",
            )
        for name, graph in program.items():
            if trains_with_dropout(graph.graph_module):
                raise ExportError(
                    f"task {name!r} trains with dropout, whose random masks no two runtimes draw alike",
                    help="build the model in eval mode, or with dropout 0",
                )


def _same_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse to replace the weights of other graphs in the folder."""
    there = folder / WEIGHTS
    if not there.exists():
        return
    known = stored_tensors(there)
    itself = set(known) == set(state) and all(known[n].shape == tuple(x.shape) for n, x in state.items())
    if not itself:
        raise ExportError(
            f"{there} holds the weights of another model, and other files in {folder} read it",
            help="choose another folder, or remove this one",
        )


def _jobs(programs: Mapping[str, Program], options: ExportOptions, tell: Callable[[str], None]) -> Iterator[_Job]:
    decompositions = onnx_decompositions(options.opset)
    for variant, program in programs.items():
        trained = [name for name, p in program.model.named_parameters() if p.requires_grad]
        for name, graph in program_on_device(program, torch.device("cpu")).items():
            for kind in options.kinds:
                tell(f"lower {file_name(name, kind, variant)}")
                lowered = _lowered(graph, kind, options, decompositions)
                yield _Job(variant, graph, lowered, _blocks(lowered), (*trained, *graph.own_parameters()))


def _lowered(graph: TaskGraph, kind: str, options: ExportOptions, decompositions: Any) -> Lowered:
    """The flat graph of one kind; what fails in PyTorch on the way is an error of the export."""
    try:
        if kind == "forward":
            return real_valued(lower_forward(graph, decompositions))
        if kind == "train-step":
            return real_valued(lower_train_step(graph, decompositions))
        return real_valued(lower_update_step(graph, options.rule(), decompositions))
    except (TokgraphError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        open_sizes = sorted({d.name for d in graph.dimensions if d.symbol is not None})
        raise ExportError(
            f"task {graph.name!r}, {kind}: PyTorch cannot trace the graph: {type(error).__name__}: {first}",
            help=f"capture the task with {', '.join(open_sizes)} fixed (Task.dynamic)"
            if open_sizes
            else "please report this",
        ) from error


def _blocks(lowered: Lowered) -> int:
    found = [(node.meta.get("custom") or {}).get("tokgraph", {}).get("block") for node in lowered.module.graph.nodes]
    return 1 + max((block for block in found if block is not None), default=-1)


def _write_constants(folder: Path, jobs: Sequence[_Job]) -> dict[str, dict[str, tuple[str, Stored]]]:
    """Write what no ``state_dict`` holds; file -> initializer -> (file, place) of all that lies outside the graphs."""
    weights = stored_tensors(folder / WEIGHTS)
    constants: dict[str, torch.Tensor] = {}
    names: dict[tuple[str, str], str] = {}
    for job in jobs:
        for name, x in job.lowered.state.items():
            if name not in weights and x.numel() * x.element_size() > INLINE:
                data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                key = hashlib.sha256(f"{x.dtype}{tuple(x.shape)}".encode() + data).hexdigest()[:16]
                constants[key] = x.detach().cpu().contiguous().clone()
                names[job.name, name] = key
    if constants:
        write_weights(folder / CONSTANTS, constants)
    stored = stored_tensors(folder / CONSTANTS) if constants else {}
    found: dict[str, dict[str, tuple[str, Stored]]] = {}
    for job in jobs:
        mine = {name: (WEIGHTS, weights[name]) for name in job.lowered.state if name in weights}
        mine |= {name: (CONSTANTS, stored[key]) for (file, name), key in names.items() if file == job.name}
        found[job.name] = mine
    return found


def _write(
    job: _Job, folder: Path, places: Mapping[str, dict[str, tuple[str, Stored]]], options: ExportOptions
) -> dict[str, Any]:
    import onnx_ir as ir

    about = {
        "task": job.graph.name,
        "kind": job.lowered.kind,
        "variant": job.variant,
        "blocks": str(job.blocks),
        "version": VERSION,
    }
    model = to_onnx(job.lowered, about, job.graph.symbol_names(), options.opset)
    link_weights(model, folder, places[job.name])
    path = folder / job.name
    ir.save(model, path)
    checks = check_file(
        path, job.lowered, job.graph, _batches(job.graph, options), Reference(job.graph, options.rule())
    )
    return _described(job, path, len(list(model.graph.all_nodes())), checks)


def _batches(graph: TaskGraph, options: ExportOptions) -> list[tuple[Mapping[str, Any], dict[str, int]]]:
    example = graph.example()
    sizes = {d.name: d.size for d in graph.dimensions if d.symbol is not None}
    given = [graph.completed(batch, aside=True) for batch in (options.batches or {}).get(graph.name, [])]
    if given:
        return [(example, sizes), *((batch, {}) for batch in given)]
    other = other_sizes(graph, example)
    return [(example, sizes), *([other] if other is not None else [])]


def _described(job: _Job, path: Path, nodes: int, checks: Sequence[Check]) -> dict[str, Any]:
    names = set(job.lowered.outputs)
    without = [name for name in job.trained if f"grad/{name}" not in names] if job.lowered.kind == "train-step" else []
    return {
        "task": job.graph.name,
        "kind": job.lowered.kind,
        "variant": job.variant,
        "nodes": nodes,
        "bytes": path.stat().st_size,
        "inputs": list(job.lowered.inputs),
        "outputs": list(job.lowered.outputs),
        "without_gradient": without,
        "checks": [asdict(check) for check in checks],
    }


def _old_report(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

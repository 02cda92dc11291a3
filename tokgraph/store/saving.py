"""Saving a program: graphs as ``.pt2``, weights once, the plan, the example batches, and a manifest with hashes."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tokgraph.errors import FileError
from tokgraph.files import is_plain, new_directory
from tokgraph.ir.names import file_part
from tokgraph.ir.program import TaskGraph, is_meta, is_training
from tokgraph.passes.device import program_on_device
from tokgraph.passes.lower import Lowered, lower_program
from tokgraph.passes.lower.exported import exported_program
from tokgraph.runtime import Accelerated
from tokgraph.version import VERSION

from .batches import EXAMPLE, write_example
from .conditions import saved_conditions
from .manifest import (
    MANIFEST,
    Fingerprint,
    Manifest,
    SavedDimension,
    SavedInput,
    SavedTask,
    SavedVariant,
    SavedVisual,
)  # fmt: skip
from .weights import WEIGHTS, write_weights

PLAN, REPORT = "plan.json", "report.json"


def graph_file(task: str, variant: str) -> str:
    """``understanding.pt2``, ``baseline.understanding.pt2``."""
    return f"{'baseline.' if variant == 'baseline' else ''}{file_part(task)}.pt2"


def save(accelerated: Accelerated, folder: str | Path, *, with_baseline: bool = True) -> None:
    """Write a program: ``TASK.pt2``, ``weights.safetensors``, ``plan.json``, example batches, ``manifest.json``.

    :func:`tokgraph.load_accelerated` reads it, without the model's code. Nothing of the user's is pickled. What another
    program left in the folder, its exported graphs among it, is removed: it belongs to other weights.

    Args:
        accelerated: the program.
        folder: where to; what is there is replaced file by file, or, on a failure, stays as it was.
        with_baseline: also the captured graphs.

    Raises:
        FileError: the model has no values to save (meta device), an input cannot be written, or the disk is full.
    """
    folder, programs, state = Path(folder), accelerated.variants(with_baseline), accelerated.weights()
    if is_meta(accelerated.model):
        raise FileError(
            "the model is on the meta device, so there are no weights to save", help="build the model with storage"
        )
    with new_directory(folder) as temporary:
        write_weights(temporary / WEIGHTS, state)
        accelerated.plan.save(temporary / PLAN)
        described: dict[str, dict[str, SavedVariant]] = {}
        for variant, program in programs.items():
            for name, graph in program_on_device(program, torch.device("cpu")).items():
                lowered = lower_program(graph)
                _write_graph(exported_program(lowered, state.keys()), temporary / graph_file(name, variant))
                described.setdefault(name, {})[variant] = _variant(graph, lowered)
        tasks = {name: _described(graph, described[name]) for name, graph in accelerated.program.items()}
        write_example(temporary / EXAMPLE, accelerated.program)
        manifest = _manifest(accelerated, tasks, temporary)
        if accelerated.report:
            (temporary / REPORT).write_text(json.dumps(accelerated.report, indent=2) + "\n", encoding="utf-8")
        text = manifest.model_dump_json(by_alias=True, indent=1)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
        for name in _written_before(folder):
            if not (temporary / name).exists():
                (folder / name).unlink(missing_ok=True)


def _write_graph(exported: ExportedProgram, path: Path) -> None:
    """Write a graph, which holds no weights, by way of memory: PyTorch's writer ends the process on a full disk."""
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    path.write_bytes(buffer.getvalue())


def _manifest(accelerated: Accelerated, tasks: dict[str, SavedTask], folder: Path) -> Manifest:
    model = accelerated.model
    return Manifest(
        schema=3,
        versions={"tokgraph": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        training=is_training(model),
        state=tuple(accelerated.weights()),
        parameters={name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        own={name: p.requires_grad for name, p in accelerated.own_parameters.items()},
        tasks=tasks,
        files={path.name: Fingerprint.of(path) for path in sorted(folder.iterdir())},
    )


def _written_before(folder: Path) -> set[str]:
    """Files of the program that is in the folder, and of what was exported from it; nothing that tokgraph did not write."""
    if not (folder / MANIFEST).exists():
        return set()
    names = {"report.json"}
    for file, path in ((MANIFEST, ("files",)), ("report.json", ("onnx", "files"))):
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8"))
            for key in path:
                found = found[key]
            names |= {*found, *(["constants.safetensors"] if len(path) > 1 else [])}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {name for name in names if is_plain(name)}


def _described(graph: TaskGraph, variants: dict[Any, SavedVariant]) -> SavedTask:
    task = graph.task
    return SavedTask(
        inputs={key: _plain_input(graph.name, key, x) for key, x in task.inputs.items()},
        reads=task.reads,
        outputs=task.outputs,
        visual=None if task.visual is None else SavedVisual(**asdict(task.visual)),
        visual_inputs=tuple(task.visual_inputs),
        dynamic={key: dict(dims) for key, dims in (task.dynamic or {}).items()},
        dimensions=tuple(SavedDimension(**asdict(d)) for d in graph.dimensions),
        trained_inputs=graph.trained_inputs,
        conditions=saved_conditions(graph.conditions),
        result=_plain_result(graph),
        variants=variants,
    )


def _variant(graph: TaskGraph, lowered: Lowered) -> SavedVariant:
    return SavedVariant(state=tuple(lowered.state), compact=graph.compact_outputs, fixed=dict(lowered.fixed))


def _plain_input(task: str, key: str, x: Any) -> SavedInput:
    """The structure of an input, and its leaves that are no tensors, as JSON gives them back."""
    leaves, structure = pytree.tree_flatten(x)
    plain = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    try:
        saved = SavedInput(structure=pytree.treespec_dumps(structure), plain=plain)
        same = pytree.treespec_loads(saved.structure) == structure
        same = same and SavedInput.model_validate_json(saved.model_dump_json()).plain == plain
    except (TypeError, ValueError, NotImplementedError):
        same = False
    if not same:
        raise FileError(
            f"task {task!r}: input {key!r} cannot be written as JSON", help="pass numbers, strings, lists and tensors"
        )
    return saved


def _plain_result(graph: TaskGraph) -> str:
    """The structure of the task's result in dicts, lists and tuples: other mappings need the package they are from."""

    def plain(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: plain(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return (list if isinstance(x, list) else tuple)(plain(item) for item in x)
        return x

    count = graph.out_spec.num_leaves
    found = plain(pytree.tree_unflatten(list(range(count)), graph.out_spec))
    if pytree.tree_leaves(found) != list(range(count)):
        raise FileError(
            f"task {graph.name!r} returns a structure that cannot be saved", help="return a dict, list or tuple"
        )
    return pytree.treespec_dumps(pytree.tree_structure(found))

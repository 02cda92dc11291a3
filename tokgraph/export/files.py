"""The names of exported files, and what an exported graph says of itself and of its nodes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tokgraph.errors import ExportError
from tokgraph.files import is_plain
from tokgraph.ir.names import STEP, file_part
from tokgraph.store.weights import WEIGHTS, read_weights

from .packages import require_packages

GraphKind = Literal["forward", "train-step", "update-step"]
KINDS: tuple[GraphKind, ...] = get_args(GraphKind)
BASELINE = "baseline"
"""Variant of the captured graphs; that of the rewritten ones is ``"accelerated"``."""
ACCELERATED = "accelerated"
PREFIX = "tokgraph."
"""Prefix of the metadata keys that we write into ONNX models and nodes."""
_MOST_STATE = 8
"""Bytes of optimizer state for a byte of weights: twice as many numbers, in up to four times as many bytes."""
OTHERS = ("param/", "state/", STEP)
"""How inputs that are none of the task's begin."""
_TORCH = {
    "FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16,
    "INT64": torch.int64, "INT32": torch.int32, "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def file_name(task: str, kind: str, variant: str = ACCELERATED) -> str:
    """``understanding.train-step.onnx``, ``baseline.understanding.train-step.onnx``."""
    return f"{'' if variant == ACCELERATED else f'{variant}.'}{file_part(task)}.{kind}.onnx"


@dataclass(frozen=True)
class NodePlace:
    """Where a node of an exported graph comes from.

    Args:
        node: name of the node in the task's FX graph.
        module: module path, ``""`` for the task's own forward.
        block: the decoder block, ``None`` outside blocks.
        kind: ``"attention"``, ``"ffn"``, ``"norm"``, ``"head"``, ``"encoder"``, ``"input"``, ``"drop"``, ``"optimizer"``.
        phase: ``"forward"``, ``"backward"`` or ``"update"``.
    """

    node: str
    module: str
    block: int | None
    kind: str
    phase: str

    def metadata(self) -> dict[str, str]:
        """As metadata of an ONNX node."""
        return {
            f"{PREFIX}node": self.node,
            f"{PREFIX}module": self.module,
            f"{PREFIX}block": "" if self.block is None else str(self.block),
            f"{PREFIX}kind": self.kind,
            f"{PREFIX}phase": self.phase,
        }


@dataclass(frozen=True)
class ExportedFile:
    """An exported graph, read from its file without its weights.

    Args:
        path: the file.
        task: the task.
        kind: ``"forward"``, ``"train-step"`` or ``"update-step"``.
        variant: ``"accelerated"`` or ``"baseline"``.
        nodes: name of an ONNX node -> its place.
        blocks: number of decoder blocks.
        inputs: input -> (type, sizes), a size that is open as ``None``.
    """

    path: Path
    task: str
    kind: str
    variant: str
    nodes: dict[str, NodePlace]
    blocks: int
    inputs: dict[str, tuple[torch.dtype, tuple[int | None, ...]]]

    def initial(self) -> dict[str, torch.Tensor]:
        """Inputs that are none of the task's: parameters as in the weights file, counters and optimizer state at zero."""
        wanted = {name: kind for name, kind in self.inputs.items() if name.startswith(OTHERS)}
        held = [name for name in wanted if name.startswith("param/")]
        path = self.path.parent / WEIGHTS
        weights = read_weights(path) if held else {}
        self._check_claims(wanted, held, path.stat().st_size if held else 0)
        made = {
            name: torch.zeros([1 if size is None else size for size in sizes], dtype=dtype)
            for name, (dtype, sizes) in wanted.items()
            if name not in held
        }
        lacking = [name for name in held if name.removeprefix("param/") not in weights]
        if lacking:
            raise ExportError(
                f"{path} lacks {lacking[0]!r}, which {self.path.name} takes", help="export the program again"
            )
        return made | {name: weights[name.removeprefix("param/")] for name in held}

    def _check_claims(self, wanted: Mapping[str, Any], held: Collection[str], weights: int) -> None:
        """That inputs which start at zero are no larger than what an optimizer keeps for the weights."""
        sizes = [
            dtype.itemsize * math.prod(1 if size is None else size for size in shape)
            for name, (dtype, shape) in wanted.items()
            if name not in held
        ]
        if sum(sizes) > _MOST_STATE * weights + 2**20:
            raise ExportError(
                f"{self.path.name} asks for {sum(sizes):,} bytes of optimizer state, for {weights:,} bytes of weights",
                help="it was changed: export the program again",
            )


def read_exported(path: Path) -> ExportedFile:
    """What an exported graph says of itself.

    Raises:
        ExportError: the file is no ONNX model, or none that tokgraph exported.
        DependencyError: a package is missing.
    """
    require_packages("onnx", "onnx_ir")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ExportError(f"{path} is no ONNX model: {error}") from error
    about = {entry.key.removeprefix(PREFIX): entry.value for entry in model.metadata_props}
    missing = [key for key in ("task", "kind", "variant", "blocks") if key not in about]
    if missing:
        raise ExportError(
            f"{path} does not say which {missing[0]} it is of", help="name a file that `tokgraph export` wrote"
        )
    try:
        _check_places(model.graph)
        nodes = {node.name: _place({e.key: e.value for e in node.metadata_props}) for node in model.graph.node}
        inputs = {value.name: _type(value.type.tensor_type) for value in model.graph.input}
        return ExportedFile(path, about["task"], about["kind"], about["variant"], nodes, int(about["blocks"]), inputs)
    except (ValueError, LookupError) as error:
        raise ExportError(
            f"{path} was changed since it was exported: {error}", help="export the program again"
        ) from error


def _check_places(graph: Any) -> None:
    """That weights lie beside the model: older releases of ONNX Runtime read any file that a model names."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not is_plain(entry.value):
                raise ValueError(f"it reads {entry.value[:80]!r}, which is not in its folder")


def _type(found: Any) -> tuple[torch.dtype, tuple[int | None, ...]]:
    import onnx_ir

    dtype = _TORCH[onnx_ir.DataType(found.elem_type).name]
    return dtype, tuple(d.dim_value if d.HasField("dim_value") else None for d in found.shape.dim)


def _place(metadata: dict[str, str]) -> NodePlace:
    found: dict[str, Any] = {key.removeprefix(PREFIX): x for key, x in metadata.items() if key.startswith(PREFIX)}
    block = found.get("block", "")
    return NodePlace(
        found.get("node", ""),
        found.get("module", ""),
        int(block) if block else None,
        found.get("kind", "input"),
        found.get("phase", "forward"),
    )


def find_exported(folder: Path) -> list[ExportedFile]:
    """The exported graphs in a folder, by name.

    Raises:
        ExportError: there is none.
        DependencyError: a package is missing.
    """
    found = [read_exported(path) for path in sorted(folder.glob("*.onnx"))]
    if not found:
        raise ExportError(f"{folder} holds no exported graphs", help="make some with `tokgraph export`")
    return found

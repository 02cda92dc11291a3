"""The names of exported files, and what an exported graph says of itself and of its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tokgraph.errors import ExportError
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
        weights = read_weights(self.path.parent / WEIGHTS) if held else {}
        made = {
            name: torch.zeros([1 if size is None else size for size in sizes], dtype=dtype)
            for name, (dtype, sizes) in wanted.items()
            if name not in held
        }
        return made | {name: weights[name.removeprefix("param/")] for name in held}


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
    nodes = {node.name: _place({e.key: e.value for e in node.metadata_props}) for node in model.graph.node}
    inputs = {value.name: _type(value.type.tensor_type) for value in model.graph.input}
    return ExportedFile(path, about["task"], about["kind"], about["variant"], nodes, int(about["blocks"]), inputs)


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

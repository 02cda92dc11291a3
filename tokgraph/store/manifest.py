"""The manifest of a saved program: what its files are, and what of a task no graph says; checked field by field."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tokgraph.errors import FileError
from tokgraph.files import is_plain, read_text

from .expressions import arithmetic, structure

SCHEMA = 3
MANIFEST = "manifest.json"
_AGAIN = "save the program again"
_FUNCTIONS = frozenset(
    "min max abs int float round math.floor math.ceil math.trunc math.sqrt math.log math.log2 math.exp math.fmod".split()
)


def _relation(text: str) -> str:
    return arithmetic(text, _FUNCTIONS)


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name[:80]!r} is no type of tensors")
    return name


def _file(name: str) -> str:
    if not is_plain(name):
        raise ValueError(f"{name[:80]!r} is not in its folder")
    return name


Relation = Annotated[str, AfterValidator(_relation)]
Structure = Annotated[str, AfterValidator(structure)]
Natural = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants")


class Fingerprint(_Part):
    """What a file is known by."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Natural

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """That of a file."""
        with path.open("rb") as file:
            return cls(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


class SavedInput(_Part):
    """The structure of an input, and its leaves that are no tensors; the others are in the example batch."""

    structure: Structure
    plain: dict[Natural, JsonValue]


class SavedVisual(_Part):
    """:class:`tokgraph.VisualTokens`."""

    kind: Literal["ids", "mask", "positions"]
    input: str | None
    low: int | None
    high: int | None
    span: tuple[int | None, int | None] | None


class SavedDimension(_Part):
    """:class:`tokgraph.ir.program.Dimension`."""

    input: str
    dim: Natural
    name: str
    symbol: str | None
    size: Natural


class SavedTensor(_Part):
    """An input that is a tensor: its type, and its sizes, as numbers or as expressions over sizes."""

    dtype: Annotated[str, AfterValidator(_dtype)]
    shape: tuple[Natural | Relation, ...]


class SavedNumber(_Part):
    """An input that is a Python number, which the graph takes as a tensor."""

    number: Literal["int", "float"]


class SavedConstant(_Part):
    """An input whose value is in the graph."""

    constant: JsonValue


class SavedGuard(_Part):
    """:class:`tokgraph.ir.conditions.Guard`."""

    relation: Relation
    source: str | None


class SavedConditions(_Part):
    """What a graph takes for granted of a call."""

    inputs: tuple[SavedTensor | SavedNumber | SavedConstant, ...]
    guards: tuple[SavedGuard, ...]
    reads_mode: bool


class SavedVariant(_Part):
    """A graph of a task: the tensors that it takes, in order; rows of its outputs; outputs that are no tensors."""

    state: tuple[str, ...]
    compact: dict[Natural, Natural]
    fixed: dict[Natural, JsonValue]


class SavedTask(_Part):
    """A task: what its user said of it, and its graphs."""

    inputs: dict[str, SavedInput]
    reads: str
    outputs: str
    visual: SavedVisual | None
    visual_inputs: tuple[str, ...]
    dynamic: dict[str, dict[Natural, str]]
    dimensions: tuple[SavedDimension, ...]
    trained_inputs: tuple[str, ...] = ()
    conditions: SavedConditions
    result: Structure
    variants: dict[Literal["accelerated", "baseline"], SavedVariant]


class Manifest(_Part):
    """All that is said of a saved program.

    Args:
        schema_: which version of this form it is.
        versions: of tokgraph, torch and Python.
        training: the mode that it was saved in.
        state: names of its tensors; those of one tied weight are all there.
        parameters: those that are the model's parameters, and whether they are trained.
        own: parameters that a plan added.
        tasks: its tasks.
        files: the other files in its folder.
    """

    schema_: Literal[3] = Field(alias="schema")
    versions: dict[Literal["tokgraph", "torch", "python"], str]
    training: bool
    state: tuple[str, ...]
    parameters: dict[str, bool]
    own: dict[str, bool]
    tasks: dict[str, SavedTask]
    files: dict[Annotated[str, AfterValidator(_file)], Fingerprint]


class _AnyVersion(BaseModel):
    schema_: Any = Field(None, alias="schema")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a saved program, after checking every file that it names.

    Raises:
        FileError: there is no program, its files were changed, or another version wrote it.
    """
    path = folder / MANIFEST
    try:
        text = read_text(path)
    except OSError:
        raise FileError(
            f"{folder} holds no saved program: it has no {MANIFEST}", help="save one with `tokgraph optimize MODEL`"
        ) from None
    except ValueError as error:
        raise FileError(f"{path} is not valid JSON: {error}") from None
    manifest = _parsed(path, text)
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise FileError(f"{folder} is incomplete: {name} is missing", help=_AGAIN)
        if Fingerprint.of(file) != expected:
            raise FileError(
                f"{file} is not the file that was saved: its hash differs from the manifest's",
                help=f"it was changed, or belongs to another program; {_AGAIN}",
            )
    return manifest


def _parsed(path: Path, text: str) -> Manifest:
    try:
        if _AnyVersion.model_validate_json(text).schema_ == SCHEMA:
            return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise FileError(f"{path} is not valid JSON: {first['msg']}") from None
        if first["loc"]:
            where = ".".join(map(str, first["loc"]))
            raise FileError(f"{path}: {where[:200]}: {first['msg']}", help=f"it was changed; {_AGAIN}") from None
    raise FileError(f"{path} is not of schema {SCHEMA}, which this version of tokgraph reads", help=_AGAIN)

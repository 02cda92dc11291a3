"""Files of distributed checkpoints: each whole, or refused by all processes alike; read without running what they say."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from .errors import FileError
from .files import parse_json, read_text, write_atomically

MANIFEST = "checkpoint.json"
_BEFORE = "load the one before it"
_NAMED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
}  # fmt: skip
"""Module -> what metadata is made of, besides types of elements: building these runs nothing that a file says."""


class _Unpickler(pickle.Unpickler):
    """Builds what metadata is made of, and calls nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if global_name not in _NAMED.get(module_name, ()):
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which metadata has no use for")
        return super().find_class(module_name, global_name)


class Reader(FileSystemReader):
    """Reads checkpoints; their metadata is a pickle, in which PyTorch's own reader runs what it says."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata.

        Raises:
            pickle.UnpicklingError: it is none.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(found).__name__}, and no metadata")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Planner(DefaultLoadPlanner):
    """Loads numbers and the like, which are pickles as well, if they are plain data."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Load what is no tensor."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Say of what a checkpoint consists: written last. Every process calls it.

    Raises:
        FileError: a process cannot read or write a file.
    """
    names = sorted(path.name for path in folder.iterdir())
    digests = {name: digest for found in everywhere(lambda: _digests(folder, names)) for name, digest in found.items()}
    sizes = {name: (folder / name).stat().st_size for name in names}
    text = json.dumps({"files": sizes, "sha256": dict(sorted(digests.items())), **about}, indent=1) + "\n"
    everywhere(lambda: write_atomically(folder / MANIFEST, text) if is_first() else None)


def described(folder: Path) -> Mapping[str, Any]:
    """What is said of a checkpoint beside its tensors, its files being there at their full size.

    Raises:
        FileError: it is none, or a file of it is missing or was cut short.
    """
    try:
        found = parse_json(read_text(folder / MANIFEST))
        files, _, _ = dict(found["files"]), dict(found["steps"]), dict(found["more"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{folder} holds no checkpoint: {type(error).__name__}", help="load one that save wrote"
        ) from None
    for name, size in files.items():
        path = folder / name
        now = path.stat().st_size if path.is_file() else None
        if now != size:
            said = "is missing" if now is None else f"has {now} bytes, and had {size}"
            raise FileError(f"the checkpoint {folder} is not whole: {name} {said}", help=_BEFORE)
    return found  # type: ignore[no-any-return]


def check_contents(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which a file is another one than was written. Every process calls it, and reads some files.

    Raises:
        FileError: one is.
    """
    digests: Mapping[str, str] = found.get("sha256", {})  # those of earlier versions have none
    for mine in everywhere(lambda: _digests(folder, sorted(digests))):
        for name, digest in mine.items():
            if digest != digests[name]:
                raise FileError(f"the checkpoint {folder} is not whole: {name} is not what was written", help=_BEFORE)


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    """Name -> digest, of the files that are this process's to read."""
    first, step = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = {}
    for name in names[first::step]:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def everywhere(work: Callable[[], Any]) -> list[Any]:
    """What the work gives in every process; what fails in one is raised in all, for the others would wait for it for ever.

    Raises:
        FileError: a file cannot be read or written.
    """
    mine: tuple[Any, str | None]
    try:
        mine = (work(), None)
    except (OSError, FileError) as error:
        mine = (None, error.message if isinstance(error, FileError) else f"{type(error).__name__}: {error}")
    found = [mine]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, mine)
    for _, failed in found:
        if failed is not None:
            raise FileError(
                failed, help="see that every process can read and write there, and that the disk is not full"
            )
    return [x for x, _ in found]


@contextmanager
def told(what: str, advice: str) -> Iterator[None]:
    """Tell what PyTorch finds wrong with a checkpoint, in whichever process: its error is no ``Exception``.

    Raises:
        FileError: of what was found first.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        where = f", in process {rank}" if dist.is_initialized() else ""
        gist = (str(cause).splitlines() or [""])[0]
        raise FileError(f"{what}{where}: {type(cause).__name__}: {gist}", help=advice) from cause


def is_first() -> bool:
    """Whether this process writes what one is to write."""
    return not dist.is_initialized() or dist.get_rank() == 0

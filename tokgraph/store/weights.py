"""One safetensors file for the weights of many graphs: written once, found by name and offset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tokgraph.errors import FileError
from tokgraph.files import parse_json

WEIGHTS = "weights.safetensors"
_ALIASES = "tokgraph.aliases"


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Args:
        name: the name it is stored under.
        shape: its shape.
        offset: position of its first byte in the file.
        length: its bytes.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int


def write_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write tensors under their names. A tensor of several names (tied weights) is stored once, under the first.

    Args:
        path: the file.
        state: name -> tensor, as a ``state_dict``.
    """
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        stored[name] = tensor.detach().cpu().contiguous()
    shared: dict[int, str] = {}
    for name, tensor in stored.items():  # views of one storage, which safetensors refuses
        storage = tensor.untyped_storage().data_ptr()
        if tensor.numel() and shared.setdefault(storage, name) != name:
            stored[name] = tensor.clone()
    write_tensors(path, stored, {_ALIASES: json.dumps(aliases)})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that share no memory.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # it has no class of its own for a full disk
        raise OSError(str(error)) from error


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a file, further names of tied weights included.

    Source: the safetensors format: eight bytes (the header's length), a JSON header, the tensors' bytes.

    Raises:
        FileError: the file is no safetensors file.
    """
    try:
        with safe_open(path, "pt"):  # which checks that its header is one, and that its tensors fill it
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length).decode("utf-8"))
        aliases = parse_json(header.pop("__metadata__", {}).get(_ALIASES, "{}"))
        found = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found[name] = Stored(name, tuple(entry["shape"]), 8 + length + start, end - start)
        return found | {name: found[of] for name, of in aliases.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise FileError(f"{path} is no safetensors file: {error}") from error
    except (LookupError, AttributeError, TypeError) as error:
        raise FileError(f"{path}: the names of its tied tensors are not those of tensors: {error}") from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor; names of one tied weight have the same tensor.

    Raises:
        FileError: the file is no safetensors file.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} is no safetensors file: {error}") from error
    names = {name: place.name for name, place in stored_tensors(path).items()}
    return {name: tensors[of] for name, of in names.items()}

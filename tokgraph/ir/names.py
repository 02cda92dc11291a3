"""Names: which ones a user may give, the names that tokgraph makes of them, and how they are written into files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from tokgraph.errors import SpecError

STEP = "tokgraph_step"
"""Name of a tensor of graph modules whose plan draws at random: int64 scalar, the training steps so far."""
OWN = "tokgraph_own"
"""Prefix of the names of parameters that a plan adds (:func:`own_name`)."""
_RESERVED = (STEP, OWN, "__metadata__")
"""First parts of names that a model's tensors cannot have; the last is not a tensor in a safetensors file."""
_LONGEST = 120
"""Characters of a file name that stand for a task's name; file systems allow 255 in all."""
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)
"""Names that Windows takes for devices, whatever follows a dot."""


def check_name(what: str, name: object) -> None:
    """Refuse what cannot be the name of a task, an input or a dimension.

    Args:
        what: what is named, for the message.
        name: any printable text but the empty one.

    Raises:
        SpecError: it is something else.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        raise SpecError(
            f"{what} cannot be called {name!r}", help="a name is text of at least one character, all of them printable"
        )


def check_task_names(names: Iterable[str]) -> None:
    """Refuse names that cannot be tasks of one model.

    Raises:
        SpecError: one is no name, or two differ in upper and lower case only, which file systems may take for one.
    """
    seen: dict[str, str] = {}
    for name in names:
        check_name("a task", name)
        other = seen.setdefault(file_part(name).lower(), name)
        if other != name:
            raise SpecError(
                f"tasks {other!r} and {name!r} differ in upper and lower case only",
                help="give one another name: files are named after tasks, and some file systems take them for one",
            )


def check_tensor_names(names: Iterable[str]) -> None:
    """Refuse names of a model's parameters and buffers that tokgraph gives to tensors of its own.

    Raises:
        SpecError: there is one.
    """
    for name in names:
        if name.partition(".")[0] in _RESERVED:
            raise SpecError(f"the model has a tensor called {name!r}, a name that is reserved", help="rename it")
        if name.encode(errors="replace").decode() != name:
            raise SpecError(f"the model has a tensor called {name!r}, which no file can hold", help="rename it")


def own_name(task: str, name: str) -> str:
    """``tokgraph_own.<task>.<name>``: the parameter that a plan adds for a task, a copy of that name in the model."""
    return f"{OWN}.{quoted(task, '.')}.{name}"


def step_name(task: str) -> str:
    """``tokgraph_step.<task>``: the step of a task in a ``state_dict``."""
    return f"{STEP}.{quoted(task, '.')}"


def copied_name(name: str) -> str:
    """The name of the model's parameter that a parameter which a plan added is a copy of; other names as they are."""
    return name.split(".", 2)[2] if name.startswith(f"{OWN}.") else name


def quoted(name: str, separator: str) -> str:
    """A name as a part of a longer one: without the separator, which becomes ``%2F`` or the like."""
    return name.replace("%", "%25").replace(separator, f"%{ord(separator):02X}")


def unquoted(part: str, separator: str) -> str:
    """The inverse of :func:`quoted`."""
    return part.replace(f"%{ord(separator):02X}", separator).replace("%25", "%")


def file_part(name: str) -> str:
    """A task's name as part of a file's: letters, digits, ``_`` and ``-``, all else as ``%2E``; never a path.

    A name that would be too long ends in a hash of the whole.
    """
    part = "".join(c if re.fullmatch(r"[0-9A-Za-z_-]", c) else _percent(c) for c in name)
    if _DEVICES.fullmatch(part):
        part = _percent(part[0]) + part[1:]
    if len(part) > _LONGEST:
        part = f"{part[:_LONGEST]}%{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return part


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


def input_name(key: str, leaf: int, leaves: int) -> str:
    """Name of a tensor of an input: the input's, with a number where it holds several."""
    return key if leaves == 1 else f"{key}.{leaf}"


def batch_key(task: str, number: int, name: str) -> str:
    """``TASK/NUMBER/INPUT``: name of a tensor in a file of batches."""
    return f"{quoted(task, '/')}/{number}/{quoted(name, '/')}"


def batch_place(key: str) -> tuple[str, int, str] | None:
    """The inverse of :func:`batch_key`; ``None`` for other names."""
    task, number, name = key.split("/") if key.count("/") == 2 else ("", "", "")
    return (unquoted(task, "/"), int(number), unquoted(name, "/")) if re.fullmatch("[0-9]+", number) else None

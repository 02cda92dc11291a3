"""Writing results whole or not at all, into a temporary place first, then renamed; reading text that may be anything."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tokgraph.errors import FileError

try:
    import fcntl
except ImportError:  # Windows, where a killed run's temporary files stay
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".tmp"
"""Of names of temporary files and directories: what has it, and is nobody's, is removed."""
LARGEST_JSON = 16 * 2**20
"""Bytes of a JSON file that is read; parsed, it can take forty times as many."""


def is_plain(name: str) -> bool:
    """Whether a name that was read from a file is that of a file, and not of a path out of the folder that it is in."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and Path(name).name == name


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """The text of a file.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no UTF-8.
    """
    with path.open("rb") as file:
        found = file.read(largest + 1)
    if len(found) > largest:
        raise ValueError(f"it is larger than {largest / 2**20:.0f} MiB")
    return found.decode("utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes ``path`` when the block ends without an error; on one, what was there stays.

    Raises:
        FileError: it cannot be written.
    """
    with _workplace(path) as place:
        temporary = place / path.name
        temporary.touch()
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; a failure leaves what was there before.

    Raises:
        FileError: it cannot be written.
    """
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory whose files move to ``path`` when the block ends without an error.

    An existing ``path`` keeps its other files, and on an error all of them. Of two that end at the same time, the files of
    one are there, never some of each.

    Raises:
        FileError: it cannot be written.
    """
    with _workplace(path) as place:
        temporary = place / path.name
        temporary.mkdir()
        yield temporary
        for file in (temporary, *temporary.rglob("*")):  # some libraries write files for the user's eyes only
            file.chmod(0o755 if file.is_dir() else 0o644)
        _move(temporary, path)


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A directory beside ``path``, on the same disk, that is gone afterwards; a run that is killed leaves it to the next.

    Raises:
        FileError: for an ``OSError`` in the block: the disk is full, the place is not ours to write to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with _made(path) as place:
            yield place
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"cannot write {path}: {reason}", help="what was there before is still there") from error


@contextmanager
def _made(path: Path) -> Iterator[Path]:
    with ExitStack() as held:
        place = None
        while place is None:
            made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))
            with suppress(FileNotFoundError):  # swept before it was locked
                held.enter_context(_locked(made))
                place = made if made.exists() else None
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _move(temporary: Path, path: Path) -> None:
    try:
        if not path.exists():
            temporary.replace(path)
            return
    except OSError:
        if not path.is_dir():  # it is there by now
            raise
    with _locked(path):
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            target = path / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


def _sweep(path: Path) -> None:
    """Remove what a run that was killed has left beside ``path``: nobody holds the lock of it any more."""
    if fcntl is None:
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        with suppress(OSError), _locked(left, wait=False):  # it is in use, or gone by now
            shutil.rmtree(left)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file or directory; the system takes it from a process that ends, however it ends.

    Raises:
        BlockingIOError: another holds it, and ``wait`` is false.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if wait else nullcontext():  # there are file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)

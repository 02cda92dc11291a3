"""Writing results whole or not at all: into a temporary place first, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_plain(name: str) -> bool:
    """Whether a name that was read from a file is that of a file, and not of a path out of the folder that it is in."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and Path(name).name == name


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes ``path`` when the block ends without an error; on one, what was there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; a failure leaves what was there before."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory whose files move to ``path`` when the block ends without an error.

    An existing ``path`` keeps its other files, and on an error all of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):  # some libraries write files for the user's eyes only
            file.chmod(0o755 if file.is_dir() else 0o644)
        if not path.exists():
            temporary.replace(path)
            return
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            target = path / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""Writing whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tokgraph.errors import FileError
from tokgraph.files import new_directory, write_atomically


def names(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, "first: é\n")
    assert path.read_text(encoding="utf-8") == "first: é\n"
    write_atomically(path, "second\n")
    assert path.read_text(encoding="utf-8") == "second\n"
    assert names(tmp_path) == ["a", "a/b", "a/b/file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_interruption_leaves_the_old_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def fails(*args: object) -> None:
        raise error

    monkeypatch.setattr(Path, "chmod", fails)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else FileError):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_new_directory_appears_when_all_is_done(tmp_path: Path) -> None:
    target = tmp_path / "out" / "run"
    with new_directory(target) as place:
        (place / "ir").mkdir()
        (place / "ir" / "after.txt").write_text("graph", encoding="utf-8")
        (place / "plan.json").write_text("{}", encoding="utf-8")
        assert not target.exists()
    assert names(target) == ["ir", "ir/after.txt", "plan.json"]
    assert names(target.parent) == ["run", "run/ir", "run/ir/after.txt", "run/plan.json"]
    assert os.access(target, os.R_OK | os.X_OK)
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_existing_directory_keeps_its_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "plan.json").write_text("old", encoding="utf-8")
    with new_directory(tmp_path) as place:
        (place / "plan.json").write_text("new", encoding="utf-8")
        (place / "ir").mkdir()
        (place / "ir" / "x").write_text("", encoding="utf-8")
        assert (tmp_path / "plan.json").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["ir", "ir/x", "notes.txt", "plan.json"]
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == "new"
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_nothing_new(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "plan.json").write_text("old", encoding="utf-8")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="no"), new_directory(target) as place:  # noqa: PT012
        (place / "plan.json").write_text("new", encoding="utf-8")
        raise ValueError("no")
    assert names(tmp_path) == before
    if exists:
        assert (target / "plan.json").read_text(encoding="utf-8") == "old"


def test_a_file_in_the_way_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("a file", encoding="utf-8")
    with pytest.raises(FileError, match="cannot write"), new_directory(target) as place:
        (place / "plan.json").write_text("new", encoding="utf-8")
    assert target.read_text(encoding="utf-8") == "a file"
    assert names(tmp_path) == ["out"]

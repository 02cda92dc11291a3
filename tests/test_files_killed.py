"""Runs that are killed, or end at the same time, leave files whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

import tokgraph as tg
from tests.harness import captured_tiny
from tokgraph.files import new_directory, new_file, write_atomically

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks of directories need POSIX")
SPAWN = multiprocessing.get_context("fork")


def names(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def linger(target: Path, directory: bool) -> None:
    with new_directory(target) if directory else new_file(target) as place:
        (place / "half" if directory else place).write_text("half")
        (target.parent / "started").touch()
        time.sleep(60)


def started(parent: Path) -> None:
    while not (parent / "started").exists():
        time.sleep(0.01)
    (parent / "started").unlink()


def killed(target: Path, directory: bool) -> None:
    """A run that writes ``target``, killed when it is half done."""
    process = SPAWN.Process(target=linger, args=(target, directory))
    process.start()
    started(target.parent)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("directory", [True, False])
def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path: Path, directory: bool) -> None:
    target = tmp_path / "out[1]"
    killed(target, directory)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out[1].")
    assert not target.exists()
    if directory:
        with new_directory(target) as place:
            (place / "a").write_text("whole")
        assert names(tmp_path) == ["out[1]", "out[1]/a"]
    else:
        write_atomically(target, "whole")
        assert names(tmp_path) == ["out[1]"]


def test_what_is_being_written_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_directory(target) as place:
        (place / "slow").write_text("1")
        with new_directory(target) as other:
            (other / "fast").write_text("2")
        write_atomically(tmp_path / "out.json", "3")
        assert names(target) == ["fast"]
        assert (place / "slow").read_text() == "1"
    assert names(tmp_path) == ["out", "out.json", "out/fast", "out/slow"]


def test_a_directory_in_a_directory(tmp_path: Path) -> None:
    """What writes into a folder may itself write whole or not at all."""
    target = tmp_path / "out"
    for _ in range(2):
        with new_directory(target) as place:
            for inner in (place, place / "more"):
                with new_directory(inner) as deeper:
                    write_atomically(deeper / "a", "1")
            write_atomically(place / "b", "2")
    assert names(tmp_path) == ["out", "out/a", "out/b", "out/more", "out/more/a"]


def write_many(target: Path, text: str, times: int) -> None:
    for _ in range(times):
        with new_directory(target) as place:
            for name in "abcdefgh":
                (place / name).write_text(text)


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    """All files are those of one of them."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("user's")
    both = [SPAWN.Process(target=write_many, args=(target, text, 40)) for text in ("one", "two")]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    texts = {(target / name).read_text() for name in "abcdefgh"}
    assert len(texts) == 1
    assert (target / "mine").read_text() == "user's"
    assert names(tmp_path) == ["out", *(f"out/{name}" for name in (*"abcdefgh", "mine"))]


def saved_tiny() -> tg.Accelerated:
    return captured_tiny(1).apply(tg.Plan())


def limited(target: Path, size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        saved_tiny().save(target)
    except tg.FileError as error:
        (target.parent / "said").symlink_to(str(error).splitlines()[0].replace("/", "|"))  # no byte is left to write


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, 3000, 20_000])
def test_a_full_disk(tmp_path: Path, size: int) -> None:
    """Wherever it fails (weights, plan, graphs), it is said, and nothing is left."""
    target = tmp_path / "out"
    process = SPAWN.Process(target=limited, args=(target, size))
    process.start()
    process.join()
    (said,) = tmp_path.iterdir()
    assert str(said.readlink()).startswith("error[TG011]: cannot write")
    assert not target.exists()

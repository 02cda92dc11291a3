"""The files of a saved program: checked when loaded, free of code, written whole or not at all."""

from __future__ import annotations

import copy
import json
import pickle
import pickletools
import shutil
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tokgraph as tg
from tests import tiny
from tests.harness import captured_tiny
from tests.store.programs import TASKS, THINNED, G, Saved, read, same
from tokgraph.store.manifest import MANIFEST
from tokgraph.store.weights import write_weights

pytestmark = pytest.mark.xdist_group("store")  # one process saves the programs


def changed(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "changed"))


def refused(folder: Path) -> tg.FileError:
    with pytest.raises(tg.FileError) as raised:
        tg.load_accelerated(folder)
    assert str(raised.value).startswith("error[TG011]")
    return raised.value


def test_nothing_there(tmp_path: Path) -> None:
    assert "it has no manifest.json" in refused(tmp_path).message
    assert "it has no manifest.json" in refused(tmp_path / "none").message


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_manifest_that_was_cut_off(saved: Saved, tmp_path: Path, share: float) -> None:
    folder = changed(saved.folder, tmp_path)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: int(share * len(text))])
    assert "is not valid JSON" in refused(folder).message


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 1}', '{"schema": "3"}', "3", '"x"'])
def test_a_manifest_of_another_schema(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    assert "is not of schema 3" in refused(tmp_path).message


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    refused(tmp_path)


@pytest.mark.parametrize("key", ["files", "tasks", "state"])
def test_a_manifest_without_what_it_must_have(saved: Saved, tmp_path: Path, key: str) -> None:
    folder = changed(saved.folder, tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[key]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused(folder)


def test_every_file_is_checked(saved: Saved, tmp_path: Path) -> None:
    """Each file with one byte changed, one byte less, or gone."""
    manifest = json.loads((saved.folder / MANIFEST).read_text())
    names = {path.name for path in saved.folder.iterdir()}
    graphs = {f"{before}{task}.pt2" for before in ("", "baseline.") for task in TASKS}
    assert graphs | {"weights.safetensors", "plan.json", "example.safetensors"} == names - {MANIFEST}
    assert set(manifest["files"]) == names - {MANIFEST}
    folder = changed(saved.folder, tmp_path)
    for name in manifest["files"]:
        path = folder / name
        good = path.read_bytes()
        middle = len(good) // 2
        for bad in (good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], good[:-1]):
            path.write_bytes(bad)
            assert f"{name} is not the file that was saved" in refused(folder).message
        path.unlink()
        assert f"{name} is missing" in refused(folder).message
        path.write_bytes(good)
    tg.load_accelerated(folder)


def test_weights_of_another_program(saved: Saved, tmp_path: Path) -> None:
    """The same names and shapes, other values."""
    torch.manual_seed(7)
    other = tiny.Unified(2).state_dict()
    folder = changed(saved.folder, tmp_path)
    write_weights(folder / "weights.safetensors", other)
    assert load_file(folder / "weights.safetensors").keys() == load_file(saved.folder / "weights.safetensors").keys()
    message = refused(folder)
    assert "its hash differs" in message.message
    assert "belongs to another program" in str(message.help)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["saved", "rich_saved"])
def test_weights_are_the_state(request: pytest.FixtureRequest, which: str) -> None:
    """Byte for byte, each tensor once; further names of tied weights are aliases."""
    it: Saved = request.getfixturevalue(which)
    state, path = it.before.state_dict(), it.folder / "weights.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    aliases = json.loads(metadata["tokgraph.aliases"])
    assert aliases == ({"head.weight": "embed.weight"} if which == "rich_saved" else {})
    assert header.keys() == state.keys() - aliases.keys()
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        expected = state[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert raw[8 + length + start : 8 + length + end] == expected, name
    assert sum(e["data_offsets"][1] - e["data_offsets"][0] for e in header.values()) == len(raw) - 8 - length
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(header)


def test_weights_are_nowhere_else(saved: Saved) -> None:
    """A graph's file holds no values of parameters."""
    for path in saved.folder.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            contents = [archive.read(name) for name in archive.namelist()]
        for name, x in saved.before.state_dict().items():
            if x.numel() >= 16:
                assert not any(x.numpy().tobytes() in content for content in contents), (path.name, name)


HARMLESS = ("torch", "collections", "_codecs")
"""Modules whose names a pickle may hold: tensors need them."""


def pickled_globals(data: bytes) -> set[str]:
    """``module name`` of everything that a pickle imports, without loading it; empty for what is no pickle."""
    strings: list[str] = []
    found = set()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                found.add(str(argument))
            elif opcode.name == "STACK_GLOBAL":
                found.add(" ".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:
        return set()
    return found


def test_the_scan_sees_code() -> None:
    for protocol in (2, 4):
        (found,) = pickled_globals(pickle.dumps(read, protocol))
        assert found == f"{read.__module__} read"


@pytest.mark.parametrize("which", ["saved", pytest.param("rich_saved", marks=pytest.mark.slow)])
def test_no_code_is_pickled(request: pytest.FixtureRequest, which: str) -> None:
    it: Saved = request.getfixturevalue(which)
    members = 0
    for path in it.folder.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                members += 1
                modules = {found.partition(" ")[0].partition(".")[0] for found in pickled_globals(archive.read(name))}
                assert modules <= set(HARMLESS), f"{path.name}: {name}"
    assert members > 10


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_writes_nothing(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """What was in the folder stays, byte for byte, files of an export among it."""
    folder = tmp_path / "program"
    if there:
        shutil.copytree(saved.folder, folder)
        (folder / "understanding.onnx").write_bytes(b"an export")
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if there else {}
    written = []

    def fail(program: Any, buffer: BytesIO) -> None:
        written.append(program)
        buffer.write(b"half")
        if len(written) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(tg.FileError, match="no space left"):
        saved.before.save(folder)
    assert len(written) == 2
    assert folder.exists() == there
    assert [path.name for path in tmp_path.iterdir()] == ([folder.name] if there else [])
    if there:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_saving_over_another_program(saved: Saved, rich_saved: Saved, tmp_path: Path) -> None:
    """The last one is there; exports of the first, which belong to other weights, are gone; files of the user's stay."""
    folder = changed(rich_saved.folder, tmp_path)
    for name in ("understanding.forward.onnx", "constants.safetensors", "mine.onnx", "mine.pt2", "notes.txt"):
        (folder / name).write_text("x")
    (folder / "report.json").write_text(json.dumps({"onnx": {"files": {"understanding.forward.onnx": {}}}}))
    saved.before.save(folder)
    for name in ("understanding.forward.onnx", "constants.safetensors"):
        assert not (folder / name).exists()
    for name in ("mine.onnx", "mine.pt2", "notes.txt"):
        assert (folder / name).read_text() == "x"
    same(tg.load_accelerated(folder)[G](**saved.inputs(G)), saved.before[G](**saved.inputs(G)))


def test_a_report_is_that_of_the_program(saved: Saved, tmp_path: Path) -> None:
    """Saving a program without a report leaves none of another program behind."""
    program = captured_tiny(2).apply(THINNED)
    program.report = {"schema": 1, "policy": "first"}
    program.save(tmp_path / "program", with_baseline=False)
    assert json.loads((tmp_path / "program/report.json").read_text()) == program.report
    saved.before.save(tmp_path / "program", with_baseline=False)
    assert not (tmp_path / "program/report.json").exists()


def test_saving_twice_gives_the_same_plan_weights_and_batches(saved: Saved, tmp_path: Path) -> None:
    saved.before.save(tmp_path / "program")
    for name in ("plan.json", "weights.safetensors", "example.safetensors"):
        assert (tmp_path / "program" / name).read_bytes() == (saved.folder / name).read_bytes()


def test_a_model_without_values(tmp_path: Path) -> None:
    two = captured_tiny(2)
    meta = tg.ModelSpec(copy.deepcopy(two.model).to("meta"), two.spec.tasks)
    program = tg.Accelerated(tg.Program(meta, two.program), tg.Plan(), two.facts)
    with pytest.raises(tg.FileError, match="meta device"):
        program.save(tmp_path / "program", with_baseline=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "..", "a/../../x", "/etc/hostname", "a\\b", ""])
def test_a_manifest_that_names_other_places(saved: Saved, tmp_path: Path, name: str) -> None:
    """It is refused, and saving over it removes nothing outside its folder."""
    folder = changed(saved.folder, tmp_path)
    outside = tmp_path / "x"
    outside.write_text("mine")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "", "bytes": 4}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(tg.FileError, match="not in its folder"):
        tg.load_accelerated(folder)
    saved.before.save(folder, with_baseline=False)
    assert outside.read_text() == "mine"

"""Checkpoints in one process: files that are not what was written, that run code, or that belong to another model."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

import tokgraph as tg
from tests.harness import captured_tiny
from tokgraph import checkpoints


def program(policy: str) -> tg.Accelerated:
    captured = captured_tiny(3)
    return captured.apply(tg.make_plan(captured.program, policy, facts=captured.facts))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[tg.Blockwise, torch.optim.Optimizer, Path]:
    """Two checkpoints of a model whose plan added parameters, between which all of it changed."""
    module, folder = program("himix").module(), tmp_path_factory.mktemp("saved")
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for step in (1, 2):
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.01)
        optimizer.step()
        tg.distributed.save(folder / str(step), module, optimizer, step=step)
    return module, optimizer, folder


class Evil:
    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.at),)


def sealed(folder: Path, name: str, content: bytes) -> None:
    """A file, and the manifest that fits it: what someone else may have written."""
    (folder / name).write_bytes(content)
    about = json.loads((folder / checkpoints.MANIFEST).read_text())
    about["files"][name], about["sha256"][name] = len(content), sha256(content).hexdigest()
    (folder / checkpoints.MANIFEST).write_text(json.dumps(about))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


WRONG: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "cut": (lambda at, other: (at / ".metadata").write_bytes(b"\x80"), "not whole: .metadata has 1 bytes, and had"),
    "missing": (lambda at, other: next(at.glob("*.distcp")).unlink(), "not whole: __0_0.distcp is missing"),
    "of another step": (
        lambda at, other: shutil.copy(other / "__0_0.distcp", at),
        "__0_0.distcp is not what was written",
    ),
    "changed": (lambda at, other: flip(at / "__0_0.distcp"), "__0_0.distcp is not what was written"),
    "no manifest": (lambda at, other: (at / checkpoints.MANIFEST).write_text("{"), "holds no checkpoint"),
    "another manifest": (
        lambda at, other: (at / checkpoints.MANIFEST).write_text('{"files": [1]}'),
        "holds no checkpoint",
    ),
    "code": (lambda at, other: sealed(at, ".metadata", pickle.dumps(Evil(at / "evil"))), "names posix.mkdir"),
    "no metadata": (lambda at, other: sealed(at, ".metadata", pickle.dumps({})), "is a dict, and no metadata"),
    "no pickle": (lambda at, other: sealed(at, ".metadata", b"\x80\x80"), "is not PyTorch's"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_are_not_what_was_written(wrong: str, saved: Any, tmp_path: Path) -> None:
    module, optimizer, folder = saved
    at = shutil.copytree(folder / "2", tmp_path / "2")
    before = {name: x.clone() for name, x in module.state_dict().items()}
    change, message = WRONG[wrong]
    change(at, folder / "1")
    with pytest.raises(tg.FileError, match=message):
        tg.distributed.load(at, module, optimizer)
    with pytest.raises(tg.FileError, match=message):
        tg.distributed.load(at, module)
    assert not (at / "evil").exists()
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    tg.distributed.latest(tmp_path)


def test_what_is_no_tensor_is_plain_data(tmp_path: Path) -> None:
    planner = checkpoints.Planner()
    content = BytesIO()
    torch.save(Evil(tmp_path / "evil"), content)
    content.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        planner.load_bytes(None, content)
    assert not (tmp_path / "evil").exists()


def test_another_model_plan_or_optimizer(saved: Any, tmp_path: Path) -> None:
    module, optimizer, folder = saved
    plain = program("none").module()
    with pytest.raises(tg.FileError, match=r"holds tokgraph_own\.\S+, .*which the module does not have"):
        tg.distributed.load(folder / "1", plain)
    tg.distributed.save(tmp_path / "plain", plain, step=1)
    with pytest.raises(tg.FileError, match="Missing key in checkpoint state_dict: model.tokgraph_own"):
        tg.distributed.load(tmp_path / "plain", module)
    with pytest.raises(tg.FileError, match=r"cannot be loaded: RuntimeError: Missing key .*betas"):
        tg.distributed.load(folder / "1", module, torch.optim.AdamW(module.parameters()))
    assert tg.distributed.load(folder / "2", module, optimizer) == {"step": 2}


def test_what_cannot_be_written(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of before stays as it is, and nothing else is left."""
    module, optimizer, folder = saved
    at = shutil.copytree(folder / "1", tmp_path / "1")
    with pytest.raises(tg.FileError, match="cannot hold loss: Object of type Tensor"):
        tg.distributed.save(at, module, optimizer, loss=torch.ones(()))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("torch.save", "tokgraph.checkpoints.write_atomically"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(tg.FileError, match="No space left"):
                tg.distributed.save(at, module, optimizer, step=3)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert tg.distributed.load(at, module, optimizer) == {"step": 1}

    at.rename(tmp_path / ".1.before")  # a process that died while it put a checkpoint in the place of another
    assert tg.distributed.latest(tmp_path) == tmp_path / ".1.before"
    tg.distributed.save(at, module, optimizer, step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert tg.distributed.load(at, module, optimizer) == {"step": 4}

"""``examples/train.py``: the same run on one process and on two, killed or not; what SIGTERM and cut checkpoints do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tokgraph as tg
from examples import train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]
QUICK = ["train.py", "--quick", "--policy", "random-ltd"]
PHASES = ["--phases", "none:3,random-ltd,himix:3"]
"""The last ones add parameters, which have no state in the optimizer before; checkpoints are after steps 4, 8 and 12."""


def training(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> train.Training:
    """One process that goes on where the last checkpoint is."""
    monkeypatch.setattr(sys, "argv", [*QUICK, *more, "--out", str(out)])
    out.mkdir(exist_ok=True)
    return train.Training(train.arguments(), 0, 1, torch.device("cpu"))


def children(pid: int) -> list[int]:
    stats = [x.read_text().rpartition(")")[2].split() for x in Path("/proc").glob("[0-9]*/stat") if x.is_file()]
    names = [int(x.parent.name) for x in Path("/proc").glob("[0-9]*/stat") if x.is_file()]
    return [name for name, stat in zip(names, stats, strict=True) if int(stat[1]) == pid]


def steps(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def told(out: Path) -> dict[int, dict[str, Any]]:
    """Step -> what was told of it last."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {found["step"]: found for found in map(json.loads, lines)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> train.Training:
    """One process that went through all phases."""
    with pytest.MonkeyPatch.context() as patch:
        alone = training(patch, tmp_path_factory.mktemp("one") / "run", *PHASES)
    before = signal.getsignal(signal.SIGTERM)
    try:
        train.train(alone)
    finally:
        signal.signal(signal.SIGTERM, before)
    return alone


def test_a_run_that_is_killed(undisturbed: train.Training, tmp_path: Path) -> None:
    """``kill -9`` of a process in the second phase: the others end, all begin again at the last checkpoint, in that phase, and
    end as one undisturbed process.
    """
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # a port that is free
    command += [train.__file__, *QUICK[1:], *PHASES, "--parallel", "fsdp", "--out", str(out)]
    root = str(Path(train.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with (tmp_path / "out").open("w") as said:
        run = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        while steps(out) < 5:
            assert run.poll() is None, (tmp_path / "out").read_text()[-2000:]
            time.sleep(0.02)
        os.kill(children(run.pid)[-1], signal.SIGKILL)
        assert run.wait(timeout=600) == 0, (tmp_path / "out").read_text()[-2000:]
    assert "exitcode: -9" in (tmp_path / "out").read_text()
    assert steps(out) >= 12
    expected, found = told(undisturbed.chosen.out), told(out)
    assert [x["plan"] for x in found.values()] == ["none"] * 3 + ["random-ltd"] * 6 + ["himix"] * 3
    for step, x in expected.items():
        for name in ("understanding_loss", "generation_loss", "lr", "plan"):
            assert found[step][name] == pytest.approx(x[name], rel=1e-5), (step, name)
    module = undisturbed.module
    parameters = {name: p.detach().clone() for name, p in module.keyed().named_parameters()}
    assert any(name.startswith("tokgraph_own.") for name in parameters)
    last = tg.distributed.latest(out / "checkpoints")
    assert last is not None
    assert tg.distributed.load(last, module, undisturbed.optimizer) == {"step": 12}
    for name, p in module.keyed().named_parameters():
        torch.testing.assert_close(p, parameters[name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_was_cut_and_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = training(monkeypatch, tmp_path / "run")
    first.chosen.steps = 8
    train.train(first)
    folder = tmp_path / "run" / "checkpoints"
    assert tg.distributed.latest(folder) == folder / "000008"
    file = next((folder / "000008").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(tg.FileError, match="is not whole"):
        tg.distributed.load(folder / "000008", first.module)
    assert tg.distributed.latest(folder) == folder / "000004"

    again = training(monkeypatch, tmp_path / "run")
    assert again.step == 4
    assert again.module.steps == first.module.steps | again.module.steps
    before = signal.getsignal(signal.SIGTERM)
    advance = again.advance

    def interrupted() -> dict[str, float]:
        if again.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance()

    monkeypatch.setattr(again, "advance", interrupted)
    try:
        train.train(again)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert again.step == 6
    assert tg.distributed.latest(folder) == folder / "000006"

"""``examples/train.py``: the same run on one process and on two, killed or not; what SIGTERM and cut checkpoints do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tokgraph as tg
from examples import train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]
QUICK = ["train.py", "--quick", "--policy", "random-ltd"]


def training(monkeypatch: pytest.MonkeyPatch, out: Path) -> train.Training:
    """One process that goes on where the last checkpoint is."""
    monkeypatch.setattr(sys, "argv", [*QUICK, "--out", str(out)])
    out.mkdir(exist_ok=True)
    return train.Training(train.arguments(), 0, 1, torch.device("cpu"))


def children(pid: int) -> list[int]:
    stats = [x.read_text().rpartition(")")[2].split() for x in Path("/proc").glob("[0-9]*/stat") if x.is_file()]
    names = [int(x.parent.name) for x in Path("/proc").glob("[0-9]*/stat") if x.is_file()]
    return [name for name, stat in zip(names, stats, strict=True) if int(stat[1]) == pid]


def steps(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_a_run_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``kill -9`` of a process: the others end, all begin again at the last checkpoint, and end as one undisturbed process."""
    one, two = tmp_path / "one", tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # a port that is free
    root = str(Path(train.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with (tmp_path / "out").open("w") as out:
        run = subprocess.Popen(
            [*command, train.__file__, *QUICK[1:], "--out", str(two)], env=environment, stdout=out, stderr=out
        )
        while steps(two) < 5:
            assert run.poll() is None, (tmp_path / "out").read_text()[-2000:]
            time.sleep(0.02)
        os.kill(children(run.pid)[-1], signal.SIGKILL)
        alone = training(monkeypatch, one)
        train.train(alone)
        assert run.wait(timeout=600) == 0, (tmp_path / "out").read_text()[-2000:]
    assert steps(one) == 12 < steps(two) + 1
    assert "exitcode: -9" in (tmp_path / "out").read_text()
    other = training(monkeypatch, two)
    assert other.step == 12
    expected = dict(alone.program.named_parameters())
    for name, p in other.program.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-5)


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

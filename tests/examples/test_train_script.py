"""``examples/train.py`` in one process: its steps against a loop by hand, and what it tells of them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples import train


def chosen(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> Any:
    """What the command line says, of a small model."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--quick", "--out", str(out), *more])
    return train.arguments()


@pytest.mark.parametrize(("ratio", "understanding"), [("0", 1), ("0.25", 2), ("0.5", 4), ("0.7", 6), ("1", 7)])
def test_tasks_are_mixed_by_a_ratio(
    ratio: str, understanding: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = chosen(monkeypatch, tmp_path, "--micro-batches", "8", "--ratio", ratio)
    steps = [train.tasks_of(step, found) for step in range(20)]
    assert {Counter(tasks)["understanding"] for tasks in steps} == {understanding}
    assert len({tuple(tasks) for tasks in steps}) > 4
    assert steps[3] == train.tasks_of(3, found)


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--steps", "0", "0 is not above 0"),
        ("--batch", "-1", "-1 is not above 0"),
        ("--save-every", "0", "0 is not above 0"),
        ("--micro-batches", "two", "invalid whole value"),
        ("--ratio", "2", "2 is not from 0 to 1"),
        ("--clip", "-1", "-1 is no finite number above 0"),
        ("--lr", "nan", "nan is no finite number above 0"),
        ("--model", "mnist", "invalid choice"),
    ],
)
def test_a_wrong_command_line(
    option: str,
    text: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        chosen(monkeypatch, tmp_path, f"{option}={text}")
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_errors_come_without_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen(monkeypatch, tmp_path, "--phases", "none:90%,shared:20%")
    with pytest.raises(SystemExit, match=r"error\[TG005\]: the phases .* have 13.2 steps, the run has 12"):
        train.main()


@pytest.mark.parametrize(
    ("name", "bf16", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989e12),
        ("NVIDIA H100 80GB HBM3", False, 67e12),
        ("NVIDIA H100 PCIe", True, 756e12),
        ("NVIDIA H200", True, 989e12),
        ("NVIDIA A100-SXM4-80GB", False, 19.5e12),
        ("NVIDIA L40S", True, 362e12),
        ("NVIDIA L4", True, 121e12),
        ("NVIDIA L40", True, None),
        ("NVIDIA H1000", True, None),
        ("AMD Instinct MI300X", True, None),
    ],
)
def test_the_peak_of_a_device(name: str, bf16: bool, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert train.peak_of(torch.device("cuda", 0), bf16) == peak
    assert train.peak_of(torch.device("cpu"), bf16) is None


class Board:
    """Stands for TensorBoard's writer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told, self.flushed = folder, {}, 0

    def add_scalar(self, name: str, x: float, step: int) -> None:
        self.told[step, name] = x

    def flush(self) -> None:
        self.flushed += 1


@pytest.mark.parametrize("installed", [True, False])
def test_what_is_told(
    installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module if installed else None)
    training: Any = SimpleNamespace(chosen=chosen(monkeypatch, tmp_path), step=3, peak=None)
    log = train.Log(training)
    told = {"step": 4, "plan": "shared", "understanding_loss": 1.5, "generation_loss": 2.5, "mfu": None}
    log.tell({**told, "tokens_per_second": 10.0})
    log.tell({**told, "step": 5, "tokens_per_second": 20.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [4, 5]
    assert lines[1] == {**told, "step": 5, "tokens_per_second": 20.0}
    assert (log.board is not None) is installed
    if log.board is not None:
        assert log.board.folder == tmp_path / "tensorboard"
        assert log.board.told[5, "tokens_per_second"] == 20.0
        assert {name for _, name in log.board.told} == {"understanding_loss", "generation_loss", "tokens_per_second"}
        assert log.board.flushed == 2
    bar = log.bar.tasks[0]
    assert (bar.completed, bar.total) == (5, 12)
    assert "shared" in bar.description
    assert "20 tokens/s" in bar.description
    assert "--peak-flops" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning"
)
@pytest.mark.parametrize("bf16", [False, True])
def test_steps_are_those_of_a_loop_by_hand(bf16: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Accumulated, clipped, warmed up; compiled and computed again, or in bf16: as the user's own forwards."""
    how = ["--bf16"] if bf16 else ["--compile", "aot_eager", "--recompute"]
    more = ["--policy", "none", "--clip", "0.2", "--ratio", "0.75", "--peak-flops", "1e12"]
    training = train.Training(chosen(monkeypatch, tmp_path, *more, *how), 0, 1, torch.device("cpu"))
    spec, batch_of = train.model_of(training.chosen)
    parameters = list(spec.model.parameters())
    start = {name: p.detach().clone() for name, p in spec.model.named_parameters()}
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    region = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    for step in range(3):
        told = training.advance()
        losses: dict[str, list[float]] = {"understanding": [], "generation": []}
        tasks = train.tasks_of(step, training.chosen)
        assert Counter(tasks) == {"understanding": 3, "generation": 1}
        flops = tokens = 0
        for micro, task in enumerate(tasks):
            batch = batch_of(task, 4 * step + micro)
            counter = FlopCounterMode(display=False)
            # the counter knows no other attention on the CPU, which in bfloat16 rounds elsewhere
            with region, nullcontext() if bf16 else sdpa_kernel(SDPBackend.MATH), counter:
                loss = spec.tasks[task].forward(spec.model, **batch)["loss"] / 4
                loss.backward()
            losses[task].append(4 * loss.item())
            flops += counter.get_total_flops()
            tokens += batch["input_ids"].numel()
        assert nn.utils.clip_grad_norm_(parameters, 0.2) > 0.2
        optimizer.param_groups[0]["lr"] = 3e-3 * (12 - step) / 11 if step else 3e-3
        optimizer.step()
        optimizer.zero_grad()
        for task, each in losses.items():
            assert told[f"{task}_loss"] == pytest.approx(sum(each) / len(each), rel=1e-2 if bf16 else 1e-5)
        assert told["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        if not bf16:
            assert told["mfu"] * told["seconds"] * 1e12 == pytest.approx(flops, rel=0.02)
        assert told["tokens_per_second"] * told["seconds"] == pytest.approx(tokens)
        assert told["visual_tokens_per_second"] * told["seconds"] == pytest.approx(4 * 4 * 16)
    expected = dict(spec.model.named_parameters())
    for name, p in training.programs["none"].model.named_parameters():
        if not bf16:
            torch.testing.assert_close(p, expected[name], rtol=0, atol=2e-5)
        else:  # AdamW makes whole steps of gradients that are next to nothing, whatever their sign
            assert (p - expected[name]).norm() < 0.1 * (expected[name] - start[name]).norm(), name

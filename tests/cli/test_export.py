"""The commands export, profile and run: what they write and print, exit codes, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokgraph as tg
from tests import tiny

pytest.importorskip("onnx")
TINY = str(Path(tiny.__file__))
SMALL = ("--set", "layers=1")
PLAN = tg.Plan((tg.DropSite("understanding", 0, 1, 0.5), tg.DropSite("generation", 0, 1, 0.5)), exact=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved program with one exported graph of each task."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    accelerated = tg.optimize(tg.load(TINY, layers=1, dynamic=True), PLAN, verify=False)
    accelerated.save(folder)
    accelerated.export_onnx(folder, "forward")
    return folder


@pytest.mark.slow
def test_optimize_export_run_profile(run, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    result = run("optimize", TINY, *SMALL, "--plan", "plan.json", "--no-verify")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/tiny/manifest.json").exists()
    report = json.loads((tmp_path / "out/tiny/report.json").read_text())

    result = run("export", "out/tiny", "--onnx", "forward", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["files"]) == {"understanding.forward.onnx", "generation.forward.onnx"}
    after = json.loads((tmp_path / "out/tiny/report.json").read_text())
    assert after["onnx"] == found
    assert {key: after[key] for key in report} == report
    tg.load_accelerated("out/tiny")  # the export left the program as it was


def test_run_gives_the_same_in_both_runtimes(run, saved: Path, tmp_path: Path) -> None:
    losses = []
    for runtime in ("torch", "onnxruntime"):
        result = run("run", str(saved), "--runtime", runtime, "-o", f"{runtime}.safetensors")
        assert result.exit_code == 0, result.output
        printed = json.loads(result.stdout)
        assert printed["runtime"] == runtime
        losses.append(printed["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    a, b = (load_file(tmp_path / f"{runtime}.safetensors") for runtime in ("torch", "onnxruntime"))
    assert set(a) == set(b) >= {"understanding/loss", "understanding/output_1", "understanding/rows/output_1"}
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_run_on_a_batch_from_a_file(run, saved: Path, tmp_path: Path) -> None:
    loaded = tg.load_accelerated(saved)
    inputs = {name: torch.cat([x, x.flip(0), x]) for name, x in loaded.program["generation"].task.inputs.items()}
    tg.save_batches(tmp_path / "batch.safetensors", {"generation": [inputs]})
    expected = float(loaded["generation"](**inputs)[0].detach())
    for runtime in ("torch", "onnxruntime"):
        result = run("run", str(saved), "--batch", "batch.safetensors", "--runtime", runtime)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["loss"] == {"generation": pytest.approx(expected, rel=1e-5)}


def test_run_gives_gradients(run, saved: Path, tmp_path: Path) -> None:
    result = run("run", str(saved), "--graph", "train-step", "--task", "generation", "-o", "g.safetensors")
    assert result.exit_code == 0, result.output
    loaded = tg.load_accelerated(saved)
    loss = loaded["generation"](**loaded.program["generation"].task.inputs)[0]
    grad = torch.autograd.grad(loss, loaded.model.get_parameter("head.weight"), allow_unused=True)[0]
    assert grad is None  # generation has a head of its own
    weight = loaded.model.get_parameter("code_head.weight")
    grad = torch.autograd.grad(loaded["generation"](**loaded.program["generation"].task.inputs)[0], weight)[0]
    found = load_file(tmp_path / "g.safetensors")
    assert "generation/grad/head.weight" not in found
    torch.testing.assert_close(found["generation/grad/code_head.weight"], grad)


def test_profile_of_exported_graphs(run, saved: Path, tmp_path: Path) -> None:
    result = run("profile", str(saved), "--runs", "2", "--warmup", "1", "--trace", "trace.json", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["runtime"] == "onnxruntime"
    assert len(found["graphs"]) == 2
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_profile_prints_tables(run, saved: Path) -> None:
    result = run("profile", str(saved), "--runtime", "torch", "--graph", "train-step", "--runs", "1", "--warmup", "0")
    assert result.exit_code == 0, result.output
    for text in (
        "phase forward",
        "phase backward",
        "kind attention",
        "kind ffn",
        "block 0",
        "unmapped",
        "of the baseline",
    ):
        assert text in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("export", "{saved}", "--policy", "exact"), 2, "is a saved program"),
        (("export", "{saved}", "--set", "layers=2"), 2, "is a saved program"),
        (("export", "{empty}",), 1, "TG011"),
        (("export", "{saved}", "--onnx", "backward"), 1, "no kind of graph"),
        (("export", "{saved}", "--onnx", ""), 2, "name at least one"),
        (("export", "{saved}", "--opset", "9"), 1, "too old"),
        (("export", "no/such.py",), 2, "no such file"),
        (("run", "{empty}"), 1, "TG011"),
        (("run", "{saved}", "--task", "translation"), 1, "there is no"),
        (("run", "{saved}", "--graph", "train-step", "--runtime", "onnxruntime"), 1, "no exported train-step"),
        (("run", "no/folder"), 2, "does not exist"),
        (("profile", "{empty}"), 1, "TG011"),
        (("profile", "{empty}", "--runtime", "onnxruntime"), 2, "no exported graphs"),
        (("profile", "{saved}", "--graph", "update-step"), 1, "no exported graphs of kind"),
        (("profile", "{saved}", "--runs", "0"), 2, "--runs"),
        pytest.param(
            ("profile", "{saved}", "--device", "cuda"), 1, "TG010",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)  # fmt: skip
def test_bad_input(run, saved: Path, tmp_path: Path, arguments, code: int, message: str) -> None:
    (tmp_path / "empty").mkdir()
    before = {path.name: path.stat().st_mtime_ns for path in saved.iterdir()}
    result = run(*(a.format(saved=saved, empty=tmp_path / "empty") for a in arguments))
    assert result.exit_code == code, result.output
    assert message in result.output
    assert {path.name: path.stat().st_mtime_ns for path in saved.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_batch_of_another_task_or_shape(run, saved: Path, tmp_path: Path) -> None:
    save_file({"translation/0/ids": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    assert "there is no" in run("run", str(saved), "--batch", "other.safetensors").output
    save_file({"generation/0/ids": torch.zeros(2, 3)}, tmp_path / "part.safetensors")
    result = run("run", str(saved), "--batch", "part.safetensors", "--runtime", "onnxruntime")
    assert result.exit_code == 1
    assert "needs the input 'codes'" in result.output
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    assert "no safetensors file" in run("run", str(saved), "--batch", "none.safetensors").output


def test_a_changed_program_is_refused(run, saved: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(saved, tmp_path / "copy")
    weights = tmp_path / "copy/weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = run("run", "copy")
    assert result.exit_code == 1
    assert "TG011" in result.output
    assert "weights.safetensors is not the file that was saved" in result.output

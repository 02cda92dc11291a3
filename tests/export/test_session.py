"""Sessions of ONNX Runtime: what is refused, and tensors of types that numpy lacks."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import tokgraph as tg
from tokgraph.export import session as ort

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
TYPES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}


def model(path: Path, op: str, before: str, after: str, **attributes: object) -> Path:
    """An ONNX model of one operator ``x -> y``, both of any sizes in two dimensions."""
    helper, kinds = onnx.helper, onnx.TensorProto
    x = helper.make_tensor_value_info("x", getattr(kinds, before), ["rows", "columns"])
    y = helper.make_tensor_value_info("y", getattr(kinds, after), ["rows", "columns"])
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], **attributes)], "one", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    onnx.save(made, path)
    return path


@pytest.fixture
def negate(tmp_path: Path) -> Path:
    return model(tmp_path / "negate.onnx", "Neg", "FLOAT", "FLOAT")


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these packages be the installed ones."""

    def distribution(name: str) -> None:
        if name not in names:
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ort.metadata, "distribution", distribution)


def test_two_packages_are_refused(monkeypatch: pytest.MonkeyPatch, negate: Path) -> None:
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    for use in (ort.onnxruntime, lambda: ort.Session(negate)):
        with pytest.raises(tg.DependencyError, match="both onnxruntime and onnxruntime-gpu are installed") as raised:
            use()
        assert raised.value.help == "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'tokgraph[onnx]'"


@pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime-gpu"])
def test_either_package_will_do(monkeypatch: pytest.MonkeyPatch, negate: Path, package: str) -> None:
    installed(monkeypatch, package)
    assert ort.onnxruntime().__name__ == "onnxruntime"
    assert ort.Session(negate).inputs == ("x",)


def test_no_package(monkeypatch: pytest.MonkeyPatch, negate: Path) -> None:
    installed(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(tg.DependencyError, match="the package onnxruntime is not installed") as raised:
        ort.Session(negate)
    assert raised.value.help == "pip install 'tokgraph[onnx]'"
    assert str(raised.value).startswith("error[TG010]")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(negate: Path) -> None:
    """ONNX Runtime itself would run on the CPU, and say so in its log at best."""
    with pytest.raises(tg.DependencyError, match="cannot run on 'cuda'") as raised:
        ort.Session(negate, "cuda")
    assert "--device cpu" in str(raised.value.help)


def test_a_provider_that_falls_back_is_an_error(monkeypatch: pytest.MonkeyPatch, negate: Path) -> None:
    """A build that lists the provider and cannot load it: the list is no test for a GPU."""
    module = ort.onnxruntime()
    real = module.InferenceSession
    monkeypatch.setattr(module, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        module, "InferenceSession", lambda path, options, providers: real(path, options, providers=providers[-1:])
    )
    with pytest.raises(tg.DependencyError, match="its provider could not be loaded"):
        ort.Session(negate, "cuda")


def test_a_build_without_the_provider_is_an_error(monkeypatch: pytest.MonkeyPatch, negate: Path) -> None:
    monkeypatch.setattr(ort.onnxruntime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(tg.DependencyError, match="this build of ONNX Runtime has no such provider"):
        ort.Session(negate, "cuda")


def test_inputs_and_outputs(negate: Path) -> None:
    session = ort.Session(negate, threads=1)
    x = torch.randn(2, 3)
    feeds = session.feeds({"x": x, "not an input": torch.ones(1)})
    assert list(feeds) == ["x"]
    found = session.run(feeds)
    assert list(found) == ["y"]
    assert torch.equal(found["y"], -x)
    assert (session.inputs, session.outputs) == (("x",), ("y",))


def test_tensors_as_they_come(negate: Path) -> None:
    """Not contiguous, with a gradient, empty."""
    session = ort.Session(negate, threads=1)
    for x in (
        torch.randn(3, 2).t(),
        torch.randn(2, 3, requires_grad=True),
        torch.randn(0, 3),
        torch.randn(4, 6)[::2, ::3],
    ):
        assert torch.equal(session.run(session.feeds({"x": x}))["y"], -x.detach())


def test_results_outlive_the_session(negate: Path) -> None:
    session = ort.Session(negate, threads=1)
    first = session.run(session.feeds({"x": torch.ones(2, 2)}))["y"]
    session.run(session.feeds({"x": torch.zeros(2, 2)}))
    del session
    first += 1
    assert torch.equal(first, torch.zeros(2, 2))


def test_a_missing_input(negate: Path) -> None:
    with pytest.raises(tg.BatchError, match="negate.onnx needs the input 'x'") as raised:
        ort.Session(negate).feeds({"z": torch.ones(1)})
    assert raised.value.help == "its inputs are x"


def test_inputs_of_the_wrong_sizes_or_types(negate: Path) -> None:
    session = ort.Session(negate)
    for wrong in (torch.ones(2), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(tg.ExportError, match="ONNX Runtime failed on negate.onnx"):
            session.run(session.feeds({"x": wrong}))


@pytest.mark.parametrize("content", [b"", b"not a model", None], ids=["empty", "text", "cut off"])
def test_a_corrupt_model(tmp_path: Path, negate: Path, content: bytes | None) -> None:
    path = tmp_path / "corrupt.onnx"
    path.write_bytes(negate.read_bytes()[:-20] if content is None else content)
    with pytest.raises(tg.ExportError, match="ONNX Runtime cannot load corrupt.onnx"):
        ort.Session(path)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(tg.ExportError, match="cannot load none.onnx"):
        ort.Session(tmp_path / "none.onnx")


def test_a_type_without_a_kernel(tmp_path: Path) -> None:
    """The error says what to do about it."""
    path = model(tmp_path / "half.onnx", "Erf", "BFLOAT16", "BFLOAT16")
    with pytest.raises(tg.ExportError, match="cannot load half.onnx") as raised:
        ort.Session(path)
    assert "float32" in str(raised.value.help)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit for bit, infinities and signed zeros too; numpy has no bfloat16."""
    session = ort.Session(model(tmp_path / "same.onnx", "Identity", TYPES[dtype], TYPES[dtype]), threads=1)
    special = [[float("inf"), -0.0, 1e-30], [-3.1415926, 1.0, 65504.0]]
    x = torch.tensor(special).to(dtype) if dtype.is_floating_point else torch.tensor([[1, 0, 7], [0, 5, 2]]).to(dtype)
    found = session.run(session.feeds({"x": x}))["y"]
    assert found.dtype is dtype
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(found.view(bits), x.view(bits))


@pytest.mark.parametrize("back", [False, True])
def test_bfloat16_is_what_onnx_runtime_calls_so(tmp_path: Path, back: bool) -> None:
    """Bits are not only passed through: a cast reads and writes them as numbers."""
    before, after = (torch.float32, torch.bfloat16) if back else (torch.bfloat16, torch.float32)
    to = getattr(onnx.TensorProto, TYPES[after])
    session = ort.Session(model(tmp_path / "cast.onnx", "Cast", TYPES[before], TYPES[after], to=to), threads=1)
    x = torch.randn(3, 5).to(before)
    found = session.run(session.feeds({"x": x}))["y"]
    assert found.dtype is after
    assert torch.equal(found, x.to(after))


def test_profiling_writes_its_file_where_it_is_told(tmp_path: Path, negate: Path) -> None:
    session = ort.Session(negate, threads=1, profile=tmp_path / "events")
    session.run(session.feeds({"x": torch.ones(1, 1)}))
    path = session.end_profiling()
    assert path.parent == tmp_path
    assert path.name.startswith("events")
    assert "kernel_time" in path.read_text()

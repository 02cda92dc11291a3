"""Profiles: every event at its place, runs told apart, sums that add up, in ONNX Runtime and in PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

import tokgraph as tg
from tests.harness import captured_tiny
from tokgraph.export.files import NodePlace
from tokgraph.profile import Event, RunProfile, profile_exported, profile_programs, write_trace
from tokgraph.profile.events import summarise_runs
from tokgraph.profile.onnx import place_of, read_profile
from tokgraph.store.batches import read_batches

pytest.importorskip("onnx")


def place(node: str, block: int | None = 0, kind: str = "ffn", phase: str = "forward") -> NodePlace:
    return NodePlace(node, f"layers.{block}", block, kind, phase)


NODES = {
    "node_mm_1": place("mm_1"),
    "node_mm_2": place("mm_2", 1, "attention", "backward"),
    "node_convolution": place("convolution", None, "encoder"),
}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("node_mm_1", "mm_1"),
        ("node_mm_2/MatmulTransposeFusion/", "mm_2"),
        ("node_mm_1_token_7", "mm_1"),
        ("convolution_nchwc", "convolution"),
        ("ReorderOutput", None),
        ("Cast_12", None),
    ],
)
def test_fused_nodes_are_found_by_their_names(name: str, found: str | None) -> None:
    where = place_of(name, NODES)
    assert (where and where.node) == found


def kernel(name: str, start: float, length: float) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": length}


def test_runs_are_told_apart_and_times_are_seconds() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50},
        kernel("node_mm_2", 130, 10),
        kernel("node_mm_1", 105, 20),
        {"cat": "Session", "name": "model_run", "ts": 200, "dur": 40},
        kernel("Cast_3", 201, 5),
        {"cat": "Node", "name": "node_mm_1_fence_before", "ts": 202, "dur": 1},
    ]
    first, second = read_profile(events, NODES)
    assert (first.wall, second.wall) == (50e-6, 40e-6)
    assert [e.name for e in first.events] == ["node_mm_1", "node_mm_2"]
    assert first.events[0].start == pytest.approx(5e-6)
    assert second.events == (Event("Cast_3", None, 1e-6, 5e-6),)


def test_sums_by_block_phase_and_kind() -> None:
    def run(scale: float) -> RunProfile:
        events = (
            Event("a", NODES["node_mm_1"], 0, 1 * scale),
            Event("b", NODES["node_mm_2"], 1, 2 * scale),
            Event("c", NODES["node_convolution"], 3, 4 * scale),
            Event("Cast_1", None, 7, 0.5 * scale),
        )
        return RunProfile(10 * scale, events)

    found = summarise_runs([run(1), run(2), run(3)])
    assert found["wall"] == {"median": 20, "min": 10, "max": 30}
    assert found["kernels"]["median"] == 15
    assert found["mapped"]["median"] == 14
    assert found["between"]["median"] == 5
    assert found["unmapped"] == {"Cast_1": 1.0}
    assert {name: x["median"] for name, x in found["by_block"].items()} == {"encoder": 8, "block 0": 2, "block 1": 4}
    assert list(found["by_block"]) == ["encoder", "block 0", "block 1"]
    assert {name: x["median"] for name, x in found["by_phase"].items()} == {"forward": 10, "backward": 4}
    assert {name: x["median"] for name, x in found["by_kind"].items()} == {"ffn": 2, "attention": 4, "encoder": 8}


def assert_adds_up(graph: dict[str, Any]) -> None:
    profile = graph["profile"]
    for part in ("by_block", "by_phase", "by_kind", "by_module"):
        total = sum(x["min"] for x in profile[part].values())
        most = sum(x["max"] for x in profile[part].values())
        assert total <= profile["mapped"]["max"] * 1.001, part
        assert most >= profile["mapped"]["min"] * 0.999, part
    assert profile["kernels"]["max"] <= profile["wall"]["max"]
    assert set(profile["by_block"]) >= {"block 0", "block 1", "block 2", "head"}


@pytest.fixture(scope="module")
def exported_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    captured = captured_tiny(3)
    accelerated = captured.apply(tg.Plan((tg.DropSite("generation", 1, 2, 0.5),)), "generation")
    folder = tmp_path_factory.mktemp("profile")
    accelerated.export_onnx(folder, "train-step", with_baseline=True)
    return folder


@pytest.fixture(scope="module")
def onnx_profile(exported_folder: Path) -> tuple[dict[str, Any], dict[str, list[RunProfile]]]:
    batches = read_batches(exported_folder / "example.safetensors")
    return profile_exported(exported_folder, lambda file: batches[file.task][0], runs=4, warmup=2, threads=1)


def test_exported_graphs_are_profiled_side_by_side(onnx_profile) -> None:
    found, profiles = onnx_profile
    assert (found["schema"], found["runs"], found["runtime"], found["device"]) == (1, 4, "onnxruntime", "cpu")
    assert [(g["variant"], g["graph"]) for g in found["graphs"]] == [
        ("baseline", "train-step"),
        ("accelerated", "train-step"),
    ]
    assert all(len(runs) == 4 for runs in profiles.values())
    for graph in found["graphs"]:
        assert_adds_up(graph)
        assert set(graph["profile"]["by_phase"]) == {"forward", "backward"}
        assert ("drop" in graph["profile"]["by_kind"]) == (graph["variant"] == "accelerated")
    (ratio,) = found["ratios"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]


def test_nearly_all_kernel_time_is_mapped_and_the_rest_is_named(onnx_profile) -> None:
    found, profiles = onnx_profile
    for graph, runs in zip(found["graphs"], profiles.values(), strict=True):
        profile = graph["profile"]
        assert profile["mapped"]["median"] >= 0.9 * profile["kernels"]["median"]
        names = {event.name for run in runs for event in run.events if event.place is None}
        assert set(profile["unmapped"]) == names


def test_fewer_rows_are_computed_in_the_dropped_block(exported_folder: Path) -> None:
    """What makes its time go down: the feed-forward's products have fewer rows there, and as many as before elsewhere."""
    import onnx

    def rows(name: str) -> dict[str, list[int]]:
        model = onnx.load(exported_folder / name, load_external_data=False)
        shapes = {x.name: x.type.tensor_type.shape.dim for x in model.graph.value_info}
        found: dict[str, list[int]] = {}
        for node in model.graph.node:
            about = {e.key.removeprefix("tokgraph."): e.value for e in node.metadata_props}
            if node.op_type == "Gemm" and about["phase"] == "forward" and about["kind"] == "ffn":
                size = shapes[node.output[0]][0]
                count = sympy.sympify(size.dim_param or size.dim_value).subs({"batch": 2, "tokens": 5})
                found.setdefault(about["block"], []).append(int(count))
        return found

    images, text = 6, 5
    whole, kept = 2 * (images + text), 2 * (images // 2 + text)
    assert rows("baseline.generation.train-step.onnx") == {block: [whole, whole] for block in "012"}
    assert rows("generation.train-step.onnx") == {"0": [whole] * 2, "1": [kept] * 2, "2": [whole] * 2}


def test_the_trace_is_a_chrome_trace(onnx_profile, tmp_path: Path) -> None:
    _, profiles = onnx_profile
    write_trace(tmp_path / "trace.json", profiles)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == sum(len(runs[-1].events) for runs in profiles.values())
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in complete)
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == set(profiles)
    assert any(e["args"].get("block") == 1 and e["args"]["module"].startswith("layers.1") for e in complete)


@pytest.fixture(scope="module")
def torch_profile() -> dict[str, Any]:
    captured = captured_tiny(3)
    accelerated = captured.apply(tg.Plan((tg.DropSite("generation", 1, 2, 0.5),)), "generation")
    baseline = tg.Program(captured.spec, {"generation": captured.program["generation"]})
    inputs = {"generation": dict(captured.spec.tasks["generation"].inputs)}
    programs = {"baseline": baseline, "accelerated": accelerated.program}
    return profile_programs(programs, inputs, runs=3, warmup=1)[0]


def test_programs_are_profiled_in_pytorch(torch_profile) -> None:
    assert (torch_profile["runtime"], torch_profile["device"]) == ("torch", "cpu")
    kinds = [(g["variant"], g["graph"]) for g in torch_profile["graphs"]]
    assert kinds == [(v, g) for g in ("forward", "train-step") for v in ("baseline", "accelerated")]
    for graph in torch_profile["graphs"]:
        assert_adds_up(graph)
        phases = {"forward"} if graph["graph"] == "forward" else {"forward", "backward"}
        assert set(graph["profile"]["by_phase"]) == phases
        assert ("drop" in graph["profile"]["by_kind"]) == (graph["variant"] == "accelerated")


def test_every_block_has_a_backward_in_pytorch() -> None:
    captured = captured_tiny(3)
    _, profiles = profile_programs(
        {"baseline": captured.program},
        {name: dict(task.inputs) for name, task in captured.spec.tasks.items()},
        kinds=("train-step",),
        runs=1,
        warmup=0,
    )
    for runs in profiles.values():
        backward = [e.place for e in runs[-1].events if e.place is not None and e.place.phase == "backward"]
        assert {p.block for p in backward} >= {0, 1, 2}
        assert {p.kind for p in backward} >= {"attention", "ffn", "norm", "head"}


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(tg.ExportError, match="no exported graphs"):
        profile_exported(tmp_path, lambda file: {})
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(tg.ExportError, match="no ONNX model|does not say"):
        profile_exported(tmp_path, lambda file: {})
    captured = captured_tiny(1)
    inputs = {name: dict(task.inputs) for name, task in captured.spec.tasks.items()}

    def profile(**options: Any) -> Callable[[], Any]:
        return lambda: profile_programs({"baseline": captured.program}, inputs, **options)

    with pytest.raises(tg.TokgraphError, match="PyTorch runs no update-step"):
        profile(kinds=("update-step",))()
    if not torch.cuda.is_available():
        with pytest.raises(tg.DependencyError, match="no CUDA device"):
            profile(device="cuda")()

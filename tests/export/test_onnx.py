"""Exported graphs: the same loss, outputs and gradients as PyTorch, one weights file, and nothing when they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tokgraph as tg
from tests import tiny
from tests.export.conftest import Exported, run_file
from tests.harness import Captured, captured_tiny
from tokgraph.export import export_onnx
from tokgraph.export.convert import DEFAULT_OPSET, is_decomposed, onnx_decompositions
from tokgraph.passes.lower import lower_forward, lower_train_step

onnx = pytest.importorskip("onnx")

TASKS = ("understanding", "generation")


def loss_and_gradients(parameters: Mapping[str, nn.Parameter], run, inputs) -> dict[str, torch.Tensor]:
    """What autograd gives: the loss, and ``grad/<name>`` of the parameters that it depends on."""
    named = {name: p for name, p in parameters.items() if p.requires_grad}
    loss = run(**inputs)[0]
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {f"grad/{name}": g for name, g in zip(named, found, strict=True) if g is not None}
    return {"loss": loss.detach(), **gradients}


def assert_alike(actual, expected, tolerance: float) -> None:
    assert set(actual) == set(expected)
    scale = max(float(x.detach().abs().max()) for x in expected.values())
    for name, wanted in ((name, x.detach()) for name, x in expected.items()):
        error = float((actual[name] - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-6 * scale)
        assert error <= tolerance, f"{name}: {error:.1e}"


def wider(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Five samples where there were two."""
    return {name: torch.cat([x, x.flip(0), x[:1]]) for name, x in inputs.items()}


@pytest.mark.parametrize("policy", ["shared", pytest.param("himix-hmgen-share-partial", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.slow
def test_gradients_are_those_of_autograd(exported, policy: str, task: str) -> None:
    made: Exported = exported(policy)
    inputs = wider(dict(made.accelerated.program[task].task.inputs))
    module = made.accelerated[task]
    expected = loss_and_gradients(module.task_graph.named_parameters(), module, inputs)
    assert_alike(run_file(made.folder / f"{task}.train-step.onnx", inputs), expected, 1e-4)


@pytest.mark.slow
def test_the_baseline_gives_the_gradients_of_the_users_model(tmp_path: Path) -> None:
    captured = captured_tiny(1)
    accelerated = captured.apply(tg.Plan((tg.DropSite("generation", 0, 1, 0.5),)), "generation")
    files = accelerated.export_onnx(tmp_path, "train-step", with_baseline=True)["files"]
    assert set(files) == {"baseline.generation.train-step.onnx", "generation.train-step.onnx"}
    task = captured.spec.tasks["generation"]
    expected = loss_and_gradients(
        dict(captured.model.named_parameters()), lambda **x: task.forward(captured.model, **x), dict(task.inputs)
    )
    assert_alike(run_file(tmp_path / "baseline.generation.train-step.onnx", dict(task.inputs)), expected, 1e-4)
    thinned = run_file(tmp_path / "generation.train-step.onnx", dict(task.inputs))
    assert not torch.allclose(thinned["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_forward_gives_loss_outputs_and_rows(exported, task: str) -> None:
    made: Exported = exported()
    inputs = wider(dict(made.accelerated.program[task].task.inputs))
    (loss, logits), rows = made.accelerated[task].with_rows(**inputs)
    found = run_file(made.folder / f"{task}.forward.onnx", inputs)
    assert_alike({"loss": found["loss"], "logits": found["output_1"]}, {"loss": loss, "logits": logits}, 1e-5)
    assert set(found) == {"loss", "output_1", *(["rows/output_1"] if rows else [])}
    if rows:
        assert torch.equal(found["rows/output_1"], rows["[1]"])


@pytest.mark.slow
def test_a_longer_text_runs_too(exported) -> None:
    made: Exported = exported()
    inputs = dict(made.accelerated.program["generation"].task.inputs)
    inputs["ids"] = torch.cat([inputs["ids"], inputs["ids"][:, :3]], 1)
    loss, _ = made.accelerated["generation"](**inputs)
    found = run_file(made.folder / "generation.forward.onnx", inputs)
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_weights_lie_in_one_file_once_and_unchanged(exported) -> None:
    made: Exported = exported()
    stored = load_file(made.folder / "weights.safetensors")
    state = made.accelerated.state_dict()
    assert set(stored) == set(state)
    for name, tensor in state.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor), name
    size = (made.folder / "weights.safetensors").stat().st_size
    raw = sum(x.numel() * x.element_size() for x in state.values())
    assert raw < size < raw + 8192
    for path in made.folder.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        own = {x.name: x for x in model.graph.initializer if x.name in state}
        assert own, path
        for x in own.values():
            where = {entry.key: entry.value for entry in x.external_data}
            assert where["location"] == "weights.safetensors"
            assert not x.raw_data
        inline = sum(len(x.raw_data) for x in model.graph.initializer)
        assert inline < 0.1 * raw


@pytest.mark.slow
def test_every_node_says_where_it_comes_from(exported) -> None:
    made: Exported = exported()
    model = onnx.load(made.folder / "understanding.train-step.onnx", load_external_data=False)
    places = [{e.key: e.value for e in node.metadata_props} for node in model.graph.node]
    assert all("tokgraph.kind" in place for place in places)
    assert {place["tokgraph.phase"] for place in places} == {"forward", "backward"}
    assert {"attention", "ffn", "norm", "head", "encoder", "drop"} <= {place["tokgraph.kind"] for place in places}
    names = {node.name for node in model.graph.node}
    assert len(names) == len(model.graph.node), "the side table goes by node name"
    for block in "012":
        mine = [p for p in places if p["tokgraph.block"] == block]
        assert {p["tokgraph.phase"] for p in mine} == {"forward", "backward"}
        assert any(p["tokgraph.module"].startswith(f"layers.{block}") for p in mine)


@pytest.mark.slow
@pytest.mark.parametrize("lower", [lower_forward, lower_train_step])
@pytest.mark.parametrize("task", ["understanding", pytest.param("generation", marks=pytest.mark.slow)])
def test_a_graph_is_traced_once(exported, task: str, lower) -> None:
    """What the converter would decompose, by a trace that takes longer than all the rest, is decomposed already."""
    program = exported().accelerated
    lowered = lower(program.program[task], onnx_decompositions(DEFAULT_OPSET))
    assert is_decomposed(lowered, DEFAULT_OPSET)


@pytest.mark.slow
def test_no_path_of_the_machine_is_in_a_file(exported) -> None:
    made: Exported = exported()
    for path in made.folder.glob("*.onnx"):
        assert not re.search(rb"site-packages|/home/|/work/|\.py\b", path.read_bytes()), path


@pytest.mark.slow
def test_sizes_are_named_as_the_user_named_them(exported) -> None:
    made: Exported = exported()
    model = onnx.load(made.folder / "understanding.forward.onnx", load_external_data=False)
    shapes = {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in model.graph.input}
    assert shapes == {"ids": ["batch", "tokens"], "labels": ["batch", "tokens"], "patches": ["batch", 6, 4]}


@pytest.mark.slow
def test_the_report_has_the_errors_found_on_two_batches(exported) -> None:
    made: Exported = exported()
    report = json.loads((made.folder / "report.json").read_text())["onnx"]
    assert report["files"] == made.files
    for name, file in report["files"].items():
        first, second = file["checks"]
        assert first["sizes"]["batch"] == 2
        assert second["sizes"]["batch"] > 2
        assert second["sizes"]["tokens"] > first["sizes"]["tokens"], name
        assert 0 <= first["output_error"] <= 1e-5
        assert 0 <= second["gradient_error"] <= 1e-4
    unused = report["files"]["generation.train-step.onnx"]["without_gradient"]
    assert "patches.weight" in unused
    assert "codes.weight" not in unused


@pytest.mark.slow
def test_fused_attention_and_norms_at_opset_23(tmp_path: Path) -> None:
    captured = captured_tiny(1)
    accelerated = captured.apply(tg.Plan(), "understanding")
    operators = {}
    for opset in (18, 23):
        accelerated.export_onnx(tmp_path / str(opset), "forward", opset=opset)
        model = onnx.load(tmp_path / str(opset) / "understanding.forward.onnx", load_external_data=False)
        assert {x.domain: x.version for x in model.opset_import}[""] == opset
        operators[opset] = {node.op_type for node in model.graph.node}
    assert "Attention" in operators[23]
    assert "Attention" not in operators[18]


class Tied(nn.Module):
    """Embedding and head are one parameter; one layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.Unified(1)
        self.inner.head = nn.Linear(16, tiny.VOCABULARY, bias=False)
        self.inner.head.weight = self.inner.embed.weight
        self.inner.layers[0].mlp[0].requires_grad_(False)


@pytest.mark.slow
def test_tied_and_frozen_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = tiny.build(layers=1).tasks["understanding"]
    model = Tied()
    spec = tg.ModelSpec(
        model,
        {
            "understanding": tg.Task(
                forward=lambda model, **x: task.forward(model.inner, **x),
                inputs=task.inputs,
                dynamic=task.dynamic,
                visual=task.visual,
                reads="text",
            )
        },
    )
    accelerated = tg.apply(tg.capture(spec), tg.Plan(exact=True))
    accelerated.export_onnx(tmp_path, "train-step")
    module = accelerated["understanding"]
    found = run_file(tmp_path / "understanding.train-step.onnx", dict(task.inputs))
    assert_alike(found, loss_and_gradients(dict(model.named_parameters()), module, dict(task.inputs)), 1e-4)
    assert "grad/inner.embed.weight" in found
    assert "grad/inner.head.weight" not in found  # one parameter, one gradient
    assert "grad/inner.layers.0.mlp.0.weight" not in found
    stored = load_file(tmp_path / "weights.safetensors")
    assert "inner.embed.weight" in stored
    assert "inner.head.weight" not in stored


class Table(nn.Embedding):
    """An embedding that is read by plain indexing, as tables of relative positions are."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


@pytest.mark.slow
def test_gradients_of_repeated_indices_are_added_in_turn(tmp_path: Path) -> None:
    """ONNX Runtime's ScatterND that adds loses additions on several threads; small batches would not show it."""
    spec = tiny.build(layers=1)
    spec.model.embed = Table(tiny.VOCABULARY, 16)
    accelerated = tg.apply(tg.capture(spec), tg.Plan(exact=True))
    accelerated.export_onnx(tmp_path, "train-step")
    for task in TASKS:
        path = tmp_path / f"{task}.train-step.onnx"
        inputs = dict(spec.tasks[task].inputs)
        expected = loss_and_gradients(dict(spec.model.named_parameters()), accelerated[task], inputs)
        assert_alike(run_file(path, inputs), expected, 1e-4)
        nodes = onnx.load(path, load_external_data=False).graph.node
        scatters = [(n.op_type, a.s) for n in nodes for a in n.attribute if n.op_type.startswith("Scatter")]
        assert ("ScatterElements", b"add") in scatters
        assert ("ScatterND", b"add") not in scatters


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 1e-4)])
def test_half_precision(tmp_path: Path, dtype: str, tolerance: float) -> None:
    captured = Captured.of(tiny.build(layers=1, dtype=dtype))
    site = tg.DropSite("understanding", 0, 1, 0.5)
    accelerated = captured.apply(tg.Plan((site,), exact=True), "understanding")
    files = accelerated.export_onnx(tmp_path, ("forward", "train-step"))["files"]
    for file in files.values():
        # ONNX Runtime has no bfloat16 kernels on the CPU: the same graph is checked in float32
        assert {check["dtype"] for check in file["checks"]} == {"float16" if dtype == "float16" else "float32"}
        assert max(check["gradient_error"] for check in file["checks"]) < tolerance
    model = onnx.load(tmp_path / "understanding.train-step.onnx", load_external_data=False)
    types = {x.name: onnx.TensorProto.DataType.Name(x.data_type) for x in model.graph.initializer}
    assert types["head.weight"] == dtype.upper()
    assert load_file(tmp_path / "weights.safetensors")["head.weight"].dtype == getattr(torch, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "options", "reference"),
    [
        ("sgd", {"lr": 0.1, "momentum": 0.9}, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        ("adamw", {"lr": 0.01}, lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-2)),
    ],
)
def test_update_steps_are_those_of_torch_optim(tmp_path: Path, optimizer: str, options, reference) -> None:
    captured = captured_tiny(1)
    accelerated = captured.apply(tg.Plan(exact=True), "generation")
    accelerated.export_onnx(tmp_path, "update-step", optimizer=optimizer, optimizer_options=options)
    module = accelerated["generation"]
    inputs = dict(captured.spec.tasks["generation"].inputs)
    named = module.task_graph.named_parameters()
    copies = {name: p.detach().clone() for name, p in named.items()}
    try:
        rule = reference(list(named.values()))
        feeds = {f"param/{name}": x for name, x in copies.items()}
        path = tmp_path / "generation.update-step.onnx"
        model = onnx.load(path, load_external_data=False)
        for x in model.graph.input:
            if x.name.startswith("state/"):
                feeds[x.name] = torch.zeros([d.dim_value for d in x.type.tensor_type.shape.dim])
        for _ in range(2):
            found = run_file(path, {**inputs, **feeds})
            rule.zero_grad()
            module(**inputs)[0].backward()
            scale = max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
            settled = {n: p.grad.abs() > 1e-4 * scale for n, p in named.items() if p.grad is not None}
            rule.step()
            for name, mask in settled.items():
                torch.testing.assert_close(
                    found[f"new_param/{name}"][mask], named[name].detach()[mask], rtol=1e-4, atol=1e-6
                )
            feeds = {name: found[f"new_{name}"] for name in feeds}
            with torch.no_grad():  # what rounding decides is not compared, and must not spread
                for name in settled:
                    feeds[f"param/{name}"] = named[name].detach().clone()
    finally:
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(copies[name])
                p.grad = None


def test_a_random_plan_takes_the_step_as_an_input(tmp_path: Path) -> None:
    captured = captured_tiny(3)
    accelerated = captured.apply(tg.Plan((tg.DropSite("generation", 1, 2, 0.5, "random"),)), "generation")
    accelerated.export_onnx(tmp_path, "forward")
    inputs = dict(captured.spec.tasks["generation"].inputs)
    losses = []
    for step in (0, 1):
        accelerated["generation"].step = step
        found = run_file(tmp_path / "generation.forward.onnx", {**inputs, "tokgraph_step": torch.tensor(step)})
        with torch.no_grad():
            graph = accelerated["generation"].graph_module
            expected = graph(*accelerated.program["generation"].flatten(inputs))[0]
        torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=0)
        losses.append(float(expected))
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_large_constants_lie_beside_the_graphs_once(tmp_path: Path) -> None:
    class Positions(tiny.Unified):
        def __init__(self) -> None:
            super().__init__(1)
            self.register_buffer("table", torch.randn(512, 16), persistent=False)

        def backbone(self, x: torch.Tensor) -> torch.Tensor:
            return super().backbone(x + self.table[: x.shape[1]])

    spec = tiny.build(layers=1)
    spec = tg.ModelSpec(Positions(), {"generation": spec.tasks["generation"]})
    accelerated = tg.apply(tg.capture(spec), tg.Plan())
    accelerated.export_onnx(tmp_path, ("forward", "train-step"))
    stored = load_file(tmp_path / "constants.safetensors")
    assert [tuple(x.shape) for x in stored.values()] == [(512, 16)]
    assert "table" not in load_file(tmp_path / "weights.safetensors")


def test_refusals(tmp_path: Path) -> None:
    captured = captured_tiny(1)
    accelerated = captured.apply(tg.Plan())
    for options, message in (
        ({"kind": "backward"}, "no kind of graph"),
        ({"kind": ()}, "no kind of graph"),
        ({"opset": 11}, "too old"),
        ({"optimizer": "lion"}, "no optimizer"),
        ({"optimizer_options": {"beta": 1}}, "no option 'beta'"),
    ):
        with pytest.raises(tg.ExportError, match=message):
            accelerated.export_onnx(tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    meta = tiny.build(layers=1)
    meta.model.to("meta")
    with pytest.raises(tg.ExportError, match="meta device"):
        tg.apply(tg.capture(meta), tg.Plan()).export_onnx(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["forward", "train-step"])
def test_what_pytorch_fails_with_names_task_and_kind(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds of sizes that contradict one another are an assertion deep inside of PyTorch's tracer."""

    def fails(*args: object) -> None:
        raise AssertionError("tgt_bound=VR[8, 9] not a subset of src_bound=VR[8, 8]\nmore")

    monkeypatch.setattr(f"tokgraph.export.onnx.lower_{kind.replace('-', '_')}", fails)
    accelerated = captured_tiny(1).apply(tg.Plan(), "generation")
    with pytest.raises(tg.ExportError) as refused:
        accelerated.export_onnx(tmp_path / "onnx", kind)
    assert (
        f"task 'generation', {kind}: PyTorch cannot trace the graph: AssertionError: tgt_bound" in refused.value.message
    )
    assert "more" not in refused.value.message
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_weights_of_another_model_are_not_replaced(exported, tmp_path: Path) -> None:
    made: Exported = exported()
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    other = captured_tiny(1).apply(tg.Plan(), "generation")
    with pytest.raises(tg.ExportError, match="another model"):
        other.export_onnx(made.folder, "forward")
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


def test_dropout_is_refused(tmp_path: Path) -> None:
    class Dropping(tiny.Unified):
        def backbone(self, x: torch.Tensor) -> torch.Tensor:
            return super().backbone(nn.functional.dropout(x, 0.1, self.training))

    spec = tg.ModelSpec(Dropping(1), {"generation": tiny.build(layers=1).tasks["generation"]})
    accelerated = tg.apply(tg.capture(spec), tg.Plan())
    with pytest.raises(tg.ExportError, match="dropout"):
        accelerated.export_onnx(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_difference_where_equal_values_are_chosen_from_says_so(tmp_path: Path) -> None:
    class Choosing(tiny.Unified):
        def backbone(self, x: torch.Tensor) -> torch.Tensor:
            chosen = torch.zeros_like(x[0, 0]).topk(2).indices  # PyTorch takes the last ones, ONNX Runtime the first
            return super().backbone(x * torch.ones_like(x[0, 0]).scatter(0, chosen, 3.0))

    spec = tg.ModelSpec(Choosing(1), {"generation": tiny.build(layers=1).tasks["generation"]})
    accelerated = tg.apply(tg.capture(spec), tg.Plan())
    with pytest.raises(tg.ExportError, match="differs between") as raised:
        accelerated.export_onnx(tmp_path / "out", "forward")
    assert "of equal ones" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_batches_of_the_users_are_checked(tmp_path: Path) -> None:
    captured = captured_tiny(1)
    accelerated = captured.apply(tg.Plan(), "generation")
    inputs = dict(captured.spec.tasks["generation"].inputs)
    batches = {"generation": [{name: x.flip(0) for name, x in inputs.items()}]}
    found = export_onnx(accelerated, tmp_path, "forward", batches=batches)
    assert len(found["files"]["generation.forward.onnx"]["checks"]) == 2

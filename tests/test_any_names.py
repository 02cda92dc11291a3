"""One model whose every name is hostile goes the whole way: modules, tensors, inputs, dimensions and tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.harness import Captured
from tokgraph.export.batches import other_sizes
from tokgraph.ir.printer import format_graph
from tokgraph.ir.spec import ModelSpec
from tokgraph.report.report import make_report

PLAIN = (
    "code graph meta model recompile lambda None class a-b 0 3x tensors t_x __ _2e_ tokgraph weight add linear select mul "
    "val_0 state_0 gather_1 scaled_dot_product_attention print_readable _code _graph delete_submodule self args input loss_"
)
ODD = ("a b", "ü", 'q"uote', "x'y", "back\\slash", "a/b", "grad/x", "日本", "new_", "%2E", "#", "{x}", "[/red]")
PARAMETERS = (*PLAIN.split(), *ODD)
MODULES = ("code", "graph", "meta", "model", "recompile", "tensors", "_constants", "lambda", "0", "q w", 'e"r')
READ, DRAW = "../read/a.b", ".."
IDS, LABELS = "self", "input"
WORDS, HIDDEN, TEXT, IMAGE = 24, 8, 5, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph, self.meta = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.code = nn.Linear(HIDDEN, HIDDEN, bias=False)  # of keys: a bias has no gradient but rounding
        self.training = nn.Linear(HIDDEN, HIDDEN)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unsqueeze(1) for project in (self.graph, self.code, self.meta))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return x + self._modules["training"](x).relu()  # type: ignore[misc]


class Hostile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Embedding(WORDS, HIDDEN)
        self.graph = nn.ModuleList(Block() for _ in range(3))
        self.recompile = nn.Linear(HIDDEN, WORDS, bias=False)
        self.recompile.weight = self.code.weight  # tied
        self.training = nn.Parameter(torch.ones(HIDDEN))  # type: ignore[assignment]
        self.register_parameter("add", nn.Parameter(torch.ones(HIDDEN)))
        self.meta = nn.ParameterDict({name: nn.Parameter(torch.randn(HIDDEN) / 9) for name in PARAMETERS})
        self.model = nn.ParameterList([torch.randn(HIDDEN) / 9, torch.randn(HIDDEN) / 9])
        self.tensors = nn.ModuleDict()
        for name in MODULES:
            self.tensors._modules[name] = nn.LayerNorm(HIDDEN)
        self.register_buffer("_constants", torch.full((HIDDEN,), 1.5))
        self.register_buffer("class", torch.full((HIDDEN,), 0.5), persistent=False)
        self.plain = torch.full((HIDDEN,), 1.25)

    def stream(self, ids: Tensor) -> Tensor:
        x = self.code(ids) * self._parameters["training"] * self._parameters["add"]
        for name in PARAMETERS:
            x = x * (1 + self.meta[name])
        x = x * self.model[0] * self.model[1] * self._constants * self._buffers["class"] * self.plain
        for module in self.tensors._modules.values():
            x = module(x)  # type: ignore[misc]
        x = x * torch.tensor([1.0, 2.0] * (HIDDEN // 2))  # which export lifts out of the code
        for block in self.graph:
            x = block(x)
        return x


def read(hostile: Hostile, /, **inputs: Tensor) -> dict[str, Tensor]:
    logits = hostile.recompile(hostile.stream(inputs[IDS]))
    return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[LABELS][:, 1:].flatten()), "out/1": logits}


def draw(hostile: Hostile, /, **inputs: Tensor) -> Tensor:
    ids = inputs["model"]
    logits = hostile.recompile(hostile.stream(ids))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["lambda"][:, 1:].flatten())


def hostile_spec() -> ModelSpec:
    torch.manual_seed(0)
    model = Hostile()
    ids = torch.randint(IMAGE + 2, WORDS, (2, 1 + IMAGE + TEXT))
    ids[:, 1 : 1 + IMAGE] = torch.arange(IMAGE)
    visual = {"low": 0, "high": IMAGE - 1}
    reading = tg.Task(
        read,
        {IDS: ids, LABELS: ids.masked_fill(ids < IMAGE, -100)},
        dynamic={IDS: {0: "lambda"}, LABELS: {0: "lambda"}},
        visual=tg.VisualTokens.ids(input=IDS, **visual),
        reads="text",
    )
    drawing = tg.Task(
        draw,
        {"lambda": ids, "model": ids, "a b": 3, "%2F": [ids[:1], ids[:, :2]]},
        visual=tg.VisualTokens.ids(input="model", **visual),
    )
    return tg.ModelSpec(model, {READ: reading, DRAW: drawing})


@pytest.fixture(scope="module")
def hostile() -> Captured:
    return Captured.of(hostile_spec())


def sites(tasks: tuple[str, ...] = (READ, DRAW), **options: Any) -> tg.Plan:
    return tg.Plan(tuple(tg.DropSite(task, 1, 2, 0.5, **options) for task in tasks), exact=True)


def inputs_of(program: tg.Accelerated | Captured, task: str) -> dict[str, Any]:
    return dict(
        program.spec.tasks[task].inputs if isinstance(program, Captured) else program.program.spec.tasks[task].inputs
    )


def test_graphs_hold_the_users_parameters_under_the_users_names(hostile: Captured) -> None:
    own = dict(hostile.spec.model.named_parameters(remove_duplicate=False))
    for graph in hostile.program.values():
        held = graph.named_parameters()
        assert held.keys() == own.keys() - {"code.weight"}  # tied, and read under its other name
        assert all(own[name] is p for name, p in held.items())
    assert {f"meta.{name}" for name in PARAMETERS} < own.keys()


def test_the_printed_graph_shows_the_users_names(hostile: Captured) -> None:
    text = format_graph(hostile.program[READ])
    assert text.startswith(
        f"task {READ}\n  %self_ = input  # int64[lambda, 12]\n  %input_1 = input  # int64[lambda, 12]\n"
    )
    for name in PARAMETERS:
        assert f"@meta.{name}" in text
    for name in ("training", "recompile.weight", "graph.0.training.weight", "_constants", "class", "plain", "model.1"):
        assert f"@{name}" in text
    assert "@_constants_.lifted_tensor" in text


PLANS = {
    "shared": sites(),
    "own": sites(projections="own"),
    "random": sites(selector="random"),
    "exact": tg.Plan(exact=True),
}


@pytest.mark.parametrize(
    "name", [name if name in ("own", "random") else pytest.param(name, marks=pytest.mark.slow) for name in PLANS]
)
def test_every_plan_agrees_with_the_oracle(hostile: Captured, name: str) -> None:
    accelerated = tg.apply(hostile.facts, PLANS[name])
    assert tg.verify(accelerated).passed
    json.dumps(make_report(accelerated))
    added = {f"tokgraph_own.{task}.graph.1.meta.weight" for task in ("%2E%2E/read/a%2Eb", "%2E%2E")}
    assert added <= set(accelerated.own_parameters) if name == "own" else not accelerated.own_parameters
    assert list(accelerated.state_dict())[: len(hostile.spec.model.state_dict())] == list(
        hostile.spec.model.state_dict()
    )
    accelerated.load_state_dict(accelerated.state_dict())


@pytest.fixture
def fresh() -> tg.Accelerated:
    """A program over a model of its own, which may be trained."""
    spec = hostile_spec()
    program = tg.capture(spec)
    return tg.apply(tg.analyze(program), sites(projections="own"))


@pytest.mark.slow
def test_training_and_saving(fresh: tg.Accelerated, tmp_path: Path) -> None:
    before = {name: x.clone() for name, x in fresh.state_dict().items()}
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    losses = fresh[READ](**inputs_of(fresh, READ))["loss"] + fresh[DRAW](**inputs_of(fresh, DRAW))
    losses.backward()
    optimizer.step()
    still = {name for name, x in fresh.state_dict().items() if torch.equal(x, before[name])}
    assert still == {"_constants"}

    fresh.save(tmp_path / "out" / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["saved"]
    files = {p.name for p in (tmp_path / "out" / "saved").iterdir()}
    assert {"%2E%2E.pt2", "baseline.%2E%2E.pt2", "%2E%2E%2Fread%2Fa%2Eb.pt2"} < files

    loaded = tg.load_accelerated(tmp_path / "out" / "saved")
    state = loaded.state_dict()
    assert list(state) == list(fresh.state_dict())
    assert all(torch.equal(x, state[name]) for name, x in fresh.state_dict().items())
    for task in (READ, DRAW):
        inputs = inputs_of(loaded, task)
        mine, theirs = loaded[task](**inputs), fresh[task](**inputs_of(fresh, task))
        assert torch.equal(*(x["loss"] if task == READ else x for x in (mine, theirs)))
        assert format_graph(loaded.captured[task]).count("@meta.") == len(PARAMETERS)  # type: ignore[index]
    loaded[READ](**inputs_of(loaded, READ))["loss"].backward()
    named = dict(loaded.named_parameters())
    assert all(p.grad is not None for name, p in named.items() if not name.startswith("tokgraph_own.%2E%2E."))
    assert not loaded.model.eval().training
    assert loaded.model.train().training
    again = tmp_path / "again"
    loaded.save(again)
    assert load_file(again / "weights.safetensors").keys() == state.keys() - {"recompile.weight"}


def test_rows_and_batches_by_any_name(hostile: Captured, tmp_path: Path) -> None:
    accelerated = tg.apply(hostile.facts, sites())
    result, rows = accelerated[READ].with_rows(**inputs_of(hostile, READ))
    assert list(rows) == ["['out/1']"]
    assert result["out/1"].shape[1] == rows["['out/1']"].shape[1]
    batch = {key: x for key, x in inputs_of(hostile, READ).items() if isinstance(x, Tensor)}
    tg.save_batches(tmp_path / "batches.safetensors", {READ: [batch, batch]})
    found = tg.load_batches(tmp_path / "batches.safetensors", hostile.spec)
    assert found.keys() == {READ}
    assert [set(b) for b in found[READ]] == [{IDS, LABELS}] * 2
    assert other_sizes(hostile.program[READ], batch)[1] == {"lambda": 3}  # type: ignore[index]
    measured = tg.measure(hostile.facts, {READ: [batch]})
    assert READ in json.dumps(tg.summarise(hostile.facts, measured))
    assert hostile.facts[READ].cost.at(**{"lambda": 7}).total().flops > hostile.facts[READ].cost.at().total().flops


@pytest.mark.slow
def test_onnx_graphs_have_the_users_names(hostile: Captured, tmp_path: Path) -> None:
    accelerated = tg.apply(hostile.facts, sites())
    found = accelerated.export_onnx(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    files = found["files"]
    assert set(files) == {
        f"{task}.{kind}.onnx" for task in ("%2E%2E%2Fread%2Fa%2Eb", "%2E%2E") for kind in found["kinds"]
    }
    forward, step = (files[f"%2E%2E%2Fread%2Fa%2Eb.{kind}.onnx"] for kind in ("forward", "train-step"))
    assert forward["inputs"] == [IDS, LABELS]
    assert forward["outputs"] == ["loss", "out/1", "rows/out/1"]
    own = {f"grad/{name}" for name, _ in hostile.spec.model.named_parameters()}
    assert set(step["outputs"]) == {"loss", *own}
    assert [check["sizes"] for check in step["checks"]] == [{"lambda": 2}, {"lambda": 3}]
    assert files["%2E%2E.forward.onnx"]["inputs"] == ["lambda", "model", "a b", "%2F.0", "%2F.1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training", "'training' names an input and a weight"),
        ("out", "'out' names an input and an output"),
        ("param/x", "an input called 'param/x' cannot be told from inputs that tokgraph adds"),
    ],
)
def test_onnx_tells_tensors_apart_by_name(tmp_path: Path, name: str, message: str) -> None:
    spec = hostile_spec()

    def named(hostile: Hostile, /, **inputs: Tensor) -> dict[str, Tensor]:
        result = read(hostile, **{IDS: inputs[name], LABELS: inputs[LABELS]})
        return {"loss": result["loss"], "out": result["out/1"]}

    old = spec.tasks[READ]
    task = tg.Task(
        named,
        {name: old.inputs[IDS], LABELS: old.inputs[LABELS]},
        visual_inputs=(name,),
        visual=tg.VisualTokens.ids(input=name, low=0, high=IMAGE - 1),
    )
    program = tg.capture(tg.ModelSpec(spec.model, {"t": task}))
    accelerated = tg.apply(tg.analyze(program), tg.Plan())
    with pytest.raises(tg.ExportError, match=message):
        accelerated.export_onnx(tmp_path / "out", "forward")
    assert not (tmp_path / "out").exists()

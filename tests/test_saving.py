"""Programs saved and loaded: the same values, gradients, parameters and training; and files that are refused."""

from __future__ import annotations

import copy
import json
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, captured_tiny, gradients
from tokgraph.passes.lower import find_places
from tokgraph.saving import MANIFEST
from tokgraph.weights import write_weights

U, G = "understanding", "generation"
TASKS = (U, G)
THINNED = tg.Plan((tg.DropSite(U, 1, 2, 0.5), tg.DropSite(G, 1, 2, 0.5)), exact=True, policy="by hand")


# What models have: tied and frozen weights, buffers, inputs that are no tensors, results in results.


class Rich(tiny.Unified):
    def __init__(self) -> None:
        super().__init__(layers=2)
        self.head.weight = self.embed.weight
        self.layers[0].mlp[0].weight.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("hidden_scale", torch.tensor(0.5), persistent=False)


def read(model: Rich, ids: Tensor, pictures: Mapping[str, Tensor], labels: Tensor, factor: float, names: Any) -> Any:
    loss, logits = tiny.understand(model, ids, pictures["patches"], labels)
    loss = loss * factor * model.scale * model.hidden_scale
    return {"loss": loss, "logits": logits, "more": (logits.amax(-1), [logits.argmax(-1), names["a"], None])}


def draw(model: Rich, ids: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return tiny.generate(model, ids, codes)


def rich_spec(dtype: str = "float64") -> tg.ModelSpec:
    base = tiny.build(layers=1, dtype=dtype).tasks
    torch.manual_seed(1)
    model = Rich().to(getattr(torch, dtype))
    given = base[U].inputs
    inputs = {
        "ids": given["ids"],
        "pictures": {"patches": given["patches"]},
        "labels": given["labels"],
        "factor": 0.25,
        "names": {"a": "cat"},
    }
    return tg.ModelSpec(
        model,
        {
            U: tg.Task(read, inputs, visual=base[U].visual, reads="text", outputs="full"),
            G: tg.Task(draw, base[G].inputs, base[G].dynamic, visual_inputs=("codes",), reads="visual"),
        },
    )


class Saved:
    """A program, the folder it was saved in, and the program that was loaded from there."""

    def __init__(self, accelerated: tg.Accelerated, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.before = accelerated
        accelerated.save(folder, **options)
        self.after = tg.load_accelerated(folder)

    def inputs(self, task: str) -> dict[str, Any]:
        return dict(self.before.program[task].task.inputs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Two blocks, both tasks thinned in the second: leave its weights as they are."""
    return Saved(captured_tiny(2).apply(THINNED), tmp_path_factory.mktemp("saved") / "program")


@pytest.fixture(scope="module")
def rich() -> Captured:
    return Captured.of(rich_spec())


@pytest.fixture(scope="module")
def rich_saved(rich: Captured, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Own projections in a site of generation: leave its weights as they are."""
    site = tg.DropSite(G, 1, 2, 0.5, projections="own")
    return Saved(rich.apply(tg.Plan((site,), exact=True)), tmp_path_factory.mktemp("rich") / "program")


def loss_of(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, Mapping) else result[0]


def same(actual: Any, expected: Any) -> None:
    """Equal but for the last bit (a trace may lay a tensor out otherwise), in the same structure."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        close = {torch.float64: 1e-13, torch.float32: 1e-6}.get(expected.dtype, 0.0)
        torch.testing.assert_close(actual, expected, rtol=close, atol=close)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected)
        for key in expected:
            same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            same(a, e)
    else:
        assert actual == expected


# The round trip.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", ["accelerated", "captured"])
@pytest.mark.parametrize("which", ["saved", "rich_saved"])
def test_outputs_and_gradients(request: pytest.FixtureRequest, which: str, variant: str, task: str) -> None:
    it: Saved = request.getfixturevalue(which)
    inputs, found = it.inputs(task), []
    for program in (it.before, it.after):
        graph = (program.program if variant == "accelerated" else program.captured)[task]
        result = graph.unflatten(graph.graph_module(*graph.flatten(inputs)))
        holder = nn.ParameterDict({name.replace(".", "/"): p for name, p in program.named_parameters()})
        trained = [p for p in holder.values() if p.requires_grad]
        grads = torch.autograd.grad(loss_of(result), trained, allow_unused=True)
        found.append((result, [g for g in grads if g is not None]))
    (right, right_grads), (actual, actual_grads) = found
    same(actual, right)
    assert len(actual_grads) == len(right_grads) > 10
    for mine, theirs in zip(actual_grads, right_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_batches_of_other_sizes(saved: Saved) -> None:
    ids = torch.randint(10, tiny.VOCABULARY, (5, 3))
    inputs = {"ids": ids, "codes": torch.randint(0, tiny.CODES, (5, tiny.IMAGE))}
    same(saved.after[G](**inputs), saved.before[G](**inputs))


def test_results_keep_their_structure(rich_saved: Saved) -> None:
    result = rich_saved.after[U](**rich_saved.inputs(U))
    assert list(result) == ["loss", "logits", "more"]
    assert isinstance(result["more"], tuple)
    assert result["more"][1][1:] == ["cat", None]


@pytest.mark.parametrize("which", ["saved", "rich_saved"])
def test_state_and_parameters(request: pytest.FixtureRequest, which: str) -> None:
    """The same keys and values in the same order, so that checkpoints and optimizers fit."""
    it: Saved = request.getfixturevalue(which)
    same(dict(it.after.state_dict()), dict(it.before.state_dict()))
    before, after = list(it.before.named_parameters()), list(it.after.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    for (_, mine), (_, theirs) in zip(after, before, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad
        assert mine is not theirs
    assert it.after.load_state_dict(it.before.state_dict()) is not None


def test_the_mode(saved: Saved, tmp_path: Path) -> None:
    assert saved.after.model.training
    assert all(module.training for module in saved.after.values())
    spec = tiny.build(layers=1)
    spec.model.eval()
    again = Saved(tg.apply(tg.capture(spec), tg.Plan()), tmp_path / "program", with_baseline=False).after
    assert not again.model.training
    assert not any(again[task].training or again[task].graph_module.training for task in TASKS)


def test_tied_weights_stay_tied(rich_saved: Saved) -> None:
    model = rich_saved.after.model
    assert model.head.weight is model.embed.weight
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert {"head.weight", "embed.weight"} <= names
    assert "head.weight" not in dict(model.named_parameters())
    loss_of(rich_saved.after[U](**rich_saved.inputs(U))).backward()
    assert model.head.weight.grad is not None
    for p in rich_saved.after.parameters():
        p.grad = None


def test_frozen_weights_stay_frozen(rich_saved: Saved) -> None:
    frozen = {name for name, p in rich_saved.after.model.named_parameters() if not p.requires_grad}
    assert frozen == {"layers.0.mlp.0.weight"}


@pytest.mark.parametrize("which", ["saved", "rich_saved"])
def test_tasks_share_their_parameters(request: pytest.FixtureRequest, which: str) -> None:
    """The very objects, in the model and in each graph of every task, accelerated and captured."""
    it: Saved = request.getfixturevalue(which)
    own = {id(p) for p in it.after.parameters()}
    seen: dict[str, set[int]] = {}
    for program in (it.after.program, it.after.captured):
        for graph in program.values():
            for name, p in graph.graph_module.named_parameters():
                assert id(p) in own, name
                seen.setdefault(name, set()).add(id(p))
    assert len(seen) > 10
    assert all(len(objects) == 1 for objects in seen.values())
    shared = it.after.model.get_parameter("layers.1.attention.qkv.weight")
    assert all(
        shared is graph.graph_module.get_parameter("layers.1.attention.qkv.weight")
        for graph in it.after.captured.values()
    )


def test_rows_of_compact_outputs(saved: Saved) -> None:
    for task in TASKS:
        (result, rows), (right, right_rows) = (
            p[task].with_rows(**saved.inputs(task)) for p in (saved.after, saved.before)
        )
        same(result, right)
        assert list(rows) == list(right_rows)
        same(rows, right_rows)
    assert rows or saved.after[U].with_rows(**saved.inputs(U))[1]


def test_plan_report_and_spec(saved: Saved) -> None:
    after = saved.after
    assert after.plan == saved.before.plan
    assert after.facts is None
    for task in TASKS:
        mine, theirs = after.program.spec.tasks[task], saved.before.program.spec.tasks[task]
        for field in ("dynamic", "visual", "visual_inputs", "reads", "outputs"):
            assert getattr(mine, field) == getattr(theirs, field)
        same(dict(mine.inputs), dict(theirs.inputs))
        assert [(d.input, d.dim, d.name, d.size) for d in after.program[task].dimensions] == [
            (d.input, d.dim, d.name, d.size) for d in saved.before.program[task].dimensions
        ]
        assert set(after.program[task].symbol_names().values()) == set(
            saved.before.program[task].symbol_names().values()
        )
        with pytest.raises(tg.SpecError, match="holds no code of the model"):
            mine.forward(after.model, **mine.inputs)
        with pytest.raises(tg.BatchError):
            after[task]()


def test_inputs_that_are_no_tensors(rich_saved: Saved) -> None:
    inputs = rich_saved.after.program.spec.tasks[U].inputs
    assert list(inputs) == ["ids", "pictures", "labels", "factor", "names"]
    assert inputs["factor"] == 0.25
    assert inputs["names"] == {"a": "cat"}
    same(inputs["pictures"], rich_saved.inputs(U)["pictures"])


def with_input(extra: Any) -> tg.Program:
    """One task with one more input."""

    def forward(model: nn.Module, ids: Tensor, codes: Tensor, extra: Any) -> tuple[Tensor, Tensor]:
        return tiny.generate(model, ids, codes)

    spec = tiny.build(layers=1)
    old = spec.tasks[G]
    visual = tg.VisualTokens.positions(slice(tiny.TEXT, None))
    task = tg.Task(forward, {**old.inputs, "extra": extra}, visual=visual, reads="visual")
    return tg.capture(tg.ModelSpec(spec.model, {G: task}))


@pytest.mark.parametrize(
    "extra",
    [(2, 3), {1: "a"}, {"x": torch.arange(3), "y": 2.5, "z": [None, "word"]}],
    ids=["a tuple", "numbers as keys", "tensors and numbers in one"],
)
def test_odd_inputs_come_back_or_are_refused(tmp_path: Path, extra: Any) -> None:
    """Never as something else: a batch that fitted before must fit after."""
    program = with_input(extra)
    accelerated = tg.apply(program, tg.Plan())
    try:
        accelerated.save(tmp_path / "program", with_baseline=False)
    except tg.FileError:
        return
    loaded = tg.load_accelerated(tmp_path / "program")
    same(dict(loaded.program.spec.tasks[G].inputs), dict(program.spec.tasks[G].inputs))
    inputs = dict(program.spec.tasks[G].inputs)
    same(loaded[G](**inputs), accelerated[G](**inputs))


def test_an_input_that_json_cannot_hold(tmp_path: Path) -> None:
    accelerated = tg.apply(with_input({(1, 2): 0.5}), tg.Plan())
    with pytest.raises(tg.FileError, match="cannot be written as JSON"):
        accelerated.save(tmp_path / "program", with_baseline=False)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_is_a_size(tmp_path: Path) -> None:
    """A number that follows the batch: it comes back as it was, or saving is refused by a message."""
    spec = tiny.build(layers=1)
    old = spec.tasks[G]

    def sized(model: nn.Module, ids: Tensor, codes: Tensor) -> tuple[Tensor, int]:
        return tiny.generate(model, ids, codes)[0], ids.shape[1]

    task = tg.Task(sized, old.inputs, old.dynamic, visual_inputs=("codes",), reads="visual")
    accelerated = tg.apply(tg.capture(tg.ModelSpec(spec.model, {G: task})), tg.Plan())
    try:
        accelerated.save(tmp_path / "program", with_baseline=False)
    except tg.TokgraphError:
        return
    inputs = {"ids": torch.randint(10, 20, (2, 7)), "codes": old.inputs["codes"]}
    assert tg.load_accelerated(tmp_path / "program")[G](**inputs)[1] == 7


def test_without_its_baseline(saved: Saved, tmp_path: Path) -> None:
    again = Saved(saved.before, tmp_path / "program", with_baseline=False).after
    assert not list((tmp_path / "program").glob("baseline*"))
    assert again.captured is None
    same(again[G](**saved.inputs(G)), saved.before[G](**saved.inputs(G)))
    with pytest.raises(tg.FileError, match="without its baseline"):
        again.save(tmp_path / "other")
    again.save(tmp_path / "other", with_baseline=False)


def test_a_loaded_program_is_saved_again(saved: Saved, tmp_path: Path) -> None:
    """A second generation is as good as the first, places included."""
    second = Saved(saved.after, tmp_path / "again").after
    for task in TASKS:
        same(second[task](**saved.inputs(task)), saved.before[task](**saved.inputs(task)))
        first, again = (
            Counter((p.module, p.block, p.kind) for p in find_places(program.program[task], None).values())
            for program in (saved.after, second)
        )
        assert first == again
        assert len(first) > 10
    assert (tmp_path / "again/weights.safetensors").read_bytes() == (saved.folder / "weights.safetensors").read_bytes()


def test_nodes_of_a_loaded_graph_know_their_places(saved: Saved) -> None:
    for task in TASKS:
        fresh = find_places(saved.before.program[task], saved.before.facts[task])
        graph = saved.after.program[task]
        loaded = find_places(graph, None)
        calls = [n for n in graph.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)]
        assert len(calls) > 40
        for node in calls:
            origin = fresh[node.meta["custom"]["tokgraph"]["node"]]
            place = loaded[node.name]
            assert (place.module, place.block, place.kind) == (origin.module, origin.block, origin.kind)


# Training.


def train(program: tg.Accelerated, batches: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for inputs in batches:
        optimizer.zero_grad()
        total = sum(loss_of(program[task](**inputs[task])) for task in TASKS)
        total.backward()  # type: ignore[union-attr]
        optimizer.step()
        losses.append(total.item())  # type: ignore[union-attr]
    return losses


def test_training_goes_on_as_if_nothing_happened(rich: Captured, tmp_path: Path, keeping_weights: Any) -> None:
    """Two steps, saved, two more: the optimizer's state fits parameters that a plan added and frozen ones as well."""
    keeping_weights(rich.model)
    site = tg.DropSite(G, 1, 2, 0.5, projections="own")
    program = rich.apply(tg.Plan((site,)))
    batches = [{task: dict(rich.spec.tasks[task].inputs) for task in TASKS}] * 2
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.01)
    first = train(program, batches, optimizer)
    loaded = Saved(program, tmp_path / "program", with_baseline=False).after
    again = torch.optim.AdamW(loaded.parameters(), lr=0.5)
    again.load_state_dict(json_like(optimizer.state_dict()))
    right, actual = train(program, batches, optimizer), train(loaded, batches, again)
    assert right[-1] < first[0]
    assert actual == pytest.approx(right, rel=1e-10)
    for (name, mine), (_, theirs) in zip(loaded.named_parameters(), program.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=name)


def json_like(state: Any) -> Any:
    """A copy that shares no tensor."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: json_like(x) for key, x in state.items()}
    return [json_like(x) for x in state] if isinstance(state, list) else state


def test_a_checkpoint_of_the_model_loads(rich: Captured, rich_saved: Saved) -> None:
    """One that knows nothing of the plan; own projections then start as copies."""
    loaded = tg.load_accelerated(rich_saved.folder)
    other = Rich().double().state_dict()
    loaded.load_state_dict(other)
    for name, x in loaded.model.state_dict().items():
        assert torch.equal(x, other[name]), name
    (name, copied), *_ = loaded.own_parameters.items()
    assert torch.equal(copied, other[name.split(".", 2)[2]])


@pytest.mark.parametrize("policy", ["shared", "himix-hmgen-share-partial"])
def test_a_plan_is_applied_to_a_loaded_baseline(policy: str, tmp_path: Path) -> None:
    """Loaded graphs have another order of nodes: what chooses rows may stand after what is to read them."""
    captured = tg.capture(tiny.build(layers=4))
    program = tg.apply(captured, tg.make_plan(captured, policy))
    program.save(tmp_path / "program")
    baseline = tg.load_accelerated(tmp_path / "program").captured
    assert baseline is not None
    again = tg.apply(baseline, program.plan)
    assert tg.verify(baseline, again).passed
    for task, spec in captured.spec.tasks.items():
        same(again[task](**spec.inputs)[0], program[task](**spec.inputs)[0])


def test_own_projections_come_back(rich: Captured, tmp_path: Path) -> None:
    """They are parameters of their own, with values of their own, and receive gradients."""
    program = rich.apply(tg.Plan((tg.DropSite(G, 1, 2, 0.5, projections="own"),)))
    with torch.no_grad():
        for p in program.own_parameters.values():
            p.mul_(1.25)
    loaded = Saved(program, tmp_path / "program").after
    assert loaded.own_parameters.keys() == program.own_parameters.keys() != set()
    same(
        {n: p.detach() for n, p in loaded.own_parameters.items()},
        {n: p.detach() for n, p in program.own_parameters.items()},
    )
    assert not {*loaded.own_parameters} & {*dict(loaded.model.named_parameters())}
    inputs = dict(rich.spec.tasks[G].inputs)
    loss = loaded[G](**inputs)[0]
    assert all(g.any() for g in torch.autograd.grad(loss, list(loaded.own_parameters.values())))
    same(loss, program[G](**inputs)[0])


@pytest.mark.slow
def test_the_papers_policy(tmp_path: Path) -> None:
    four = captured_tiny(4)
    plan = tg.make_plan(four.program, "himix-hmgen-share-partial", facts=four.facts)
    it = Saved(four.apply(plan), tmp_path / "program")
    assert it.after.plan == plan
    assert it.after.own_parameters.keys() == it.before.own_parameters.keys() != set()
    for task in TASKS:
        same(it.after[task](**it.inputs(task)), it.before[task](**it.inputs(task)))
    for p in it.after.own_parameters.values():
        assert p.requires_grad


def test_a_random_plan_draws_the_same(tmp_path: Path) -> None:
    """From the step at which it was saved; steps of a loaded program count on."""
    program = captured_tiny(2).apply(tg.Plan((tg.DropSite(U, 0, 1, 0.5, "random", seed=3),)))
    inputs = dict(captured_tiny(2).spec.tasks[U].inputs)
    for _ in range(3):
        program[U](**inputs)
    loaded = Saved(program, tmp_path / "program", with_baseline=False).after
    assert loaded[U].step == program[U].step == 3
    right, actual = [], []
    for losses, which in ((right, program), (actual, loaded)):
        losses += [which[U](**inputs)[0].item() for _ in range(5)]
    assert actual == right
    assert len(set(right)) > 2
    assert loaded[U].step == 8
    assert "tokgraph_step" not in loaded.state_dict()
    assert tg.load_accelerated(tmp_path / "program")[U].step == 3


# The rest of the toolchain on a loaded program.


def test_a_loaded_program_is_analysed_and_verified(saved: Saved) -> None:
    facts = tg.analyze(saved.after.captured)
    for task in TASKS:
        right = saved.before.facts[task]
        assert len(facts[task].blocks) == len(right.blocks) == 2
        assert [b.module for b in facts[task].blocks] == [b.module for b in right.blocks]
        assert facts[task].visual.count == right.visual.count
        assert facts[task].demand.reads == right.demand.reads
    result = tg.verify(saved.after.captured, saved.after)
    result.raise_if_failed()
    assert result.passed


@pytest.mark.slow
def test_verification_of_a_loaded_program_can_fail(saved: Saved) -> None:
    """Another plan than the one that was applied is found out."""
    loaded = tg.load_accelerated(saved.folder)
    loaded.plan = tg.Plan((tg.DropSite(U, 0, 1, 0.5),), exact=True)
    assert not tg.verify(loaded.captured, loaded).passed


def test_a_loaded_baseline_takes_another_plan(saved: Saved) -> None:
    """What was captured once can be thinned again, without the model's code."""
    plan = tg.Plan((tg.DropSite(U, 0, 1, 0.5, mode="freeze"),), exact=True)
    actual = tg.apply(saved.after.captured, plan)
    right = captured_tiny(2).apply(plan)
    for task in TASKS:
        for mine, theirs in zip(actual[task](**saved.inputs(task)), right[task](**saved.inputs(task)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


# Files.


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


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 2}', '{"schema": "1"}', "3", '"x"'])
def test_a_manifest_of_another_schema(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    assert "is not of schema 1" in refused(tmp_path).message


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


@pytest.mark.parametrize("which", ["saved", "rich_saved"])
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


# Saving whole or not at all.


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_writes_nothing(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """What was in the folder stays, byte for byte, files of an export among it."""
    folder = tmp_path / "program"
    if there:
        shutil.copytree(saved.folder, folder)
        (folder / "understanding.onnx").write_bytes(b"an export")
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if there else {}
    written = []

    def fail(program: Any, path: Path) -> None:
        written.append(path)
        Path(path).write_bytes(b"half")
        if len(written) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        saved.before.save(folder)
    assert len(written) == 2
    assert folder.exists() == there
    assert [path.name for path in tmp_path.iterdir()] == ([folder.name] if there else [])
    if there:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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
    program = tg.Accelerated(tg.Program(meta, two.program), None, tg.Plan(), two.facts)
    with pytest.raises(tg.FileError, match="meta device"):
        program.save(tmp_path / "program", with_baseline=False)
    assert list(tmp_path.iterdir()) == []


# Without the model's code.

LOAD = """
import sys
for name in ("transformers", "tests"):
    sys.modules[name] = None
import torch
import tokgraph as tg
torch.set_num_threads(1)
program = tg.load_accelerated(sys.argv[1])
found = {}
for task in program:
    result = program[task](**program.program.spec.tasks[task].inputs)
    loss = result["loss"] if isinstance(result, dict) else result[0]
    named = [(name, p) for name, p in program.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    found[task] = (loss.detach(), {name: g for (name, _), g in zip(named, grads) if g is not None})
assert "transformers" not in {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
torch.save(found, sys.argv[2])
"""


def load_elsewhere(folder: Path, out: Path) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Load and differentiate in a process that cannot import the model's code."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(out)], capture_output=True, text=True, cwd=out.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[Tensor, dict[str, Tensor]]] = torch.load(out)
    return found


def check_elsewhere(program: tg.Accelerated, folder: Path, out: Path, model: nn.Module) -> None:
    program.save(folder)
    found = load_elsewhere(folder, out)
    for task, (loss, grads) in found.items():
        right = loss_of(program[task](**dict(program.program[task].task.inputs)))
        torch.testing.assert_close(loss, right.detach(), rtol=1e-12, atol=0)
        expected = gradients(model, right)
        assert len(grads) > 20
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_janus_without_transformers(janus_example: Captured, tmp_path: Path) -> None:
    plan = tg.make_plan(janus_example.program, "shared", facts=janus_example.facts, span=(1, 3), keep=0.5)
    check_elsewhere(janus_example.apply(plan), tmp_path / "program", tmp_path / "found.pt", janus_example.model)


@pytest.mark.slow
def test_digits_without_the_example(digits_example: Captured, tmp_path: Path) -> None:
    plan = tg.make_plan(digits_example.program, "shared", facts=digits_example.facts, span=(1, 3), keep=0.5)
    check_elsewhere(digits_example.apply(plan), tmp_path / "program", tmp_path / "found.pt", digits_example.model)

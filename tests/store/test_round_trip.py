"""Programs saved and loaded: the same values, gradients, parameters, inputs and results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests import tiny
from tests.store.programs import TASKS, G, Saved, U, loss_of, same
from tokgraph.passes.lower import places_of

pytestmark = pytest.mark.xdist_group("store")  # one process saves the programs


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", ["accelerated", pytest.param("captured", marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", [pytest.param("saved", marks=pytest.mark.slow), "rich_saved"])
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


@pytest.mark.slow
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
            for name, p in graph.named_parameters().items():
                assert id(p) in own, name
                seen.setdefault(name, set()).add(id(p))
    assert len(seen) > 10
    assert all(len(objects) == 1 for objects in seen.values())
    shared = it.after.model.get_parameter("layers.1.attention.qkv.weight")
    assert all(
        shared is graph.named_parameters()["layers.1.attention.qkv.weight"] for graph in it.after.captured.values()
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
    assert len(after.facts[G].blocks) == len(saved.before.facts[G].blocks), "facts of the loaded baseline"
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
    spec = tiny.build(layers=1, dynamic=True)
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


@pytest.mark.slow
def test_without_its_baseline(saved: Saved, tmp_path: Path) -> None:
    again = Saved(saved.before, tmp_path / "program", with_baseline=False).after
    assert not list((tmp_path / "program").glob("baseline*"))
    assert again.captured is None
    same(again[G](**saved.inputs(G)), saved.before[G](**saved.inputs(G)))
    with pytest.raises(tg.FileError, match="without its baseline"):
        again.save(tmp_path / "other")
    again.save(tmp_path / "other", with_baseline=False)


@pytest.mark.slow
def test_a_loaded_program_is_saved_again(saved: Saved, tmp_path: Path) -> None:
    """A second generation is as good as the first, places included."""
    second = Saved(saved.after, tmp_path / "again").after
    for task in TASKS:
        same(second[task](**saved.inputs(task)), saved.before[task](**saved.inputs(task)))
        first, again = (
            Counter((p.module, p.block, p.kind) for p in places_of(program.program[task]).values())
            for program in (saved.after, second)
        )
        assert first == again
        assert len(first) > 10
    assert (tmp_path / "again/weights.safetensors").read_bytes() == (saved.folder / "weights.safetensors").read_bytes()


def test_nodes_of_a_loaded_graph_know_their_places(saved: Saved) -> None:
    for task in TASKS:
        fresh = places_of(saved.before.program[task])
        graph = saved.after.program[task]
        loaded = places_of(graph)
        calls = [n for n in graph.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)]
        assert len(calls) > 40
        for node in calls:
            origin = fresh[node.meta["custom"]["tokgraph"]["node"]]
            place = loaded[node.name]
            assert (place.module, place.block, place.kind) == (origin.module, origin.block, origin.kind)

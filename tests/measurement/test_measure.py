"""Measuring on calibration batches, and the files that hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokgraph as tg
from examples import digits
from tests import tiny
from tests.harness import Captured
from tokgraph.ir.facts import Facts
from tokgraph.measurement.measurements import TaskMeasures, image_mass, measure
from tokgraph.store.batches import load_batches, save_batches

pytestmark = pytest.mark.xdist_group("janus")  # one process captures the examples


def batch(first: int, last: int) -> dict[str, dict[str, Any]]:
    """One batch a task, of some of the digits."""
    images, numbers = (part[first:last] for part in digits.load())
    images = images.double()
    return {
        "understanding": digits.understanding_batch(images, numbers),
        "generation": digits.generation_batch(digits.quantise(images.float()), numbers),
    }


SPLIT = ((10, 12), (20, 25))  # two samples, and five


@pytest.fixture(scope="module")
def measured(dynamic_digits: Captured) -> dict[str, tg.Measurements]:
    """Measures of two batches of different sizes, of each alone, and of understanding alone."""

    def on(*given: dict[str, Any], tasks: tuple[str, ...] = ("understanding", "generation")) -> tg.Measurements:
        batches = {task: [b[task] for b in given] for task in tasks}
        return measure(dynamic_digits.facts, batches)

    one, two = (batch(*rows) for rows in SPLIT)
    return {"both": on(one, two), "one": on(one), "two": on(two), "understanding": on(one, tasks=("understanding",))}


@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_batches_of_other_sizes_are_averaged_by_row(measured: dict[str, tg.Measurements], task: str) -> None:
    both, one, two = (measured[name].tasks[task] for name in ("both", "one", "two"))
    for of_both, of_one, of_two in zip(
        (*both.redundancy.cosine, *both.redundancy.effective_rank),
        (*one.redundancy.cosine, *one.redundancy.effective_rank),
        (*two.redundancy.cosine, *two.redundancy.effective_rank),
        strict=True,
    ):
        assert of_both == pytest.approx((2 * of_one + 5 * of_two) / 7)
    torch.testing.assert_close(both.allocation.mass, (2 * one.allocation.mass + 5 * two.allocation.mass) / 7)
    assert both.allocation.rows == tuple(a + b for a, b in zip(one.allocation.rows, two.allocation.rows, strict=True))
    assert one.redundancy.cosine != two.redundancy.cosine


def test_every_task_and_block_is_measured(dynamic_digits: Captured, measured: dict[str, tg.Measurements]) -> None:
    found = measured["both"]
    for name, task in found.tasks.items():
        assert len(task.redundancy.cosine) == len(dynamic_digits.facts[name].blocks) == 4
        assert task.allocation.mass.shape[:2] == (4, 4)
        torch.testing.assert_close(task.allocation.mass.sum(-1), torch.ones(task.allocation.mass.shape[:3]).double())
        assert task.gradients["blocks.0.attention.qkv.weight"].visual > 0
    assert [c.block for c in found.cosines] == [0, 1, 2, 3]
    assert all(-1 <= x <= 1 for c in found.cosines for x in (c.whole, c.visual, c.text))


def test_a_task_without_batches_is_measured_on_its_example(
    dynamic_digits: Captured, measured: dict[str, tg.Measurements]
) -> None:
    example = measure(dynamic_digits.facts)
    found = measured["understanding"]

    def numbers(task: TaskMeasures) -> tuple[float, ...]:
        return (*task.redundancy.cosine, *task.allocation.mass.flatten().tolist())

    assert numbers(found.tasks["generation"]) == pytest.approx(numbers(example.tasks["generation"]))
    assert numbers(found.tasks["understanding"]) == pytest.approx(numbers(measured["one"].tasks["understanding"]))
    assert numbers(found.tasks["understanding"]) != pytest.approx(numbers(example.tasks["understanding"]))


def test_attention_to_the_image_is_that_of_the_queries_that_matter(
    dynamic_digits: Captured, measured: dict[str, tg.Measurements]
) -> None:
    found = {a.task: a for a in tg.image_attention(measured["both"], dynamic_digits.facts)}
    assert {name: a.query for name, a in found.items()} == {"understanding": "output", "generation": "image"}
    for name, attention in found.items():
        allocation = measured["both"].tasks[name].allocation
        row, column = allocation.queries.index(attention.query), allocation.keys.index("image")
        by_block = allocation.mass[:, :, row, column].mean(1)
        assert attention.mass == pytest.approx(by_block.tolist())
        assert attention.early == pytest.approx(float(by_block[:2].mean()))
        assert attention.late == pytest.approx(float(by_block[2:].mean()))
    assert image_mass(measured["both"], dynamic_digits.facts) == {name: a.mass for name, a in found.items()}


def test_attention_to_an_image_that_is_no_segment(
    dynamic_digits: Captured, measured: dict[str, tg.Measurements]
) -> None:
    both = measured["both"]
    task = both.tasks["understanding"]
    other = replace(task.allocation, keys=tuple(k.replace("image", "picture") for k in task.allocation.keys))
    tasks = {**both.tasks, "understanding": replace(task, allocation=other)}
    found = replace(both, tasks=tasks)
    assert [a.task for a in tg.image_attention(found, dynamic_digits.facts)] == ["generation"]
    with pytest.raises(tg.AnalysisError, match="task 'understanding': no segment is named 'image'"):
        image_mass(found, dynamic_digits.facts)


def test_measuring_leaves_the_model_as_it_was(dynamic_digits: Captured) -> None:
    before = {name: x.clone() for name, x in dynamic_digits.model.state_dict().items()}
    state = torch.get_rng_state()
    measure(dynamic_digits.facts)
    assert all(torch.equal(x, before[name]) for name, x in dynamic_digits.model.state_dict().items())
    assert all(p.grad is None for p in dynamic_digits.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_of_a_size_that_is_fixed_is_refused(dynamic_digits: Captured) -> None:
    wrong = batch(0, 3)["understanding"]
    wrong["pixel_values"] = wrong["pixel_values"][:, :6]
    with pytest.raises(tg.BatchError, match="pixel_values"):
        measure(dynamic_digits.facts, {"understanding": [wrong]})


def test_batches_of_an_unknown_task_are_refused(dynamic_digits: Captured) -> None:
    with pytest.raises(tg.BatchError, match="batches are for a task 'video'"):
        measure(dynamic_digits.facts, {"video": []})


def test_a_model_without_storage_is_refused() -> None:
    spec = tiny.build()
    empty = tg.Program(tg.ModelSpec(spec.model.to("meta"), spec.tasks), {})
    with pytest.raises(tg.AnalysisError, match="on the meta device, so there is nothing to measure"):
        measure(Facts({}, empty))


# ------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def spec() -> tg.ModelSpec:
    return tiny.build()


def tiny_batches(spec: tg.ModelSpec, count: int = 12) -> dict[str, list[dict[str, torch.Tensor]]]:
    """More than ten, so that their numbers sort otherwise as text."""
    inputs = spec.tasks["understanding"].inputs
    understanding = [{**inputs, "ids": inputs["ids"] + number} for number in range(count)]
    return {"understanding": understanding, "generation": [dict(spec.tasks["generation"].inputs)]}


def test_batches_come_back_as_they_were_saved(tmp_path: Path, spec: tg.ModelSpec) -> None:
    batches = tiny_batches(spec)
    save_batches(tmp_path / "batches.safetensors", batches)
    found = load_batches(tmp_path / "batches.safetensors", spec)
    assert set(found) == set(batches)
    for task, of_task in batches.items():
        assert len(found[task]) == len(of_task)
        for mine, theirs in zip(found[task], of_task, strict=True):
            assert set(mine) == set(theirs)
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_tensors_may_be_views_of_one_another(tmp_path: Path, spec: tg.ModelSpec) -> None:
    ids = spec.tasks["generation"].inputs["ids"]
    codes = torch.arange(6).expand(2, -1)  # repeated, not contiguous
    saved = {"ids": ids, "codes": codes}
    save_batches(tmp_path / "b.safetensors", {"generation": [saved, {"ids": ids, "codes": ids[:, :1].expand(-1, 6)}]})
    first, second = load_batches(tmp_path / "b.safetensors", spec)["generation"]
    assert torch.equal(first["codes"], codes)
    assert torch.equal(second["ids"], ids)


def test_inputs_that_are_no_tensors_are_those_of_the_example(tmp_path: Path) -> None:
    def scaled(model: tiny.Unified, ids: torch.Tensor, codes: torch.Tensor, factor: float) -> torch.Tensor:
        return factor * tiny.generate(model, ids, codes)[0]

    base = tiny.build()
    inputs = {**base.tasks["generation"].inputs, "factor": 0.5}
    spec = tg.ModelSpec(base.model, {"generation": tg.Task(scaled, inputs, visual_inputs=("codes",))})
    save_batches(tmp_path / "b.safetensors", {"generation": [inputs]})
    assert load_batches(tmp_path / "b.safetensors", spec)["generation"][0]["factor"] == 0.5


def ids() -> torch.Tensor:
    return torch.zeros(2, 5, dtype=torch.long)


REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no number": ({"generation/ids": ids()}, "tensor 'generation/ids' is not named TASK/NUMBER/INPUT"),
    "number is a word": ({"generation/one/ids": ids()}, "is not named TASK/NUMBER/INPUT"),
    "too many parts": ({"generation/0/ids/more": ids()}, "is not named TASK/NUMBER/INPUT"),
    "unknown task": ({"video/0/ids": ids()}, "batches are for a task 'video', which the model does not have"),
    "input missing": ({"generation/0/ids": ids()}, "a batch of task 'generation' lacks or adds the inputs codes"),
    "input too many": (
        {"generation/0/ids": ids(), "generation/0/codes": ids(), "generation/0/mask": ids()},
        "a batch of task 'generation' lacks or adds the inputs mask",
    ),
    "empty": ({}, "holds no batches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused(tmp_path: Path, spec: tg.ModelSpec, case: str) -> None:
    tensors, message = REFUSED[case]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(tg.BatchError, match=message):
        load_batches(tmp_path / "b.safetensors", spec)


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", None])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, spec: tg.ModelSpec, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "b").write_bytes(content)
    with pytest.raises(tg.BatchError, match="is no safetensors file"):
        load_batches(tmp_path / "b", spec)


def test_names_in_a_file_say_what_they_are(tmp_path: Path, spec: tg.ModelSpec) -> None:
    save_batches(tmp_path / "b.safetensors", {"generation": [dict(spec.tasks["generation"].inputs)]})
    assert sorted(load_file(tmp_path / "b.safetensors")) == ["generation/0/codes", "generation/0/ids"]

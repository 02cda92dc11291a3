"""Names: which ones are refused, and that those written into targets and files are told apart and stay where they are."""

from __future__ import annotations

import keyword

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokgraph as tg
from tokgraph.files import is_plain
from tokgraph.ir.names import batch_key, batch_place, copied_name, file_part, own_name
from tokgraph.ir.tensors import constants_prefix, target_of, tensor_name

ODD = (
    "a/b",
    "..",
    ".",
    "../../x",
    "a\\b",
    "a:b",
    "CON",
    "nul",
    "baseline.x",
    "~",
    "-rf",
    "ü",
    "日本",
    "x" * 300,
    "%2F",
    " ",
)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)


@given(NAMES)
def test_a_target_spells_the_name_out(name: str) -> None:
    holder, leaf = target_of(name).split(".")
    assert tensor_name(f"{holder}.{leaf}") == name
    assert leaf.isidentifier()
    assert leaf.isascii()
    assert not keyword.iskeyword(leaf)
    assert not hasattr(nn.Module(), leaf)


def test_other_targets_are_names() -> None:
    assert tensor_name("layers.0.weight") == "layers.0.weight"


@pytest.mark.parametrize("name", ODD)
def test_parts_of_file_names(name: str) -> None:
    part = file_part(name)
    assert part.isascii()
    assert not set(part) & set("/\\.: ")
    assert len(part) < 150
    assert is_plain(f"baseline.{part}.train-step.onnx")


@given(NAMES, NAMES)
def test_files_of_tasks_are_told_apart(one: str, other: str) -> None:
    assert (file_part(one) == file_part(other)) == (one == other)


def test_plain_names_stay_as_they_are() -> None:
    assert file_part("understanding") == "understanding"
    assert file_part("train-step_2") == "train-step_2"
    assert batch_key("understanding", 0, "input_ids") == "understanding/0/input_ids"
    assert own_name("generation", "layers.0.weight") == "tokgraph_own.generation.layers.0.weight"


@given(NAMES, st.integers(0, 99), NAMES)
def test_batch_keys_are_read_back(task: str, number: int, name: str) -> None:
    assert batch_place(batch_key(task, number, name)) == (task, number, name)


@pytest.mark.parametrize("key", ["a/b", "a/b/c", "a/0/b/c", "a/²/b", "a/-1/b"])
def test_other_keys_are_none_of_batches(key: str) -> None:
    assert batch_place(key) is None


@given(NAMES, NAMES)
def test_copies_know_what_they_are_copies_of(task: str, name: str) -> None:
    assert copied_name(own_name(task, name)) == name


@pytest.mark.parametrize("path", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "x\0"])
def test_paths_are_not_plain(path: str) -> None:
    assert not is_plain(path)


def test_constants_get_out_of_the_way() -> None:
    assert constants_prefix(["layers.0.weight"]) == "_constants"
    assert constants_prefix(["_constants.weight", "_constants_"]) == "_constants__"


def task(**changed: object) -> tg.Task:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    given: dict[str, object] = {"inputs": {"ids": ids}, "visual": tg.VisualTokens.positions(slice(2)), **changed}
    return tg.Task(lambda model, **inputs: model, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a\nb", "a\0", "\x7f", "\ud800", 3, None])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(tg.SpecError, match="a task cannot be called"):
        tg.ModelSpec(nn.Linear(1, 1), {name: task()})
    if name is not None:
        with pytest.raises(tg.SpecError, match="a dimension cannot be called"):
            tg.ModelSpec(nn.Linear(1, 1), {"t": task(dynamic={"ids": {0: name}})})
    if isinstance(name, str):
        with pytest.raises(tg.SpecError, match="an input cannot be called"):
            tg.ModelSpec(nn.Linear(1, 1), {"t": task(inputs={name: 1})})


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_names(name: str) -> None:
    inputs = {name: torch.zeros(1, 4)}
    tg.ModelSpec(nn.Linear(1, 1), {name: task(inputs=inputs, dynamic={name: {0: name}}), "other": task()})


def test_tasks_that_differ_in_case_only() -> None:
    with pytest.raises(tg.SpecError, match=r"tasks 'Read' and 'read' differ in upper and lower case only"):
        tg.ModelSpec(nn.Linear(1, 1), {"Read": task(), "read": task()})


def test_an_input_with_the_name_of_the_models_argument() -> None:
    with pytest.raises(tg.SpecError, match="multiple values for argument 'model'"):
        tg.ModelSpec(nn.Linear(1, 1), {"t": task(inputs={"model": 1})})


@pytest.mark.parametrize("name", ["tokgraph_own", "tokgraph_step", "__metadata__"])
def test_reserved_names_of_tensors(name: str) -> None:
    model = nn.Linear(1, 1)
    model.register_buffer(name, torch.zeros(1))
    with pytest.raises(tg.SpecError, match=f"the model has a tensor called '{name}'"):
        tg.capture(tg.ModelSpec(model, {"t": task()}))


def test_a_module_that_its_class_hides() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].forward = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(tg.CaptureError, match="the submodule 'forward' of 0 is hidden by an attribute of Linear"):
        tg.capture(tg.ModelSpec(model, {"t": task()}))

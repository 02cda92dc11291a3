"""What a user writes: fields that fit each other, files that can be loaded, results that hold a loss."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests import tiny
from tokgraph.errors import LoadError, SpecError
from tokgraph.ir.spec import split_outputs

IDS = torch.zeros(2, 3, dtype=torch.long)
VISUAL = tg.VisualTokens.positions(slice(0, 1))


def loss(model: nn.Module, ids: Tensor, scale: float = 1.0) -> Tensor:
    return ids.sum() * scale


def task(**fields: Any) -> tg.Task:
    return tg.Task(**{"forward": loss, "inputs": {"ids": IDS}, "visual": VISUAL} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reads": "images"}, "reads='images' is not one of 'text', 'visual', 'all'"),
        ({"outputs": "logits"}, "outputs='logits' is not one of 'loss', 'full'"),
        ({"visual": None}, "needs visual= or visual_inputs="),
        ({"forward": 3}, "forward must be callable"),
    ],
)
def test_tasks_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        task(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": {}}, "the example inputs do not fit its forward: missing a required argument: 'ids'"),
        ({"inputs": {"ids": IDS, "other": IDS}}, "unexpected keyword argument 'other'"),
        ({"dynamic": {"labels": {0: "batch"}}}, "dynamic names 'labels', which is not among its inputs"),
        ({"dynamic": {"ids": {2: "batch"}}}, r"dynamic dimension 2 of input 'ids' \(\(2, 3\)\) does not exist"),
        ({"dynamic": {"ids": {-1: "tokens"}}}, "dynamic dimension -1 of input 'ids'"),
        ({"inputs": {"ids": IDS, "scale": 2.0}, "dynamic": {"scale": {0: "n"}}}, r"of input 'scale' \(float\)"),
        ({"visual": tg.VisualTokens.mask(input="mask")}, "visual names 'mask', which is not among its inputs"),
        ({"visual": tg.VisualTokens.ids(input="x", equal=1)}, "visual names 'x'"),
        ({"visual_inputs": ("pixels",)}, "visual_inputs names 'pixels'"),
    ],
)
def test_tasks_that_do_not_fit_their_inputs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        tg.ModelSpec(nn.Linear(1, 1), {"t": task(**fields)})
    assert "task 't'" in str(caught.value)


def test_one_visual_input_need_not_be_a_tuple() -> None:
    assert task(visual=None, visual_inputs="ids").visual_inputs == ("ids",)


def test_a_forward_without_a_signature_is_left_to_export() -> None:
    tg.ModelSpec(nn.Linear(1, 1), {"t": task(forward=dict)})


@pytest.mark.parametrize(
    ("model", "tasks", "message"),
    [
        (3, {"t": task()}, "model must be an nn.Module, got int"),
        (nn.Linear(1, 1), {}, "needs at least one task"),
        (nn.Linear(1, 1), {"t": loss}, "task 't' must be a tokgraph.Task, got function"),
    ],
)
def test_specs_that_are_none(model: Any, tasks: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        tg.ModelSpec(model, tasks)


# ------------------------------------------------------------------ losses


class Output(OrderedDict[str, Any]):
    """As transformers return them."""


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, IDS), lambda x: [x], lambda x: {"logits": IDS, "loss": x}, lambda x: Output(loss=x)],
)
def test_where_the_loss_is(wrap: Any) -> None:
    value = torch.tensor(1.5)
    found, whole = split_outputs(wrap(value))
    assert found is value
    assert type(whole) is type(wrap(value))


@pytest.mark.parametrize(
    "result",
    [None, 1.5, (), [], {}, {"logits": torch.tensor(1.0)}, torch.ones(2), (torch.ones(1), torch.tensor(1.0)), "loss"],
)
def test_results_without_a_loss(result: Any) -> None:
    with pytest.raises(SpecError, match="must return a scalar loss"):
        split_outputs(result)


# ------------------------------------------------------------------ model files

FILE = """
import torch
import tokgraph as tg

def loss(model, ids):
    return model.weight.sum() * ids.sum()

def build(size="tiny", batch=2):
    if size == "broken":
        raise KeyError("no such size")
    if size == "refused":
        raise tg.SpecError("of the user's own")
    ids = torch.zeros(batch, 4, dtype=torch.long)
    task = tg.Task(loss, {"ids": ids}, visual=tg.VisualTokens.positions(slice(0, 2)))
    return tg.ModelSpec(torch.nn.Linear(2, 2), {"t": task})

def other():
    return build(batch=3)

def number():
    return 3

value = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some_model.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_load(file: Path) -> None:
    assert tg.load(file).tasks["t"].inputs["ids"].shape == (2, 4)
    assert tg.load(str(file), batch=5).tasks["t"].inputs["ids"].shape == (5, 4)
    assert tg.load(f"{file}:other").tasks["t"].inputs["ids"].shape == (3, 4)


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        ("missing", {}, "defines no function 'missing'"),
        ("value", {}, "defines no function 'value'"),
        ("number", {}, r"number\(\) of .*some_model.py returned int, not a tokgraph.ModelSpec"),
        ("build", {"colour": 1}, r"build\(\) of .* cannot be called: got an unexpected keyword argument 'colour'"),
        ("build", {"size": "broken"}, r"build\(\) of .* failed: KeyError: 'no such size'"),
    ],
)
def test_functions_that_build_nothing(function: str, kwargs: dict[str, Any], message: str, file: Path) -> None:
    with pytest.raises(LoadError, match=message):
        tg.load(f"{file}:{function}", **kwargs)


def test_an_error_of_ours_passes_through(file: Path) -> None:
    with pytest.raises(SpecError, match="of the user's own"):
        tg.load(file, size="refused")


def test_the_signature_is_shown(file: Path) -> None:
    with pytest.raises(LoadError) as caught:
        tg.load(file, colour=1)
    assert "build(size='tiny', batch=2)" in str(caught.value.help)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.py", None, "no such model file"),
        ("model.txt", "x = 1", "is not a Python file"),
        ("syntax.py", "def build(:", r"cannot be imported: SyntaxError"),
        ("fails.py", "raise RuntimeError('at import')", r"cannot be imported: RuntimeError: at import"),
        ("absent.py", "import a_module_that_is_not_there", "cannot be imported: ModuleNotFoundError"),
        ("empty.py", "", "defines no function 'build'"),
    ],
)
def test_files_that_cannot_be_loaded(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(LoadError, match=message):
        tg.load(tmp_path / name)
    assert "tokgraph_model_fails" not in sys.modules


def test_modules_beside_the_file_are_found(tmp_path: Path) -> None:
    (tmp_path / "beside_the_model.py").write_text("from tests import tiny\n")
    (tmp_path / "model.py").write_text(
        "import beside_the_model\n\ndef build():\n    return beside_the_model.tiny.build()\n"
    )
    searched = list(sys.path)
    assert isinstance(tg.load(tmp_path / "model.py"), tg.ModelSpec)
    assert sys.path == searched


def test_a_script_that_ends_itself_is_no_model_file(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(tg.LoadError, match="SystemExit: 3"):
        tg.load(tmp_path / "model.py")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such model file"):
        tg.load(tmp_path)


def test_the_tiny_model_can_be_loaded_by_path() -> None:
    spec = tg.load(f"{tiny.__file__}:build", layers=1, batch=3)
    assert set(spec.tasks) == {"understanding", "generation"}
    with pytest.raises(SpecError, match="do not fit its forward"):
        tg.load(f"{tiny.__file__}:missing_input")
    with pytest.raises(LoadError, match="returned int"):
        tg.load(f"{tiny.__file__}:wrong_type")

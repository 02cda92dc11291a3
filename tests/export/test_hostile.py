"""Exported files that were changed: refused by name, whatever was changed, and nothing outside their folder is read."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import tokgraph as tg
from tests.export.conftest import Exported
from tokgraph.export.files import find_exported, read_exported
from tokgraph.export.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tests/export/test_onnx.py")]  # whose program it changes
STEP = "understanding.train-step.onnx"


@pytest.fixture
def folder(exported: Callable[..., Exported], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("shared").folder, tmp_path / "changed"))


def change(path: Path, how: Callable[[Any], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    how(model)
    path.write_bytes(model.SerializeToString())


def refused(path: Path) -> str:
    with pytest.raises(tg.ExportError) as raised:
        read_exported(path)
    return str(raised.value)


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "..", "a/../../secret"])
def test_weights_lie_beside_the_model(folder: Path, place: str) -> None:
    (folder.parent / "secret").write_bytes(bytes(2**16))

    def elsewhere(model: Any) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place

    forward = folder / "understanding.forward.onnx"
    change(forward, elsewhere)
    assert "which is not in its folder" in refused(forward)
    with pytest.raises(tg.ExportError, match="cannot load"):
        Session(forward)


def test_claims_of_state(folder: Path) -> None:
    read = read_exported(folder / STEP)
    read.initial()

    def huge(model: Any) -> None:
        claimed = model.graph.input.add()
        claimed.name = "state/huge"
        claimed.type.tensor_type.elem_type = 1
        claimed.type.tensor_type.shape.dim.add().dim_value = 2**50

    change(folder / STEP, huge)
    with pytest.raises(tg.ExportError, match="bytes of optimizer state"):
        read_exported(folder / STEP).initial()


def test_inputs_that_no_weights_have(folder: Path) -> None:
    def other(model: Any) -> None:
        model.graph.input.add().CopyFrom(model.graph.input[0])
        model.graph.input[-1].name = "param/none"

    change(folder / STEP, other)
    with pytest.raises(tg.ExportError, match="lacks 'param/none'"):
        read_exported(folder / STEP).initial()


@pytest.mark.parametrize("key", ["blocks", "type", "node"])
def test_what_a_file_says_of_itself(folder: Path, key: str) -> None:
    def odd(model: Any) -> None:
        if key == "type":
            model.graph.input[0].type.tensor_type.elem_type = 77
        for entry in [*model.metadata_props, *(e for node in model.graph.node for e in node.metadata_props)]:
            if entry.key == "tokgraph.blocks" and key == "blocks":
                entry.value = "many"
            if entry.key == "tokgraph.block" and key == "node":
                entry.value = "third"

    change(folder / STEP, odd)
    assert "was changed since it was exported" in refused(folder / STEP)


def test_a_file_of_another_tool(folder: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", 1, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    (folder / "foreign.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(tg.ExportError, match=r"foreign\.onnx does not say which task"):
        find_exported(folder)


def test_bits(folder: Path) -> None:
    """A changed file is read or refused, and so is what it claims; nothing else is raised."""
    draw = random.Random(0)
    path = folder / STEP
    good = path.read_bytes()
    refusals = 0
    for _ in range(40):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 4, 30])):
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad[: draw.choice([len(bad), draw.randrange(len(bad))])])
        try:
            read_exported(path).initial()
        except tg.TokgraphError:
            refusals += 1
    assert refusals > 0

"""The table of models: the page is what its figures give, and some of its rows are measured again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from tests.families import eager_drops
from tests.families.cells import TOLERANCE, Row, measure
from tests.families.collect import all_families
from tests.families.family import Example
from tests.families.page import is_green, page
from tests.field import decoder, structures

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIGURES: dict[str, Any] = json.loads((DOCS / "models.json").read_text(encoding="utf-8"))
ROWS = FIGURES["rows"]
LIGHT = ("capture", "blocks", "exact", "hide", "eager")
MORE = (*LIGHT, "freeze", "fastv", "oracle", "flops")
FAST = ("Fuyu",)
OPEN = "Fuyu"  # measured with its sizes open
SLOW = (OPEN, "Gemma 3n", "JanusFlow", "Kosmos-2")


def test_the_page_is_what_the_figures_give() -> None:
    assert (DOCS / "models.md").read_text(encoding="utf-8") == page(FIGURES)


def test_every_row_is_of_a_family_and_every_cell_says_why() -> None:
    assert set(ROWS) <= set(all_families())
    cells = [cell for row in ROWS.values() for task in row["tasks"].values() for cell in task.values()]
    assert all(cell["state"] in ("ok", "skipped") or (cell["code"] and cell["why"]) for cell in cells)


def fixed(example: Example) -> Example:
    """The same without open dimensions: three times as fast."""
    return replace(example, tasks={name: replace(task, dynamic=None) for name, task in example.tasks.items()})


def check_row(name: str, columns: tuple[str, ...], sizes_fixed: bool = False) -> None:
    """Measured anew, its cells are what they are in the table; errors of rounding may differ."""
    family = all_families()[name]
    if sizes_fixed:
        family = replace(family, make=lambda make=family.make: fixed(make()))
    for task, column, cell in measure(family, columns):
        if column == "seconds" or (column == "capture" and sizes_fixed):
            continue
        known = ROWS[name]["tasks"][task][column]
        assert cell["state"] == known["state"], (name, task, column, cell)
        if cell["state"] != "ok":
            assert cell.get("code") == known.get("code")
        elif column in ("oracle", "eager"):
            assert cell["value"] <= TOLERANCE
        elif column == "flops":
            assert cell["value"] == pytest.approx(known["value"], rel=0.01)
        else:
            assert cell.get("value") == known.get("value"), (name, task, column)


@pytest.mark.parametrize("name", FAST)
def test_a_row_again(name: str) -> None:
    check_row(name, LIGHT, sizes_fixed=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_rows_again(name: str) -> None:
    check_row(name, MORE, sizes_fixed=name != OPEN)


def test_the_check_against_eager_sees_mistakes() -> None:
    """Another row that goes, a layer more, rows that are frozen and not hidden: each is told from what was asked for."""
    row = Row(all_families()["Fuyu"].make(), "understanding")
    task, inputs = row.task, row.example.batch("understanding", 0)
    assert task.visual is not None
    visual = eager_drops.visual_rows(task.visual, inputs, inputs["input_ids"].shape[1])
    rows = eager_drops.dropped_evenly(visual, 0.5)

    def run(*drops: eager_drops.Drop) -> Any:
        return eager_drops.run(row.example.model, task, inputs, row.layers, drops)

    asked = run(eager_drops.Drop(0, 2, rows, "hide"))
    assert eager_drops.distance(run(eager_drops.Drop(0, 2, rows, "hide")), asked)[0] == 0
    for wrong in (
        (),
        (eager_drops.Drop(0, 2, visual & ~rows, "hide"),),
        (eager_drops.Drop(0, 1, rows, "hide"),),
        (eager_drops.Drop(0, 2, rows, "freeze"),),
    ):
        assert eager_drops.distance(run(*wrong), asked)[0] > 1e4 * TOLERANCE
    loss, gradients = asked
    name = max(gradients, key=lambda found: float(gradients[found].abs().max()))
    assert eager_drops.distance((loss, gradients | {name: gradients[name] * 1.001}), asked)[0] > 1e4 * TOLERANCE
    assert eager_drops.distance((loss, {k: v for k, v in gradients.items() if k != name}), asked)[0] == 1


@pytest.mark.parametrize("structure", ["features again", "features again, by index", "first to all"])
def test_what_is_added_behind_a_layer_is_taken_past_with_it(structure: str) -> None:
    """Held to a loop by hand; with rows put back behind the module of each layer, they had what is added there."""
    model, inputs = structures.model(structure), decoder.batch()
    task = decoder.spec(model, inputs, structures.loss).tasks[decoder.TASK]
    rows, layers = decoder.dropped(inputs["ids"]), [f"layers.{number}" for number in range(4)]
    for start, end, mode in ((0, 2, "hide"), (1, 2, "hide"), (0, 1, "freeze"), (1, 3, "freeze")):
        loss = model.loss(**inputs, span=range(start, end), dropped=rows, hide=mode == "hide")
        loss.backward()
        by_hand = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        found = eager_drops.run(model, task, inputs, layers, [eager_drops.Drop(start, end, rows, mode)])
        assert eager_drops.distance(found, (loss.detach(), by_hand))[0] < TOLERANCE


def test_rows_that_go_are_evenly_spaced() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]]).bool()
    found = eager_drops.dropped_evenly(visual, 0.5)
    assert found.int().tolist() == [[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]]


def test_a_row_with_a_gap_is_not_green() -> None:
    name, row = next((name, row) for name, row in ROWS.items() if is_green(row))
    broken = json.loads(json.dumps(row))
    next(iter(broken["tasks"].values()))["hide"] = {"state": "refused", "code": "TG006", "why": "mixes | rows"}
    assert not is_green(broken)
    text = page({**FIGURES, "rows": {name: broken}})
    assert "0 of them without a gap" in text
    assert "TG006<sup>" in text
    assert "mixes \\| rows" in text

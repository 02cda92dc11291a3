"""The page of the table of models, from the figures of its rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HEAD = """# Models

What tokgraph does with models that nobody tuned it for: families of `transformers`, tiny and with random weights, and
designs written in plain PyTorch by the description of their papers. Each row is one family, its tasks in one line each.
The page is written by `python benchmarks/model_table.py` from [`models.json`](models.json), which that script measures
(torch {torch}, transformers {transformers}); the families are in `tests/families`. Rows are not measured all on one day: a row is of the
commit that changed it last in that file. `--only NAME` measures one again.

| column | what was done |
| --- | --- |
| capture | the dimensions that stay open; the others of the example batch are fixed, by the model or because the capture with them open was refused (note) |
| blocks | blocks found of the layers that the family has; they must be these modules in their order |
| exact, hide, freeze, fastv | a plan was made and the graph rewritten: `exact`; half of the visual rows, evenly spaced, hidden in all layers but the last, or frozen in the middle ones, and put back, `exact` on top; the policy `fastv` from block 2 on (understanding only) |
| oracle | all of these plans equal the oracle on the example batch and on another one: loss, outputs, the gradient of every parameter, in float64. The largest relative error |
| eager | `exact`, `hide` and `freeze` equal the user's own model on both batches: plain for `exact`, else with the same rows put back and masked by hooks, by a program that shares no code with tokgraph (`tests/families/eager_drops.py`): loss and the gradient of every parameter, float64. The largest relative error |
| forward, step | ONNX graphs of the `hide` plan, forward and training step with all gradients, were written and agreed with PyTorch in ONNX Runtime |
| FLOPs | of a training step under `exact`, as a share of what it was, towers included; at these tiny sizes, with few layers, it is lower than at real ones |
| seconds | of the whole line, on one busy core |

`ok`: it went through. A code is an error of [errors](errors.md), or the name of an exception; its note says why. `-`: does not
apply, or was not run.
"""

COLUMNS = {
    "capture": "capture", "blocks": "blocks", "exact": "exact", "hide": "hide", "freeze": "freeze", "fastv": "fastv",
    "oracle": "oracle", "eager": "eager", "forward": "ONNX forward", "train-step": "ONNX step", "flops": "FLOPs",
    "seconds": "s",
}  # fmt: skip


class _Notes:
    """Footnotes, numbered in the order in which they are asked for; equal ones share a number."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """The mark of a note."""
        return f"<sup>{self.texts.setdefault(text, len(self.texts) + 1)}</sup>"

    def lines(self) -> list[str]:
        """All of them."""
        return [f"{number}. {text}" for text, number in self.texts.items()]


def is_green(row: Mapping[str, Any]) -> bool:
    """Whether every cell of a row is as it should be."""
    needed = set(COLUMNS)
    cells = list(row["tasks"].values())
    return bool(cells) and all(
        needed <= set(task) and all(cell["state"] == "ok" for cell in task.values()) for task in cells
    )


def page(figures: Mapping[str, Any]) -> str:
    """Markdown of the page.

    Args:
        figures: `{"versions": {package: version}, "rows": {name: row}}`.
    """
    rows, notes = figures["rows"], _Notes()
    lines = ["| family | source | task | " + " | ".join(COLUMNS.values()) + " |", "| --- " * (len(COLUMNS) + 3) + "|"]
    for name, row in rows.items():
        lines += _lines(name, row, notes)
    green = sum(map(is_green, rows.values()))
    counts = f"{len(rows)} families and designs, {green} of them without a gap."
    return "\n".join([HEAD.format(**figures["versions"]), counts, "", *lines, "", "Notes:", "", *notes.lines(), ""])


def _lines(name: str, row: Mapping[str, Any], notes: _Notes) -> list[str]:
    about = "".join(notes.mark(note) for note in row["notes"])
    if "stopped" in row:
        about += notes.mark(f"the row was stopped: {row['stopped']}")
    source = row["source"] if row["source"].startswith(("http", "[")) or " " in row["source"] else f"`{row['source']}`"
    title = f"**{name}**" if is_green(row) else name
    found = []
    for task, cells in row["tasks"].items() or {"-": {}}.items():
        shown = [_cell(column, cells.get(column), notes) for column in COLUMNS]
        found.append(f"| {title}{about} | {source} | {task} | " + " | ".join(shown) + " |")
        title = about = source = ""
    return found


def _cell(column: str, cell: Mapping[str, Any] | None, notes: _Notes) -> str:
    if cell is None or cell["state"] == "skipped":
        return "-"
    if cell["state"] != "ok":
        return cell["code"] + notes.mark(_escaped(cell["why"]))
    value = cell.get("value")
    if column == "capture":
        return (", ".join(value) or "static") + (notes.mark(_escaped(cell["why"])) if cell.get("why") else "")
    if value is None:
        return "-"
    if column in ("oracle", "eager"):
        return f"{value:.0e}"
    if column == "flops":
        return f"{value:.2f}x"
    return f"{value:.0f}" if column == "seconds" else value or "ok"


def _escaped(text: str) -> str:
    text = re.sub(r"^task '[^']*': ", "", text)  # the line's own, so that equal reasons share a note
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")

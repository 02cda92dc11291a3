"""The table of models in docs/models.md: what tokgraph does with every family of `tests/families`, measured row by row.

    python benchmarks/model_table.py                           # all rows; about half a minute each
    python benchmarks/model_table.py --only Janus --only LLaVA # these; the others stay as they are in the JSON file
    python benchmarks/model_table.py --columns eager           # these cells of each row
    python benchmarks/model_table.py --missing                 # rows that lack a cell of these columns
    python benchmarks/model_table.py --page                    # write the page anew, and measure nothing
    python benchmarks/model_table.py --check                   # is docs/models.md what docs/models.json gives?

Every row runs in a process of its own, with a time limit. Figures are kept in docs/models.json, from which the page is
written after each row.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import multiprocessing
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `tests` is no installed package

from tests.families.cells import COLUMNS, measure  # noqa: E402
from tests.families.collect import all_families  # noqa: E402
from tests.families.family import Family  # noqa: E402
from tests.families.page import page  # noqa: E402
from tokgraph import export, stages  # noqa: E402, F401  # what every row imports
from tokgraph.files import write_atomically  # noqa: E402

DATA, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
LIMIT = 300  # seconds of a row


def write_cells(family: Family, columns: tuple[str, ...], to: str) -> None:
    """Write the cells of a family as they come, a JSON object a line."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with Path(to).open("w", encoding="utf-8") as file:
        for task, column, cell in measure(family, columns):
            print(json.dumps([task, column, cell]), file=file, flush=True)


def row(family: Family, columns: tuple[str, ...], limit: int) -> dict[str, Any]:
    """The cells of a family, measured in a process of its own; those that it did not come to are missing.

    The process is forked, so that what is imported here need not be imported again; nothing is computed here.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        process = multiprocessing.get_context("fork").Process(target=write_cells, args=(family, columns, file.name))
        process.start()
        process.join(limit)
        stopped = process.is_alive()
        if stopped:
            process.kill()
            process.join()
        lines = file.read().splitlines()
    tasks: dict[str, dict[str, Any]] = {}
    for line in lines:
        task, column, cell = json.loads(line)
        tasks.setdefault(task, {})[column] = cell
    found: dict[str, Any] = {"source": family.source, "notes": list(family.notes), "tasks": tasks}
    why = f"not finished in {limit} s" if stopped else f"exit code {process.exitcode}" if process.exitcode else None
    return found | ({"stopped": why} if why else {})


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A row measured anew in some of its columns; their seconds are added to those of the others."""
    tasks = dict(old.get("tasks", {}))
    for name, cells in new["tasks"].items():
        known = tasks.get(name, {})
        tasks[name] = {**known, **cells}
        if "seconds" in known and "seconds" in cells:
            tasks[name]["seconds"] = {
                **cells["seconds"],
                "value": known["seconds"]["value"] + cells["seconds"]["value"],
            }
    return {**new, "tasks": tasks}


def lacks(row: dict[str, Any] | None, columns: tuple[str, ...]) -> bool:
    """Whether cells of these columns are missing in a row, and its model was captured."""
    tasks = list((row or {}).get("tasks", {}).values())
    return not tasks or any(set(columns) - set(task) for task in tasks if task["capture"]["state"] == "ok")


def load() -> dict[str, Any]:
    """What was measured: `{"versions": {package: version}, "rows": {name: row}}`."""
    return dict(json.loads(DATA.read_text(encoding="utf-8"))) if DATA.exists() else {"rows": {}}


def save(name: str, found: dict[str, Any], order: list[str], part: bool) -> None:
    """Put a row among the figures, write them and the page. Two runs at once write one after the other."""
    with (ROOT / "build" / "model_table.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = load()["rows"]
        rows[name] = merged(rows.get(name, {}), found) if part else found
        kept = {name: rows[name] for name in order if name in rows}
        figures = {"versions": {p: version(p).split("+")[0] for p in ("torch", "transformers")}, "rows": kept}
        write_atomically(DATA, json.dumps(figures, indent=1) + "\n")
        write_atomically(PAGE, page(figures))


def main() -> int:
    """Measure, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="a family's name (default: all)")
    parser.add_argument("--columns", action="append", choices=COLUMNS, help="a column (default: all)")
    parser.add_argument("--missing", action="store_true", help="rows that lack a cell of these columns")
    parser.add_argument("--page", action="store_true", help="write the page from the figures, and measure nothing")
    parser.add_argument("--check", action="store_true", help="compare the page with the figures, and measure nothing")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"seconds of a row (default: {LIMIT})")
    options = parser.parse_args()
    families = all_families()
    columns = tuple(options.columns or COLUMNS)
    if options.check:
        same = PAGE.read_text(encoding="utf-8") == page(load())
        print(
            "the page is what the figures give" if same else "run python benchmarks/model_table.py: the page is stale"
        )
        return 0 if same else 1
    if options.page:
        write_atomically(PAGE, page(load()))
        return 0
    (ROOT / "build").mkdir(exist_ok=True)
    for name in options.only or families:
        if not options.missing or lacks(load()["rows"].get(name), columns):
            found = row(families[name], columns, options.limit)
            save(name, found, list(families), part=bool(options.columns))
            print(name, found.get("stopped", "done"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

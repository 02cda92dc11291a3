"""The table of models in docs/models.md: what tokgraph does with every family of `tests/families`, measured row by row.

    python benchmarks/model_table.py                           # all rows; about half a minute each
    python benchmarks/model_table.py --only Janus --only LLaVA # these; the others stay as they are in the JSON file
    python benchmarks/model_table.py --columns eager           # these cells of each row
    python benchmarks/model_table.py --missing                 # rows that the JSON file lacks
    python benchmarks/model_table.py --check                   # is docs/models.md what docs/models.json gives?

Every row runs in a process of its own, with a time limit. Figures are kept in docs/models.json, from which the page is
written after each row.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `tests` is no installed package

from tests.families.cells import COLUMNS, measure  # noqa: E402
from tests.families.collect import all_families  # noqa: E402
from tests.families.family import Family  # noqa: E402
from tests.families.page import page  # noqa: E402
from tokgraph.files import write_atomically  # noqa: E402

DATA, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
LIMIT = 300  # seconds of a row


def row_in_this_process(family: Family, columns: tuple[str, ...]) -> None:
    """Print the cells of a family as they come, a JSON object a line."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for task, column, cell in measure(family, columns):
        print(json.dumps([task, column, cell]), flush=True)


def row(family: Family, columns: tuple[str, ...], limit: int) -> dict[str, Any]:
    """The cells of a family, measured in a process of its own; those that it did not come to are missing."""
    command = [sys.executable, __file__, "--row", family.name, *(x for c in columns for x in ("--columns", c))]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    why = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        text = done.stdout
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as stopped:
        text = stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        why = f"not finished in {limit} s"
    tasks: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            task, column, cell = json.loads(line)
            tasks.setdefault(task, {})[column] = cell
    found: dict[str, Any] = {"source": family.source, "notes": list(family.notes), "tasks": tasks}
    return found | ({"stopped": why[:300]} if why else {})


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A row measured anew in some of its columns."""
    tasks = {name: {**old.get("tasks", {}).get(name, {}), **cells} for name, cells in new["tasks"].items()}
    return {**new, "tasks": tasks or old.get("tasks", {})}


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
    parser.add_argument("--missing", action="store_true", help="rows that the JSON file lacks")
    parser.add_argument("--check", action="store_true", help="compare the page with the figures, and measure nothing")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"seconds of a row (default: {LIMIT})")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    families = all_families()
    columns = tuple(options.columns or COLUMNS)
    if options.row:
        row_in_this_process(families[options.row], columns)
        return 0
    if options.check:
        same = PAGE.read_text(encoding="utf-8") == page(load())
        print("the page is what the figures give" if same else "run python benchmarks/model_table.py: the page is stale")
        return 0 if same else 1
    (ROOT / "build").mkdir(exist_ok=True)
    for name in options.only or families:
        if not (options.missing and name in load()["rows"]):
            found = row(families[name], columns, options.limit)
            save(name, found, list(families), part=bool(options.columns))
            print(name, found.get("stopped", "done"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

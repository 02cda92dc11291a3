"""Names of tasks on the command line: never a path, and printed as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

MODEL = """
import dataclasses
import tokgraph as tg
from tests import tiny

def build():
    spec = tiny.build(dynamic=False)
    return tg.ModelSpec(spec.model, dict(zip(["../../[/b] :cat:", ".."], spec.tasks.values())))
"""


@pytest.mark.slow
def test_a_task_named_like_a_path(run: Callable[..., Result], tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "model.py").write_text(MODEL)
    result = run("optimize", str(inside / "model.py"), "-o", str(inside / "out"), "--dump-ir", str(inside / "dumps"))
    assert result.exit_code == 0, result.output
    assert "[/b] :cat:" in result.output
    assert {p.name for p in inside.iterdir()} == {"model.py", "out", "dumps"}
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"b"}
    first = "%2E%2E%2F%2E%2E%2F%5B%2Fb%5D%20%3Acat%3A"
    ir = {p.name for p in (inside / "out" / "ir").iterdir()}
    assert ir == {f"{task}.{when}.txt" for task in (first, "%2E%2E") for when in ("before", "after")}
    assert {p.name.partition(".")[0] for p in (inside / "dumps").iterdir()} == {first, "%2E%2E"}

    result = run("run", str(inside / "out"), "--task", "..", "-o", str(tmp_path / "found.safetensors"))
    assert list(json.loads(result.stdout)["loss"]) == [".."]
    result = run("plan", str(inside / "model.py"), "--target-flops", "0.9", "--mix", "..=1,../../[/b] :cat:=2")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["options"]["mix"] == {"..": 1, "../../[/b] :cat:": 2}
    for command in (["inspect"], ["compare", "--policies", "none"]):
        result = run(command[0], str(inside / "model.py"), *command[1:])
        assert result.exit_code == 0, result.output

"""``tokgraph plan --cluster``: tables, JSON, usage errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tokgraph as tg
from tests import tiny

TINY = str(Path(tiny.__file__))
GIVEN = "gpus=16,memory=80GB,flops=989TFLOPS,bandwidth=3.35TB/s,tokens=1T"


@pytest.mark.slow
def test_tables_and_the_plan(run, tmp_path):
    result = run("plan", TINY, "--set", "layers=4", "--cluster", GIVEN, "-o", "plan.json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("16 GPUs of 80 GB; 10.06 k parameters")
    rows = [line.split() for line in lines]
    assert sum(row[:1] == ["fsdp"] for row in rows) == 4
    assert any(row[:2] == ["block", "1"] for row in rows)
    assert "fits with the plan: ddp, ddp again, fsdp" in " ".join(result.stdout.split())
    assert "note: nothing of it was measured on several GPUs" in lines
    assert tg.Plan.load(tmp_path / "plan.json").policy == "shared"


@pytest.mark.slow
def test_json_and_a_mix(run):
    arguments = ("--set", "layers=4", "--cluster", GIVEN, "--mix", "understanding=3,generation=1", "--json")
    found = json.loads(run("plan", TINY, *arguments).stdout)
    assert found["mix"] == {"understanding": 0.75, "generation": 0.25}
    assert found["cluster"]["gpus"] == 16
    plan = run("plan", TINY, "--set", "layers=4", "--json").stdout
    assert tg.Plan.from_json(plan).policy == "shared"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus=64", "memory, flops, bandwidth must be given"),
        (GIVEN.replace("80GB", "80gb"), "memory=80gb is no amount (write it as 80GB"),
        (f"{GIVEN},node=5", "16 GPUs do not fill machines of 5"),
    ],
)
def test_usage(run, text, message):
    result = run("plan", TINY, "--cluster", text)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())

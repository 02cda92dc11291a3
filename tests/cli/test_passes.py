"""The switches of a compiler developer: IR after passes, how far to go, where the time goes, why not further."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

import tokgraph as tg
from tests import tiny
from tokgraph.stages import PASSES

TINY = str(Path(tiny.__file__))
SMALL = (TINY, "--set", "layers=2", "--set", "dynamic=False")
OPTIMIZE = ("optimize", *SMALL, "--policy", "exact", "--no-verify", "--no-save", "-o", "results")
TASKS = ("understanding", "generation")
RAN = [name for name in PASSES if name != "merge-parameter-casts"]  # that one runs in a region of autocast
SEED = RAN.index("seed-sites")


def printed(text: str) -> list[tuple[str, str]]:
    """``(pass, task)`` of each IR in a text."""
    return re.findall(r"^--- after ([\w-]+), \w+(?:, no change)?\ntask (\w+)$", text, flags=re.MULTILINE)


@pytest.mark.slow
def test_print_after_prints_to_standard_error(run, tmp_path):
    """Of every task; standard output stays JSON, and the results are written."""
    result = run(*OPTIMIZE, "--print-after", "seed-sites", "--print-after", "view-to-reshape", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["policy"] == "exact"
    cleanups = [("view-to-reshape", task) for task in TASKS]
    assert printed(result.stderr) == [*cleanups, *(("seed-sites", task) for task in TASKS)]
    assert "by seed-sites" in result.stderr
    assert "by push-down" not in result.stderr
    assert (tmp_path / "results/report.json").exists()


@pytest.mark.slow
def test_print_after_all(run):
    stderr = run(*OPTIMIZE, "--print-after", "all").stderr
    expected = [(name, task) for names in (RAN[: SEED - 1], RAN[SEED - 1 :]) for task in TASKS for name in names]
    assert printed(stderr) == expected
    assert "--- after remove-no-ops, exact, no change\n" in stderr
    assert "--- after seed-sites, approximate\n" in stderr


def test_print_after_a_failure(run, tmp_path):
    """What was printed up to there shows what the next pass was given."""
    site = tg.DropSite("understanding", 0, 2, 0.5)
    tg.Plan((site,)).save(tmp_path / "plan.json")
    result = run("optimize", *SMALL, "--set", "token_mixer='cumsum'", "--plan", "plan.json", "--print-after", "all")
    assert result.exit_code == 1
    assert "error[TG006]" in result.stderr
    assert printed(result.stderr)[-1] == ("explicit-causal-mask", "understanding")


def test_a_pass_that_did_not_run_is_named(run):
    """Without a plan, ``inspect`` rewrites nothing."""
    result = run("inspect", *SMALL, "--print-after", "push-down", "--print-after", "keep-batch-axis", "--json")
    assert json.loads(result.stdout)["schema"] == 2
    assert "--- push-down did not run" in result.stderr
    assert printed(result.stderr) == [("keep-batch-axis", task) for task in TASKS]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["seed-sites", *(pytest.param(n, marks=pytest.mark.slow) for n in ("split-to-slices", "push-down"))]
)
def test_stop_after_prints_the_graphs_as_they_are_then(run, tmp_path, name):
    """The same IR as after that pass of a whole run; nothing else is written."""
    whole = run(*OPTIMIZE, "--dump-ir", "dump")
    assert whole.exit_code == 0, whole.output
    stopped = run(*OPTIMIZE[:-2], "-o", "other", "--stop-after", name)
    assert stopped.exit_code == 0, stopped.output
    number = f"{RAN.index(name):02d}"
    dumps = [(tmp_path / f"dump/{task}.{number}.{name}.txt").read_text() for task in TASKS]
    assert stopped.stdout == "".join(dumps)
    assert not (tmp_path / "other").exists()


def test_stop_after_as_json(run, tmp_path):
    result = run(*OPTIMIZE, "--stop-after", "explicit-causal-mask", "--json", "--dump-ir", "dump", "--time-passes")
    found = json.loads(result.stdout)
    assert (found["schema"], found["stopped_after"], list(found["ir"])) == (1, "explicit-causal-mask", list(TASKS))
    assert "tril(" in found["ir"]["generation"]
    assert [p.name for p in tmp_path.iterdir()] == ["dump"]
    assert len(list((tmp_path / "dump").glob("generation.*"))) == SEED
    assert "seed-sites" not in result.stderr


@pytest.mark.slow
def test_dump_ir_writes_a_file_a_pass(run, tmp_path):
    """Numbered in order, capture's passes first."""
    assert run(*OPTIMIZE, "--dump-ir", "dump").exit_code == 0
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    numbered = [f"{number:02d}.{name}" for number, name in enumerate(RAN)]
    assert names == [f"{task}.{p}.txt" for task in sorted(TASKS) for p in numbered]
    last = tmp_path / f"dump/generation.{numbered[-1]}.txt"
    assert last.read_text() == (tmp_path / "results/ir/generation.after.txt").read_text()


@pytest.mark.slow
def test_time_passes_has_every_stage_and_pass(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*OPTIMIZE, "--time-passes", "--json")
    json.loads(result.stdout)
    text = result.stderr
    table = text[text.index("time by stage and pass") :]
    for stage in ("load", "capture", "analyse", "plan", "rewrite", "report", "all"):
        assert re.search(rf"│ +\d+\.\d{{3}} │ +\d+\.\d% │ +│ {stage} +│", table), stage
    for name in RAN:
        kind = "approximate" if name == "seed-sites" else "exact"
        for task in TASKS:
            assert re.search(rf"│ +\d+\.\d{{3}} │ +\d+\.\d% │ [ \d>-]+ │ +{name}, {task}, {kind} +│", table), (
                name,
                task,
            )
    assert "+1 ones, +1 tril" in table  # of the last block's attention
    assert "no change" in table
    assert max(map(len, table.splitlines())) <= 80
    shares = [float(x) for x in re.findall(r"│ +(\d+\.\d)% │ +│ (?!all)\w+ ", table)]
    assert sum(shares) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("switch", ["--print-after", "--stop-after"])
def test_an_unknown_pass_is_a_usage_error(run, tmp_path, switch):
    result = run(*OPTIMIZE, switch, "magic")
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert f"Invalid value for '{switch}': 'magic' is not one of" in message
    assert all(f"'{name}'" in message for name in PASSES)
    assert list(tmp_path.iterdir()) == []


def test_why_not_names_what_is_in_the_way(run, monkeypatch):
    """A running sum over tokens in the last block: table and JSON."""
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ("inspect", *SMALL, "--set", "token_mixer='cumsum'", "--why-not")
    found = json.loads(run(*arguments, "--json").stdout)["why_not"]
    assert list(found) == list(TASKS)
    for groups in found.values():
        place = {"value": "cumsum", "operator": "aten.cumsum.default", "blockers": ["cumsum"], "module": "layers.1"}
        assert groups[-1]["reason"] == "aten.cumsum.default mixes rows"
        assert groups[-1]["at"][0].items() >= place.items()
        assert re.search(r"tests/tiny.py:\d+$", groups[-1]["at"][0]["source"])
    text = run(*arguments).stdout
    table = text[text.index("understanding: why") : text.index("generation: why")]
    rows = [line.replace("│", "|") for line in table.splitlines() if line.startswith("│")]
    assert_expected_inline(
        re.sub(r"tiny.py:\d+", "tiny.py:NN", "\n".join(rows)),
        """\
|     1 | cumsum needs all its rows      | add_2  | layers.1   |
|       |                                |        | tiny.py:NN |
|     1 | aten.cumsum.default mixes rows | cumsum | layers.1   |
|       |                                |        | tiny.py:NN |""",
    )


def test_why_not_of_a_plan(run, tmp_path):
    tg.Plan((tg.DropSite("understanding", 0, 1, 0.5, mode="freeze"),)).save(tmp_path / "plan.json")
    found = json.loads(run("inspect", *SMALL, "--plan", "plan.json", "--why-not", "--json").stdout)
    assert found["why_not"]["generation"] == []
    assert found["why_not"]["understanding"] != []
    assert "why_not" not in json.loads(run("inspect", *SMALL, "--json").stdout)


def test_a_pass_to_stop_after_that_did_not_run_is_named(run) -> None:
    result = run("optimize", *SMALL, "--policy", "none", "--stop-after", "push-down", "--json")
    assert result.exit_code == 0
    assert "--- push-down did not run" in result.stderr
    assert json.loads(result.stdout)["stopped_after"] is None

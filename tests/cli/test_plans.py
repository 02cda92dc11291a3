"""``tokgraph plan``, ``diff`` and ``compare``, policies with options, and policies of other packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokgraph as tg
from tests import tiny

TINY = str(Path(tiny.__file__))
FOUR = ("--set", "layers=4")


@pytest.mark.slow
def test_plan_explains_and_writes(run, tmp_path):
    arguments = ("--target-flops", "0.7661", "--mix", "understanding=3,generation=1", "--explain", "-o", "plan.json")
    result = run("plan", TINY, *FOUR, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "target 0.7661x; attention mass assumed" in result.stderr
    assert "chosen: blocks [" in result.stderr
    plan = tg.Plan.load(tmp_path / "plan.json")
    assert {site.task for site in plan.sites} == {"understanding", "generation"}
    assert plan.options["mix"] == {"understanding": 3.0, "generation": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_plan_prints_any_policy_and_its_options(run):
    result = run("plan", TINY, *FOUR, "--policy", "fastv", "--option", "k=1", "--option", "drop=0.75", "--explain")
    plan = tg.Plan.from_json(result.stdout)
    assert plan.sites == (tg.DropSite("understanding", 1, 4, 0.25, "attention", restore=False),)
    assert "policy fastv makes one plan" in result.stderr


REFUSED = {
    "impossible target": (["--target-flops", "0.01"], 1, "what can be had lies between"),
    "target and span": (["--target-flops", "0.5", "--span", "1:2"], 1, "target_flops and span exclude each other"),
    "mix without target": (["--mix", "understanding=1"], 1, "mix is for the planner"),
    "malformed mix": (["--mix", "understanding=much"], 2, "is not TASK=WEIGHT"),
    "unknown policy": (["--policy", "magic"], 2, "'magic' is not one of"),
    "option of another type": (["--policy", "fastv", "--option", "k=soon"], 1, "option k='soon'"),
    "malformed option": (["--option", "k"], 2, "is not NAME=VALUE"),
    "no calibration file": (["--calibrate", "nowhere.pt"], 2, "no such file: nowhere.pt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plan_refuses(run, tmp_path, case):
    arguments, code, message = REFUSED[case]
    result = run("plan", TINY, *arguments, "-o", "plan.json")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


SITE = tg.DropSite("understanding", 1, None, 0.25, "attention", restore=False)
OTHER = tg.DropSite("generation", 1, 2, 0.5, mode="freeze")


@pytest.fixture
def two_plans(tmp_path):
    tg.Plan((SITE, OTHER), exact=True).save(tmp_path / "a.json")
    tg.Plan((OTHER, OTHER), policy="mine").save(tmp_path / "b.json")
    return str(tmp_path / "a.json"), str(tmp_path / "b.json")


def test_diff_shows_sites_and_fields(run, two_plans):
    assert run("diff", *two_plans).stdout.splitlines() == [
        "- understanding [1, end) keep 0.25 attention hide, gone for good",
        "+ generation [1, 2) keep 0.5 uniform freeze, restored",  # twice in b
        "~ exact: true -> false",
        '~ policy: "manual" -> "mine"',
    ]


def test_diff_as_json(run, two_plans):
    found = json.loads(run("diff", *two_plans, "--json").stdout)
    assert [site["task"] for site in found["only_a"]] == ["understanding"]
    assert [site["task"] for site in found["only_b"]] == ["generation"]
    assert [site["mode"] for site in found["common"]] == ["freeze"]
    assert found["fields"] == {"exact": [True, False], "policy": ["manual", "mine"]}


def test_equal_plans(run, two_plans):
    result = run("diff", two_plans[0], two_plans[0])
    assert (result.exit_code, result.stdout) == (0, "the plans are equal\n")
    assert run("diff", two_plans[0], "nowhere.json").exit_code == 2


@pytest.mark.slow
def test_compare_as_json(run, tmp_path):
    tg.Plan((tg.DropSite("understanding", 1, 2, 0.5),), policy="mine").save(tmp_path / "mine.json")
    result = run("compare", TINY, *FOUR, "--policies", "none, exact,pyramiddrop,mine.json", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == 1
    assert found["mix"] == {"understanding": 0.5, "generation": 0.5}
    none, exact, pyramid, mine = found["rows"]
    assert [row["policy"] for row in found["rows"]] == ["none", "exact", "pyramiddrop", "mine"]
    assert none["flops_ratio"] == {"understanding": 1.0, "generation": 1.0}
    assert none["mixed_flops_ratio"] == none["activation_ratio"] == 1.0
    assert exact["sharing_index"] == exact["coverage"] == 1.0
    assert exact["mixed_flops_ratio"] < 1.0
    assert pyramid["flops_ratio"]["generation"] == exact["flops_ratio"]["generation"]
    assert pyramid["sharing_index"] < 0.9
    assert mine["sharing_index"] < 1.0
    assert all(row["verified"] is True and row["new_parameters"] == 0 for row in found["rows"])


@pytest.mark.slow
def test_compare_weighs_by_the_mix(run):
    arguments = ("compare", TINY, *FOUR, "--policies", "pyramiddrop", "--no-verify", "--json")
    (row,) = json.loads(run(*arguments, "--mix", "understanding=1,generation=0").stdout)["rows"]
    assert row["mixed_flops_ratio"] == pytest.approx(row["flops_ratio"]["understanding"])
    (even,) = json.loads(run(*arguments).stdout)["rows"]
    assert even["mixed_flops_ratio"] > row["mixed_flops_ratio"] + 0.05


def test_ragged_is_an_option_of_every_policy(run, tmp_path):
    result = run("plan", TINY, *FOUR, "--policy", "fastv", "--option", "k=1", "--ragged", "pad", "-o", "plan.json")
    assert result.exit_code == 0, result.output
    assert [site.ragged for site in tg.Plan.load(tmp_path / "plan.json").sites] == ["pad"]
    assert run("compare", TINY, *FOUR, "--policies", "random-ltd", "--ragged", "pad", "--no-verify").exit_code == 0
    assert run("plan", TINY, "--ragged", "most").exit_code == 2
    clash = run("optimize", TINY, "--plan", "plan.json", "--ragged", "pad")
    assert clash.exit_code == 2
    assert "--plan and --ragged exclude each other" in clash.stderr


RAGGED = """
from tests.test_ragged import IMAGES, spec

def build():
    return spec(IMAGES)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["min", "pad"])
def test_optimize_verifies_a_ragged_batch(run, tmp_path, rule):
    (tmp_path / "ragged.py").write_text(RAGGED)
    options = ("--policy", "fastv", "--option", "k=1", "--ragged", rule, "-o", "results")
    result = run("optimize", "ragged.py", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "results/report.json").read_text())
    assert report["verification"]["passed"] is True
    kept = {"min": 9.25 - 3, "pad": (5 + 4 + 6 + 5) / 4}[rule]  # of 9, 7, 11 and 10: three less; or half
    assert report["tasks"]["understanding"]["tokens_per_block"]["after"][1:3] == [kept, kept]


def test_compare_as_a_table_with_a_policy_that_refuses(run):
    result = run("compare", TINY, "--policies", "exact,pyramiddrop", "--no-verify")  # three blocks, four stages
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    (exact,) = [line for line in lines if line.startswith("exact ")]
    assert exact.endswith("1.000 1.000 0 -"), "eighty columns hold every number"
    assert (
        "pyramiddrop: policy 'pyramiddrop': option stages=4 is out of range: task 'understanding' has 3 blocks"
        in " ".join(lines)
    )


@pytest.mark.parametrize("names", ["exact,magic", " , "])
def test_compare_refuses_names(run, names):
    result = run("compare", TINY, "--policies", names)
    assert result.exit_code == 2
    assert ("'magic' is no policy and no plan file" if "magic" in names else "names no policy") in result.stderr


@pytest.mark.slow
def test_optimize_takes_options_of_any_policy(run, tmp_path):
    result = run(
        "optimize", TINY, *FOUR, "--policy", "fastv", "--option", "k=1", "--no-exact", "--no-save", "-o", "results"
    )
    assert result.exit_code == 0, result.output
    plan = tg.Plan.load(tmp_path / "results/plan.json")
    assert (plan.policy, plan.exact, [s.start for s in plan.sites]) == ("fastv", False, [1])
    report = json.loads((tmp_path / "results/report.json").read_text())
    assert report["verification"]["passed"] is True
    assert report["tasks"]["understanding"]["tokens_per_block"]["after"][1:3] == [3, 3]


# Policies of other packages.

TOY = """
from dataclasses import dataclass
from typing import ClassVar
import tokgraph as tg
from typing import Annotated
from pydantic import Field
from tokgraph.planning import Policy

@dataclass(frozen=True)
class Toy(Policy):
    '''Half of the visual tokens in block 1.'''
    name: ClassVar[str] = "toy"
    source: ClassVar[str] = "a toy"
    keep: Annotated[float, Field(ge=0, le=1, description="what stays")] = 0.5

    def decide(self, facts):
        return self.made([tg.DropSite(task, 1, 2, self.keep) for task in facts], True)

class NoPolicy:
    pass
"""


@pytest.fixture
def plugin(tmp_path):
    """Install a package whose entry point is ``value``, by pip from its source; returns what runs the command line beside it."""

    def install(value: str):
        source, site = tmp_path / "toy", tmp_path / "site"
        source.mkdir()
        (source / "toy_policies.py").write_text(TOY)
        (source / "pyproject.toml").write_text(
            f"""
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "toy-policies"
version = "1.0"

[project.entry-points."tokgraph.policies"]
toy = "{value}"

[tool.setuptools]
py-modules = ["toy_policies"]
"""
        )
        offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
        pip = [sys.executable, "-m", "pip", "install", *offline, "--target", str(site), str(source)]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)

        def invoke(*args: str) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, "PYTHONPATH": str(site)}
            command = [sys.executable, "-m", "tokgraph.cli", *args]
            return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

        return invoke

    return install


@pytest.mark.slow
def test_a_policy_of_another_package(plugin):
    invoke = plugin("toy_policies:Toy")
    listed = json.loads(invoke("policies", "--json").stdout)["policies"]
    assert listed["toy"] == {
        "summary": "Half of the visual tokens in block 1.",
        "source": "a toy",
        "options": {
            "keep": {
                "title": "Keep",
                "description": "what stays",
                "type": "number",
                "minimum": 0,
                "maximum": 1,
                "default": 0.5,
            }
        },
    }
    assert "shared" in listed
    planned = invoke("plan", TINY, "--policy", "toy", "--option", "keep=0.25")
    assert planned.returncode == 0, planned.stderr
    plan = tg.Plan.from_json(planned.stdout)
    assert plan.policy == "toy"
    assert [(s.task, s.start, s.end, s.keep) for s in plan.sites] == [
        ("understanding", 1, 2, 0.25),
        ("generation", 1, 2, 0.25),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(
            "toy_policies:Gone",
            "policy plugin 'toy' (toy_policies:Gone) cannot be loaded: AttributeError",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "no_such_module:Toy",
            "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'",
            marks=pytest.mark.slow,
        ),
        pytest.param("toy_policies:NoPolicy", "is no subclass of tokgraph.planning.Policy", marks=pytest.mark.slow),
    ],
)
def test_a_broken_plugin_is_an_error_with_a_name(plugin, value, message):
    invoke = plugin(value)
    result = invoke("policies")
    assert result.returncode == 1
    assert "error[TG005]" in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert invoke("--version").returncode == 0

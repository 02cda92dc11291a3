"""What a user sees: exit codes, messages, and which files there are afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tokgraph as tg
from tests import tiny

TINY = str(Path(tiny.__file__))
FOUR = ("--set", "layers=4")
DYNAMIC = ("--set", "dynamic=True")


def test_optimize_writes_plan_report_and_ir(run, tmp_path):
    result = run("optimize", TINY, *FOUR, "--span", "1:3", "--keep", "0.5", "-o", "results")
    assert result.exit_code == 0, result.output
    assert "sharing index 1.000" in result.output
    assert "verified" in result.output
    report = json.loads((tmp_path / "results/report.json").read_text())
    assert report["schema"] == 1
    assert report["policy"] == "shared"
    assert report["sharing_index"] == 1.0
    assert 0 < report["coverage"] < 1
    assert report["verification"]["passed"] is True
    assert report["verification"]["max_output_error"] < 1e-9
    assert report["verification"]["max_gradient_error"] < 1e-9
    for task in ("understanding", "generation"):
        entry = report["tasks"][task]
        assert entry["flops"]["ratio"] == entry["flops"]["after"]["total"] / entry["flops"]["before"]["total"] < 1
        assert entry["drop_overhead"]["operators"] == 5
        assert entry["drop_overhead"]["bytes"].keys() == {"forward", "backward"}
        kept = entry["activation_bytes"]
        assert kept["ratio"] == kept["after"] / kept["before"] < 1
        for when, cost in entry["cost"].items():
            assert cost["total"]["saved"] == kept[when]
            for parts in ("by_region", "by_kind", "by_module"):
                assert sum(work["forward_flops"] for work in cost[parts].values()) == entry["flops"][when]["forward"]
        before, after = (entry["cost"][when]["by_region"]["block 1"] for when in ("before", "after"))
        assert all(after[what] < before[what] for what in ("forward_flops", "backward_flops", "saved"))
        assert entry["tokens_per_block"]["before"] == [6] * 4
        assert entry["tokens_per_block"]["after"][1:3] == [3, 3]
        assert "drop(" in (tmp_path / f"results/ir/{task}.after.txt").read_text()
        assert "drop(" not in (tmp_path / f"results/ir/{task}.before.txt").read_text()
    assert tg.Plan.load(tmp_path / "results/plan.json").sites[0].start == 1


def test_a_plan_file_replays(run, tmp_path):
    assert run("optimize", TINY, *FOUR, "--no-save", "-o", "one").exit_code == 0
    assert run("optimize", TINY, *FOUR, "--plan", "one/plan.json", "--no-save", "-o", "two").exit_code == 0
    for file in ("plan.json", "ir/understanding.after.txt", "ir/generation.after.txt"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_json_is_all_there_is_on_standard_output(run):
    result = run("optimize", TINY, *FOUR, "--json", "--no-save", "-o", "results")
    assert json.loads(result.stdout)["sharing_index"] == 1.0


def test_no_verify_says_so(run, tmp_path):
    result = run("optimize", TINY, *FOUR, "--no-verify", "--no-save", "-o", "results")
    assert result.exit_code == 0
    assert "not verified" in result.output
    assert json.loads((tmp_path / "results/report.json").read_text())["verification"]["passed"] is None


def test_inspect_shows_the_flow(run, tmp_path):
    """As JSON, and in ``facts.json`` with the cost of every node."""
    sizes = ("--at", "batch=8", "--at", "batch=1")
    result = run("inspect", TINY, *DYNAMIC, "--json", *sizes, "--flops-convention", "pdrop", "-o", "results/facts")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["schema"] == 2
    assert [len(facts["tasks"][t]["blocks"]) for t in ("understanding", "generation")] == [3, 3]
    assert facts["tasks"]["understanding"]["visual"]["kind"] == "ids"
    assert facts["tasks"]["generation"]["visual"]["kind"] == "range"
    assert facts["tasks"]["generation"]["visual"]["count"] == 6
    assert facts["shared_parameters"]["elements"] > 0
    assert facts["gradient_cosines"] is None
    for task in facts["tasks"].values():
        example, eight, one = task["cost"]["at"]
        assert [cost["sizes"]["batch"] for cost in (example, eight, one)] == [2, 8, 1]
        assert eight["total"]["forward_flops"] == 4 * example["total"]["forward_flops"] > 0
        assert one["total"]["backward_flops"] == example["total"]["backward_flops"] / 2
        assert example["by_kind"]["visual"]["forward_flops"] < example["total"]["forward_flops"]
        assert example["convention"]["name"] == "pdrop"
        assert task["measured"] is None
    written = json.loads((tmp_path / "results/facts/facts.json").read_text())
    assert written["tasks"]["generation"]["nodes"][0]["node"]
    assert written["shared_parameters"] == facts["shared_parameters"]


def test_inspect_shows_one_sample_beside_the_example(run):
    """Where nothing else is asked for, and the batch is open."""
    facts = json.loads(run("inspect", TINY, *DYNAMIC, "--json").stdout)
    assert [at["sizes"]["batch"] for at in facts["tasks"]["generation"]["cost"]["at"]] == [2, 1]
    facts = json.loads(run("inspect", TINY, *DYNAMIC, "--json", "--at", "batch=3").stdout)
    assert [at["sizes"]["batch"] for at in facts["tasks"]["generation"]["cost"]["at"]] == [2, 3]


@pytest.mark.slow
def test_inspect_shows_the_cost_after_a_plan(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    site = tg.DropSite("understanding", 1, 2, 0.5)
    tg.Plan((site,), exact=True).save(tmp_path / "plan.json")
    arguments = ("inspect", TINY, "--plan", "plan.json", "--flops-convention", "fastv")
    facts = json.loads(run(*arguments, "--json").stdout)
    assert facts["plan"]["sharing_index"] < 1
    for at in facts["tasks"]["understanding"]["cost"]["at"]:
        before, after = (by["by_region"]["block 1"] for by in (at, at["after"]))
        for what in ("forward_flops", "backward_flops", "saved"):
            assert after[what] < before[what]
        assert at["after"]["convention"]["forward_flops"] < at["convention"]["forward_flops"]
    text = run(*arguments).stdout
    assert "understanding: batch 2, 11 tokens, 6 visual, after the plan" in text
    assert f"plan: sharing index {facts['plan']['sharing_index']:.3f}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_inspect_measures_batches_of_a_file(run, tmp_path, monkeypatch):
    """In tables that fit a terminal of 80 columns."""
    tg.save_batches(tmp_path / "batches.safetensors", {t: [dict(x.inputs)] for t, x in five().tasks.items()})
    monkeypatch.setenv("COLUMNS", "80")
    result = run("inspect", TINY, *DYNAMIC, "--at", "batch=4,tokens=12", "--calibrate", "batches.safetensors")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "6 of 11" in text
    for title in (
        "understanding: batch 2, 11 tokens, 6 visual",
        "understanding: batch 4, 12 tokens, 6 visual",
        "generation: batch 4, 12 tokens, 6 visual",
        "understanding: attention to the image, visual rows",
        "pathways: share of the visual tokens",
        "asymmetry: attention to the image",
        "in the first half of the blocks",
        "gradient cosines: understanding, generation",
    ):
        assert title in text
    rows = [line.strip("│ ").split() for line in text.splitlines()]
    assert any(row[:3] == ["blocks", "0-2,", "each"] for row in rows)
    assert any(row[:2] == ["visual", "tokens"] and row[-1].endswith("%") for row in rows)
    for headings in (["forward", "backward", "moved", "kept", "share"], ["whole", "visual", "text"]):
        assert any(row[-len(headings) :] == headings for row in header_rows(text))
    assert max(map(len, text.splitlines())) <= 80


def header_rows(text: str) -> list[list[str]]:
    return [line.replace("┃", " ").split() for line in text.splitlines() if line.startswith("┃")]


def five() -> tg.ModelSpec:
    return tiny.build(batch=5)


def test_inspect_measures_the_example(run):
    result = run("inspect", TINY, "--calibrate", "example", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    for task in facts["tasks"].values():
        assert len(task["measured"]["redundancy"]["cosine"]) == 3
        assert task["measured"]["gradients"]
    assert [c["block"] for c in facts["gradient_cosines"]] == [0, 1, 2]


INSPECT_REFUSED = {
    "no such file": (["nowhere.py"], 2, "no such file: nowhere.py"),
    "size without value": ([TINY, "--at", "batch"], 2, "'batch' is not NAME=VALUE"),
    "size of zero": ([TINY, "--at", "batch=0"], 2, "batch=0 is no positive whole number"),
    "size that is no number": ([TINY, "--at", "tokens=many"], 2, "tokens=many is no positive whole number"),
    "unknown convention": ([TINY, "--flops-convention", "mine"], 2, "'mine' is not one of"),
    "no such plan": ([TINY, "--plan", "plan.json"], 2, "File 'plan.json' does not exist"),
    "no such batches": ([TINY, "--calibrate", "b.safetensors"], 2, "no such file: b.safetensors"),
    "batches of another kind": ([TINY, "--calibrate", TINY], 1, "is no safetensors file"),
    "unknown size": ([TINY, "--at", "pixels=3"], 1, "has no size 'pixels'"),
}


@pytest.mark.parametrize("case", INSPECT_REFUSED)
def test_inspect_refuses(run, tmp_path, case):
    arguments, code, message = INSPECT_REFUSED[case]
    result = run("inspect", *arguments, "-o", "results")
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_policies_are_listed(run):
    listed = json.loads(run("policies", "--json").stdout)["policies"]
    assert {"none", "exact", "shared"} <= set(listed)
    assert listed["shared"]["options"]["keep"]["default"] == 0.5
    assert "shared" in run("policies").output


def test_help_says_what_the_policy_says(run):
    """Descriptions, ranges and choices of the options of `shared` come from the policy."""
    from tokgraph.planning import Shared
    from tokgraph.planning.options import options_of

    shown = " ".join(run("optimize", "--help").output.split())
    for option in options_of(Shared).values():
        if option.name != "mass":  # measured by --calibrate
            assert f"--{option.name.replace('_', '-')}" in shown
            assert option.description[1:] in shown
    assert "[0<=x<=1]" in shown
    assert "[0<x<=1]" in shown
    assert "[hide|freeze]" in shown


REFUSED = {
    "no such file": (["nowhere.py"], 2, "no such file: nowhere.py"),
    "no build": ([f"{TINY}:nothing"], 1, "defines no function 'nothing'"),
    "not a spec": ([f"{TINY}:wrong_type"], 1, "returned int"),
    "missing task input": ([f"{TINY}:missing_input"], 1, "missing a required argument: 'codes'"),
    "unknown argument of build": ([TINY, "--set", "colour=1"], 1, "unexpected keyword argument 'colour'"),
    "malformed --set": ([TINY, "--set", "colour"], 2, "is not NAME=VALUE"),
    "malformed span": ([TINY, "--span", "3"], 2, "is not START:END"),
    "span out of range": (
        [TINY, "--span", "1:9"],
        1,
        "span=(1, 9) is out of range: task 'understanding' has 3 blocks help: give 0 <= start < end <= 2",
    ),
    "span with the last block": (
        [TINY, "--span", "1:3"],
        1,
        "It ends before the last block, whose demanded rows differ from task to task",
    ),
    "empty span": ([TINY, "--span", "2:2"], 1, "span=(2, 2) is out of range"),
    "keep above 1": ([TINY, "--keep", "1.5"], 2, "not in the range 0<=x<=1"),
    "keep below 0": ([TINY, "--keep", "-0.1"], 2, "not in the range 0<=x<=1"),
    "unknown policy": ([TINY, "--policy", "magic"], 2, "'magic' is not one of"),
    "option of another policy": ([TINY, "--policy", "exact", "--keep", "0.5"], 1, "has no option 'keep'"),
    "unknown selector": ([TINY, "--selector", "best"], 1, "selector 'best' is unknown"),
    "selector that looks ahead": ([TINY, "--selector", "norm"], 1, "not causal"),
    "uneven visual tokens": ([TINY, "--set", "uneven=True"], 1, "hold 5 to 6 visual tokens"),
    "convolution over tokens": (
        [TINY, "--set", "token_mixer='conv'"],
        1,
        "aten.conv1d.default mixes neighbouring tokens",
    ),
    "running sum over tokens": ([TINY, "--set", "token_mixer='cumsum'"], 1, "runs along the token axis"),
    "operator without a rule": (
        [TINY, "--set", "token_mixer='unruled'"],
        1,
        "renorm.default has no token-axis rule",
    ),
    "data-dependent branch": ([TINY, "--set", "branch=True"], 1, "branches on the value of a tensor"),
    "plan and policy": ([TINY, "--plan", __file__, "--policy", "exact"], 2, "exclude each other"),
    "no such plan": ([TINY, "--plan", "p.json"], 2, "File 'p.json' does not exist"),
}


SLOW = ("running sum over tokens", "operator without a rule")  # as the convolution, which is in the default run


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in REFUSED])
def test_bad_input_is_refused_and_leaves_nothing(run, tmp_path, case):
    arguments, code, message = REFUSED[case]
    result = run("optimize", *arguments, "-o", "results")
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mixer", ["conv", pytest.param("unruled", marks=pytest.mark.slow)])
def test_an_illegal_rewrite_names_the_place(run, mixer):
    message = run("optimize", TINY, "--set", f"token_mixer={mixer}", "-o", "results").stderr
    assert "error[TG006]" in message
    assert "tests/tiny.py:" in message
    assert "module: layers.1" in message
    assert "help:" in message


PLANS = {
    "corrupt": ("{", "is not JSON"),
    "foreign": ('{"a": 1}', "is not a tokgraph plan"),
    "another schema": ('{"kind": "tokgraph.plan", "schema": 7}', "plan schema 7"),
    "unknown field": ('{"kind": "tokgraph.plan", "schema": 1, "speed": 11}', "speed"),
    "unknown task": (
        '{"kind": "tokgraph.plan", "schema": 1, "sites": [{"task": "video", "start": 0}]}',
        "task 'video', which the model does not have",
    ),
    "span of another model": (
        '{"kind": "tokgraph.plan", "schema": 1, "sites": [{"task": "generation", "start": 0, "end": 30}]}',
        "the task has 3 blocks",
    ),
    "keep out of range": (
        '{"kind": "tokgraph.plan", "schema": 1, "sites": [{"task": "generation", "start": 0, "keep": 2}]}',
        "outside [0, 1]",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_bad_plan_file_is_refused(run, tmp_path, case):
    text, message = PLANS[case]
    (tmp_path / "plan.json").write_text(text)
    result = run("optimize", TINY, "--plan", "plan.json", "-o", "results")
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "results").exists()


def test_a_failed_verification_exits_3_and_writes_nothing(run, tmp_path, monkeypatch):
    from tokgraph.calls import rewritten

    broken = rewritten.rewrite_passes

    def keep_too_few(facts, sites, exact):
        from dataclasses import replace

        return broken(facts, [replace(site, keep=site.keep / 2) for site in sites], exact)

    monkeypatch.setattr(rewritten, "rewrite_passes", keep_too_few)
    result = run("optimize", TINY, *FOUR, "-o", "results")
    assert result.exit_code == 3
    assert "differs from the oracle" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_result_survives_a_failed_run(run, tmp_path):
    assert run("optimize", TINY, *FOUR, "-o", "results").exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()}
    assert run("optimize", TINY, *FOUR, "--span", "1:9", "-o", "results").exit_code == 1
    assert {p: p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_a_model_without_storage_is_planned_but_not_verified(run, tmp_path):
    (tmp_path / "meta.py").write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(TINY).parent.parent)!r})\n"
        "from tests import tiny\n"
        "import tokgraph as tg\n"
        "def build():\n"
        "    spec = tiny.build(layers=4)\n"
        "    return tg.ModelSpec(spec.model.to('meta'), spec.tasks)\n"
    )
    refused = run("optimize", "meta.py", "-o", "results")
    assert refused.exit_code == 3
    assert "meta device" in refused.stderr
    assert not (tmp_path / "results").exists()
    assert run("optimize", "meta.py", "--no-verify", "-o", "results").exit_code == 0
    assert json.loads((tmp_path / "results/report.json").read_text())["sharing_index"] == 1.0

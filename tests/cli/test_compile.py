"""``tokgraph optimize --compile``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny

OPTIMIZE = (
    "optimize",
    str(Path(tiny.__file__)),
    "--set",
    "layers=2",
    "--policy",
    "exact",
    "--no-save",
    "-o",
    "results",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_report_says_how_the_compiled_step_agrees(run, tmp_path):
    result = run(*OPTIMIZE, "--compile", "--compile-by", "block")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results/report.json").read_text())["compilation"]
    assert (found["mode"], found["by"], found["passed"]) == ("default", "block", True)
    assert found["tasks"]["understanding"]["output_error"] < 1e-5
    assert "understanding: compiled in " in result.stdout


@pytest.mark.parametrize("wrong", [("--compile-by", "block"), ("--compile", "fastest"), ("--compile=fastest",)])
def test_wrong_usage(run, wrong):
    assert run(*OPTIMIZE, *wrong).exit_code == 2

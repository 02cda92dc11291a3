"""Accelerate and the trainer of transformers, two processes: the parameters of a loop by hand, and the model's keys in files."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_processes import run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    for name in ("accelerate", "transformers"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("trainers") / "2"
    return run(folder, 2, "accelerate", "accelerate-fsdp2", "trainer", worker="trainers")


@pytest.mark.parametrize("name", ["accelerate", "accelerate-fsdp2", "trainer"])
def test_steps_are_those_of_a_loop_by_hand(name: str, found: dict[str, Any]) -> None:
    """Both tasks in each step, thinned, accumulated and clipped; AdamW, float64."""
    assert found[name]["parameters"] < 1e-12
    assert found[name]["saved"] == 0
    assert found[name].get("keys", True)
    assert found[name].get("resumed", 0) < 1e-12

"""Several processes train an accelerated program: the same losses and parameters as one. Gloo, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tokgraph as tg
from tests.distributed.programs import KINDS, POLICIES, program, trained, work
from tests.distributed.worker import flat, furthest, state, train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]
MORE = (*KINDS, "compiled", "phases", "resumed-random", "resumed-own", "mixed", "region")


def run(folder: Path, world: int, *cells: str, worker: str = "worker") -> dict[str, Any]:
    """What the first of some processes found; all of them must have ended well."""
    folder.mkdir()
    command = [sys.executable, "-m", f"tests.distributed.{worker}", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(world):
        with (folder / f"{rank}.out").open("w") as out:
            each = [*command, str(rank), str(world), *cells]
            running.append(subprocess.Popen(each, stdout=out, stderr=subprocess.STDOUT, env=environment))
    codes = [process.wait(timeout=900) for process in running]
    assert codes == [0] * world, (folder / f"{codes.index(max(codes, key=abs))}.out").read_text()[-3000:]
    found: dict[str, Any] = json.loads((folder / "0.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """One pair of processes for all cells: to begin takes longer than any of them."""
    return run(folder / "2", 2, *POLICIES, *MORE)


@pytest.fixture(scope="module")
def four(two: dict[str, Any], folder: Path) -> dict[str, Any]:
    return run(folder / "4", 4, "shared", "reloaded")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("feature", ["one", "ddp", "fsdp2"])
def test_the_table(feature: str, policy: str, two: dict[str, Any]) -> None:
    """Three steps of both tasks everywhere, then three of one task a process, in turn; clipped, AdamW."""
    found = two[f"{policy}/{feature}"]
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", ["one", "ddp", "fsdp2"])
def test_what_models_are_like(feature: str, kind: str, two: dict[str, Any]) -> None:
    """As in the table, with blocks computed again: tied, frozen, adapted, own projections of all of these together."""
    found = two[f"{kind}/{feature}"]
    assert max(found.values()) < 1e-12, found


def test_own_projections_in_autocast(two: dict[str, Any]) -> None:
    """Sharded, computed again: as one process in the region, but for the order in which bf16 gradients are added up."""
    assert two["region"]["split"] < 1e-2
    assert two["region"]["moved"] > 0.1


@pytest.mark.parametrize("feature", ["one", "ddp", "fsdp2"])
def test_plans_one_after_the_other(feature: str, two: dict[str, Any]) -> None:
    """``none``, ``random-ltd``, ``himix`` with own projections, and ``none`` again, two steps each, one task a process."""
    found = two[f"phases/{feature}"]
    assert max(found.values()) < 1e-12, found


def test_compiled_blocks_are_sharded(two: dict[str, Any]) -> None:
    """Computed again as well; what is equal in both tasks is compiled once, and not again for sharded parameters."""
    assert two["compiled"]["split"] < 1e-12
    assert two["compiled"]["functions"] == 10


def test_types_of_parameters(two: dict[str, Any]) -> None:
    """bf16 in the forward, float32 to learn: as the user's own forward under FSDP2."""
    assert two["mixed"] == {"gradients": pytest.approx(0, abs=1e-2), "float32": 1}


@pytest.mark.parametrize("policy", ["random-ltd", "himix", *KINDS])
def test_checkpoints_of_two(policy: str, two: dict[str, Any]) -> None:
    found = two[f"{policy}/resumed"]
    assert found["more"] == {"step": 2}
    assert found["keys"]
    assert max(found["alone"], found["sharded"]) < 1e-12


@pytest.mark.parametrize("policy", ["random-ltd", "himix", "own-of-all"])
def test_one_goes_on(policy: str, two: dict[str, Any], folder: Path) -> None:
    name, change = KINDS.get(policy, (policy, lambda model: None))
    acc = program(name, change=change)
    module = acc.module()
    optimizer = torch.optim.AdamW(trained(module), 1e-2)
    more = tg.distributed.load(folder / "2" / "checkpoints" / policy, module, optimizer)
    tasks = list(acc)
    train(acc, flat(acc), optimizer, range(more["step"], 4), lambda step: [work(step, r, True, tasks) for r in (0, 1)])
    assert furthest(state(acc), torch.load(folder / "2" / f"{policy}.pt")) < 1e-12


def test_four(four: dict[str, Any]) -> None:
    """Two copies of two shards; and what two processes saved goes on in four."""
    for feature in ("one", "ddp", "fsdp2"):
        assert max(four[f"shared/{feature}"].values()) < 1e-12
    assert four["random-ltd/reloaded"]["sharded"] < 1e-12

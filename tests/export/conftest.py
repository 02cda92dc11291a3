"""Exports that tests share: one takes seconds, so each is made once a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tokgraph as tg
from tests.harness import captured_tiny

onnx = pytest.importorskip("onnx")


@dataclass(frozen=True)
class Exported:
    """A program, the folder it was exported to, and what the export said."""

    accelerated: tg.Accelerated
    folder: Path
    files: Mapping[str, Any]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """``(policy) -> Exported``: the tiny model, both tasks, forward and training step."""

    @cache
    def export(policy: str) -> Exported:
        captured = captured_tiny(3, dynamic=True)
        plan = tg.make_plan(captured.program, policy, facts=captured.facts)
        accelerated = tg.apply(captured.program, plan, facts=captured.facts)
        folder = tmp_path_factory.mktemp("onnx") / policy
        found = accelerated.export_onnx(folder)
        return Exported(accelerated, folder, found["files"])

    return lambda policy="shared": export(policy)


def run_file(path: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a file in ONNX Runtime, without any code of ours."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {x.name for x in session.get_inputs()}
    found = session.run(None, {name: x.numpy() for name, x in inputs.items() if name in names})
    return {x.name: torch.from_numpy(y) for x, y in zip(session.get_outputs(), found, strict=True)}

"""What ``export``, ``profile`` and ``run`` share: a target that is a model file or a folder of results, and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from tokgraph.errors import DependencyError
from tokgraph.ir.plan import Plan
from tokgraph.ir.program import is_meta
from tokgraph.runtime import Accelerated
from tokgraph.stages import optimize
from tokgraph.store.batches import EXAMPLE, read_batches
from tokgraph.store.loading import load_accelerated
from tokgraph.store.manifest import MANIFEST

from .common import chosen_options, load_model

Batches = dict[str, list[dict[str, Any]]]


def is_folder(target: str) -> bool:
    """Whether the target is a folder of results."""
    return Path(target).is_dir()


def holds_program(folder: Path) -> bool:
    """Whether a folder holds a saved program."""
    return (folder / MANIFEST).exists()


def holds_onnx(folder: Path) -> bool:
    """Whether a folder holds exported graphs."""
    return any(folder.glob("*.onnx"))


def accelerated_program(
    target: str,
    settings: tuple[str, ...],
    policy: str | None,
    plan_file: Path | None,
    verify: bool,
    options: dict[str, Any],
    stage: Callable[[str], None],
    device: str | None = None,
) -> Accelerated:
    """The program of a target: loaded from a folder, or made from a model file by a policy or a plan.

    ``device``: where to put the model, ``None``: where it is made.
    """
    given = chosen_options(options)
    if is_folder(target):
        if settings or policy or plan_file or given:
            raise click.UsageError(
                f"{target} is a saved program: --set, --policy, --plan and policy options are for models"
            )
        stage("load")
        loaded = load_accelerated(target)
        move(loaded.model, device)
        return loaded
    if plan_file is not None and (policy is not None or given):
        raise click.UsageError("--plan excludes --policy and its options")
    stage("load")
    spec = load_model(target, settings)
    move(spec.model, device)
    chosen: str | Plan = Plan.load(plan_file) if plan_file is not None else policy or "shared"
    return optimize(spec, chosen, verify=verify, progress=stage, **given)


def move(model: nn.Module, device: str | None) -> None:
    """Put a model on a device; one without storage has nothing to put there.

    Raises:
        DependencyError: PyTorch has no such device here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DependencyError("PyTorch finds no CUDA device", help="use --device cpu, or a CUDA build of PyTorch")
    if device is not None and not is_meta(model):
        model.to(device)


def batches_in(path: Path) -> Batches:
    """The batches in a file."""
    return dict(read_batches(path))


def example_of(folder: Path) -> Batches:
    """The example batches in a folder of results."""
    return batches_in(folder / EXAMPLE)


def names(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """``forward,train-step`` -> its parts."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise click.BadParameter("name at least one")
    return found

"""Checking exported files: valid ONNX, and the same loss, outputs and gradients in ONNX Runtime as in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokgraph.errors import ExportError
from tokgraph.ir.distance import relative_distance
from tokgraph.ir.program import TaskGraph
from tokgraph.passes.lower import Lowered

from .reference import Reference
from .session import Session
from .wide import widened

TOLERANCE = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-4), torch.float16: (1e-2, 5e-2)}
"""Type computed in -> largest relative difference that passes, of outputs and of gradients."""
NOISE = 1e-6
"""Gradients this much smaller than the largest are compared with that floor: many are zero but for rounding."""
_ROUNDINGS = 8
"""Roundings of the largest gradient that may be all there is of another one, as that of a key's bias under softmax."""
_APART = 64
"""How much further ONNX Runtime may be from a gradient than PyTorch's own rounding takes it, which a run in float64 shows."""


@dataclass(frozen=True)
class Check:
    """What a comparison of one file on one batch found; errors are relative, ``max |a - b| / max |b|``.

    Args:
        sizes: sizes of the batch's open dimensions, by name; empty for the example batch of a graph without any.
        output_error: loss and outputs.
        gradient_error: gradients, and updated parameters.
        worst: the output with the largest error in terms of its tolerance.
        dtype: the type computed in.
    """

    sizes: dict[str, int]
    output_error: float
    gradient_error: float
    worst: str
    dtype: str


def check_file(
    path: Path,
    lowered: Lowered,
    graph: TaskGraph,
    batches: Iterable[tuple[Mapping[str, Any], dict[str, int]]],
    reference: Reference,
) -> list[Check]:
    """Check an exported file against the program that it was made from.

    Args:
        path: the file; its weights lie beside it.
        lowered: the lowered graph: names of inputs and outputs.
        graph: the task's graph.
        batches: batches with the sizes of their open dimensions.
        reference: computes what the outputs should be, in PyTorch.

    Raises:
        ExportError: the file is not valid, does not run, lacks an output, or disagrees.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
    there = {x.name for x in onnx.load(path, load_external_data=False).graph.output}
    missing = [name for name in reference.names(lowered.kind) if name not in there]
    if missing:
        raise ExportError(
            f"{path.name} lacks the output {missing[0]!r}", help="please report this: the export lost an output"
        )
    with widened(path) as (runnable, dtype):
        session = Session(runnable)
        return [_check(session, lowered, graph, batch, sizes, reference, dtype) for batch, sizes in batches]


def _check(
    session: Session,
    lowered: Lowered,
    graph: TaskGraph,
    batch: Mapping[str, Any],
    sizes: dict[str, int],
    reference: Reference,
    dtype: torch.dtype | None,
) -> Check:
    expected = reference.expected(lowered.kind, batch, dtype)
    computed = dtype or reference.dtype
    inputs = lowered_inputs(lowered, graph, batch)
    if dtype is not None:
        inputs = {k: x.to(dtype) if x.dtype is torch.bfloat16 else x for k, x in inputs.items()}
    found = session.run(session.feeds(inputs))
    limits = TOLERANCE.get(computed, TOLERANCE[torch.float32])
    values = expected.values
    scale = max((float(x.abs().max()) for n, x in values.items() if _is_gradient(n) and x.numel()), default=0.0)
    errors, worst, most = {False: 0.0, True: 0.0}, "", -1.0
    exact: Mapping[str, torch.Tensor] | None = None
    for name, wanted in values.items():
        gradient, got = _is_gradient(name), found[name]
        if name in expected.unsettled and got.shape == wanted.shape:
            got = torch.where(expected.unsettled[name].cpu(), wanted.cpu(), got)
        error = relative_distance(got, wanted, NOISE * scale if gradient else 0.0)
        if gradient and not error <= limits[True] and computed is not torch.float64:
            exact = exact or reference.expected(lowered.kind, batch, torch.float64).values
            floor = _rounding(wanted, exact[name], scale) / limits[True]
            error = relative_distance(got, wanted, max(NOISE * scale, floor))
        share = error / limits[gradient]
        if not share <= most:
            worst, most = name, share
        if not error <= errors[gradient]:
            errors[gradient] = error
        if not share <= 1:
            raise ExportError(
                f"{session.path.name}: {name} differs between ONNX Runtime and PyTorch by {error:.1e} "
                f"(tolerance {limits[gradient]:.0e}, {_described(sizes)})",
                help=f"nothing was written; {_cause(lowered)}",
            )
    return Check(sizes, errors[False], errors[True], worst, str(computed).removeprefix("torch."))


def _cause(lowered: Lowered) -> str:
    """What to do about a difference."""
    if any(node.target is torch.ops.aten.topk.default for node in lowered.module.graph.nodes):
        return (
            "the graph chooses the largest of some values (topk): of equal ones, as zeros behind a ReLU, PyTorch takes any and "
            "ONNX Runtime the first; if this batch has none, please report this"
        )
    return "please report this: an export that is not refused must agree"


def _rounding(wanted: torch.Tensor, exact: torch.Tensor, scale: float) -> float:
    """How far apart rounding alone may take two computations of a gradient that cancels out, or nearly so.

    Args:
        wanted: the gradient as PyTorch computes it.
        exact: the same in float64.
        scale: the largest gradient of the step.
    """
    own = float((wanted.detach().double() - exact.detach().to(wanted.device)).abs().max())
    return min(_ROUNDINGS * torch.finfo(wanted.dtype).eps * scale, _APART * own)


def lowered_inputs(lowered: Lowered, graph: TaskGraph, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Name -> tensor of every input of a lowered graph, from a batch of the task."""
    leaves = [x for x in graph.flatten(batch) if isinstance(x, torch.Tensor)]
    return {**dict(zip(lowered.inputs, leaves, strict=False)), **lowered.initial}


def _is_gradient(name: str) -> bool:
    return name.startswith(("grad/", "new_"))


def _described(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "example batch"

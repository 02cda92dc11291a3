"""The parts of a sequence between which attention is measured: system text, image, instruction, output, and the rest.

Source: the segments are those of arXiv 2606.01503's analysis of attention allocation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from tokgraph.errors import SpecError
from tokgraph.ir.evaluate import actual_size, evaluate
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import argument, axis_argument, by_name
from tokgraph.ir.program import TaskGraph
from tokgraph.passes.analysis.axes import AxisClasses
from tokgraph.passes.analysis.loss_rows import LossRows, loss_rows
from tokgraph.passes.analysis.visual import visual_mask
from tokgraph.passes.rules.registry import first_input

from .batch import on_batch

DERIVED = ("system", "image", "instruction", "output", "other")
"""Names of the segments of a task that declares none."""
OTHER = "other"
"""Name of the segment of what belongs to no other one."""


def find_segments(
    graph: TaskGraph, facts: TaskFacts, batch: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Segments of a batch, ``{name: [batch, tokens] bool}`` on the CPU; every position is in exactly one.

    Those that the task declares (``Task.segments``), and ``"other"`` for positions in none of them. Else:

    - ``image``: the visual tokens;
    - ``output``: other tokens that the loss has a label for: row ``i`` of the targets labels token ``i + 1``;
    - ``system``: unlabelled text before the sample's first visual token, unless the task reads visual tokens: there it is
      the instruction;
    - ``other``: unlabelled text after the sample's first output token (padding, mostly);
    - ``instruction``: all other text. Where no labels can be found, because the loss is none that is understood, that is
      all text after the image, the answer among it.

    Padding *before* the text cannot be told from text: declare segments where there is some.

    Args:
        graph: the captured task graph.
        facts: its facts.
        batch: inputs by name; ``None``: the example batch.

    Raises:
        AnalysisError: the model is on the meta device.
        BatchError: the batch does not fit the graph.
        SpecError: declared segments overlap, or are not ``[batch, tokens]`` bool.
    """
    graph = on_batch(graph, batch)
    visual = visual_of(graph, facts)
    if graph.task.segments is not None:
        return _declared(graph, visual.shape)
    output = labelled(graph, facts, visual.shape) & ~visual
    system = ~visual & ~output & _before_first(visual)
    if graph.task.reads == "visual":
        system = torch.zeros_like(visual)
    rest = ~visual & ~output & ~system
    other = rest & (output.cumsum(1) > 0)
    return dict(zip(DERIVED, (system, visual, rest & ~other, output, other), strict=True))


def visual_of(graph: TaskGraph, facts: TaskFacts) -> torch.Tensor:
    """``[batch, tokens]`` bool on the CPU: the visual tokens of the task's inputs."""
    entry = next(node for node in graph.graph.nodes if node.name == facts.entry)
    return visual_mask(graph, facts.visual, entry).cpu()


def _before_first(visual: torch.Tensor) -> torch.Tensor:
    """Positions before the first true one of their row; none in a row without."""
    return (visual.cumsum(1) == 0) & visual.any(1, keepdim=True)


def labelled(graph: TaskGraph, facts: TaskFacts, shape: torch.Size) -> torch.Tensor:
    """``[batch, tokens]`` bool on the CPU: tokens that a cross entropy of the task has a label for, none if none is found.

    Args:
        graph: the task graph, its inputs the batch.
        facts: its facts.
        shape: ``(batch, tokens)``.
    """
    classes = AxisClasses(graph.graph)
    found = torch.zeros(shape, dtype=torch.bool)
    for node in graph.graph.nodes:
        rows = loss_rows(node)
        first = None if rows is None else _first_row(graph, facts, classes, rows)
        if rows is None or first is None:
            continue
        targets = evaluate(graph, [rows.targets])[0].cpu()
        sample, row = (targets != argument(node, "ignore_index", -100)).nonzero(as_tuple=True)
        token = row + first + 1
        inside = token < shape[1]
        found[sample[inside], token[inside]] = True
    return found


def _first_row(graph: TaskGraph, facts: TaskFacts, classes: AxisClasses, rows: LossRows) -> int | None:
    """The position in the stream of the first row of a loss, ``None`` when its rows are not followed to the stream."""
    nodes = by_name(graph.graph)
    mine = (rows.logits, rows.axis)
    if classes.same(mine, (nodes[facts.stream[-1]], 1)):
        return 0
    for window in facts.windows:
        node = nodes[window.node]
        axis = axis_argument(node, node)
        if classes.same(mine, (node, axis)):
            return _start(graph, node, axis)
    return None


def _start(graph: TaskGraph, node: fx.Node, axis: int) -> int:
    """The first position that a slice takes."""
    bound = argument(node, "start") or 0
    start = int(evaluate(graph, [bound])[0]) if isinstance(bound, fx.Node) else int(bound)
    size = actual_size(graph, first_input(node), axis)
    return slice(start, None).indices(size)[0]


def _declared(graph: TaskGraph, shape: torch.Size) -> dict[str, torch.Tensor]:
    declare = graph.task.segments
    assert declare is not None
    beside = () if graph.precomputed is None else graph.precomputed.names
    given = declare(**{key: x for key, x in graph.task.inputs.items() if key not in beside})
    if not isinstance(given, Mapping):
        raise SpecError(
            f"task {graph.name!r}: segments must return a mapping, got {type(given).__name__}",
            help="return {name: [batch, tokens] bool tensor}",
        )
    taken: dict[str, torch.Tensor] = {}
    for name, mask in given.items():
        if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool or mask.shape != shape:
            is_a = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise SpecError(
                f"task {graph.name!r}: segment {name!r} is {is_a}, not torch.bool {tuple(shape)}",
                help="give one boolean a position of the residual stream, image tokens included",
            )
        _refuse_overlap(graph, str(name), mask.cpu(), taken)
        taken[str(name)] = mask.cpu()
    covered = torch.stack([torch.zeros(shape, dtype=torch.bool), *taken.values()]).any(0)
    return {**taken, OTHER: taken.get(OTHER, torch.zeros_like(covered)) | ~covered}


def _refuse_overlap(graph: TaskGraph, name: str, mask: torch.Tensor, taken: Mapping[str, torch.Tensor]) -> None:
    for other, there in taken.items():
        if (mask & there).any():
            sample, position = (mask & there).nonzero()[0].tolist()
            raise SpecError(
                f"task {graph.name!r}: segments {other!r} and {name!r} overlap (sample {sample}, position {position})",
                help="a position belongs to one segment: take it out of one of the masks",
            )

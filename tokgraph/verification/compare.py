"""Comparing a rewritten graph with the oracle: outputs, loss, and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tokgraph.ir.distance import relative_distance
from tokgraph.ir.evaluate import evaluate, example_leaves
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.interpreter import GraphInterpreter, in_dtype
from tokgraph.ir.node import by_name, output_args
from tokgraph.ir.plan import DropSite
from tokgraph.ir.program import TaskGraph, cuda_devices, loss_node, model_device
from tokgraph.passes.analysis.visual import visual_mask

from .oracle import Oracle, demanded_rows

NOISE = 1e-6
"""Gradients this much smaller than the largest are compared with that floor: many are zero but for rounding."""


@dataclass(frozen=True)
class Results:
    """What one run gives.

    Args:
        outputs: the graph's flat outputs.
        gradients: parameter or trained input -> gradient of the loss, zero where the loss does not depend on it.
        buffers: buffer name -> value afterwards, of those that the graph writes.
    """

    outputs: list[Any]
    gradients: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """The largest relative difference found, and where.

    Args:
        error: ``max |a - b| / max |b|``.
        where: output leaf or parameter name.
    """

    error: float
    where: str


def run_rewritten(graph: TaskGraph, dtype: torch.dtype) -> Results:
    """Run a task graph on its example batch, with gradients."""
    return _run(GraphInterpreter(graph.graph_module, *in_dtype(dtype, graph.graph_module)), graph)


def run_oracle(
    graph: TaskGraph,
    facts: TaskFacts,
    sites: Sequence[DropSite],
    dtype: torch.dtype,
    step: int = 0,
    own: Mapping[str, torch.Tensor] | None = None,
) -> Results:
    """Run the undropped graph with the semantics of ``sites`` on its example batch, with gradients.

    Args:
        graph: the captured graph.
        facts: its facts.
        sites: resolved drop sites.
        dtype: the type to compute in.
        step: training steps so far, which random choices depend on.
        own: name -> parameter that the rewritten graph adds to the model's.
    """
    device = model_device(graph.graph_module)
    nodes = by_name(graph.graph)
    visual = visual_mask(graph, facts.visual, nodes[facts.entry]).to(device)
    prompt = _prompt_ends(graph, facts) if any(s.selector == "attention" for s in sites) else None
    maps = in_dtype(dtype, graph.graph_module)
    return _run(Oracle(graph, facts, sites, visual, *maps, prompt=prompt, step=step, own=own), graph)


def _prompt_ends(graph: TaskGraph, facts: TaskFacts) -> list[int]:
    """Position of each sample's last prompt token: the row whose label is the first of the sample."""
    assert facts.prompt is not None
    nodes = by_name(graph.graph)
    ends = []
    for row in evaluate(graph, [nodes[facts.prompt.targets]])[0].tolist():
        labelled = [i for i, label in enumerate(row) if label != facts.prompt.ignore_index]
        ends.append(facts.prompt.first + (labelled[0] if labelled else len(row) - 1))
    return ends


def _run(interpreter: GraphInterpreter, graph: TaskGraph) -> Results:
    trained = {name: node.target for name, node in graph.trained_nodes().items()}
    interpreter.trained = set(trained.values())
    # what a model draws itself (noise), it draws alike in every run
    with torch.random.fork_rng(cuda_devices(graph.graph_module)):
        torch.manual_seed(0)
        outputs = list(interpreter.run(*example_leaves(graph)))
    loss = outputs[output_args(graph.graph).index(loss_node(graph))]
    held = {name: x for name, x in interpreter.attributes.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    held |= {name: interpreter.inputs[target] for name, target in trained.items()}
    found: Sequence[torch.Tensor | None] = [None] * len(held)  # of a loss that nothing trains
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(held.items(), found, strict=True)
    }
    return Results(
        [x.detach() if isinstance(x, torch.Tensor) else x for x in outputs], gradients, interpreter.written()
    )


def compare_outputs(rewritten: TaskGraph, mine: Results, reference: Results) -> Difference:
    """The largest relative difference over the task's outputs, at the rows that the rewritten graph returns, and over the
    buffers that it writes.

    Outputs that are no floating-point numbers must be equal.
    """
    at_rows = list(reference.outputs)
    for leaf, position in rewritten.compact_outputs.items():
        rows, b = mine.outputs[position], at_rows[leaf]
        at_rows[leaf] = b[torch.arange(len(b), device=b.device).unsqueeze(1), rows]
    return compare_values(mine, replace(reference, outputs=at_rows), rewritten.out_spec.num_leaves)


def compare_values(mine: Results, reference: Results, count: int) -> Difference:
    """The largest relative difference over the first outputs, rows by rows, and over the buffers that are written."""
    worst = Difference(0.0, "")
    for leaf in range(count):
        a, b = mine.outputs[leaf], reference.outputs[leaf]
        if isinstance(a, torch.Tensor):
            worst = max(worst, Difference(relative_distance(a, b), f"output {leaf}"), key=badness)
        elif a != b:
            worst = max(worst, Difference(float("inf"), f"output {leaf}"), key=badness)
    for name, b in reference.buffers.items():
        a = mine.buffers.get(name)
        error = float("inf") if a is None else relative_distance(a, b)
        worst = max(worst, Difference(error, f"buffer {name}"), key=badness)
    return worst


def missing_rows(rewritten: TaskGraph, mine: Results, reference: Results, facts: TaskFacts) -> Difference:
    """An infinite difference at the first compact output that leaves out a demanded row, none where there is no such.

    Outputs of another length than the token axis are not judged: which rows those are, the graph says and not the facts.
    """
    stream = next(node for node in rewritten.graph.nodes if node.name in (facts.entry, facts.visual.entry))
    demanded = demanded_rows(visual_mask(rewritten, facts.visual, stream, facts.demand.tokens), facts.demand.reads)
    for leaf, position in rewritten.compact_outputs.items():
        if reference.outputs[leaf].shape[1] == facts.demand.tokens:
            there = torch.zeros_like(demanded).scatter(1, mine.outputs[position].cpu(), True)
            if (demanded & ~there).any():
                return Difference(float("inf"), f"output {leaf}")
    return Difference(0.0, "")


def compare_gradients(mine: Results, reference: Results, noise: float = NOISE) -> Difference:
    """The largest relative difference over the gradients of all parameters.

    Args:
        mine: a run.
        reference: another one.
        noise: gradients this much smaller than the largest are compared with that floor.
    """
    scale = max((float(g.abs().max()) for g in reference.gradients.values() if g.numel()), default=0.0)
    worst = Difference(0.0, "")
    for name in reference.gradients.keys() | mine.gradients.keys():
        a, b = mine.gradients.get(name), reference.gradients.get(name)
        a, b = torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b  # type: ignore[arg-type]
        worst = max(worst, Difference(relative_distance(a, b, noise * scale), name), key=badness)
    return worst


def badness(difference: Difference) -> tuple[float, str]:
    """Orders differences; a NaN is worse than any number."""
    return (float("inf") if difference.error != difference.error else difference.error, difference.where)

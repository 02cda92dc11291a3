"""Verification: the accelerated program against the oracle, keep-all against the captured graph, capture against eager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tokgraph.errors import VerificationError
from tokgraph.ir.facts import Facts, TaskFacts
from tokgraph.ir.names import STEP
from tokgraph.ir.node import output_args, where
from tokgraph.ir.plan import DropSite, Plan
from tokgraph.ir.program import Program, TaskGraph, is_meta, loss_node, model_device
from tokgraph.ir.tensors import held
from tokgraph.ir.verification import TOLERANCE, TaskVerification, Verification
from tokgraph.passes.analyze import analyze
from tokgraph.passes.capture.autocast import in_autocast
from tokgraph.passes.pipeline import Pipeline
from tokgraph.passes.rewrite.realise import rewrite_passes
from tokgraph.runtime import Accelerated

from .compare import Results, badness, compare_gradients, compare_outputs, missing_rows, run_oracle, run_rewritten


def verify(
    program: Program | Accelerated, accelerated: Accelerated | None = None, *, dtype: torch.dtype | None = None
) -> Verification:
    """Compare an accelerated program with the oracle on the tasks' example batches: outputs, loss, all gradients.

    Args:
        program: the accelerated program, or the captured one that it was made from.
        accelerated: the accelerated program, where the captured one comes first.
        dtype: the type to compute in; default: float64, which tells a wrong rewrite from rounding.

    Raises:
        VerificationError: the model has no values to compare (it is on the meta device), or the accelerated program was
            made from another one.
        FileError: the program was loaded, and saved without its baseline.
    """
    found = program if accelerated is None else accelerated
    if isinstance(found, Program):
        raise TypeError("give the accelerated program: verify(accelerated), or verify(program, accelerated)")
    if is_meta(found.model):
        raise VerificationError(
            "the model is on the meta device, so there are no values to compare",
            help="build the model with storage, or skip verification (--no-verify) and verify a smaller size",
        )
    dtype = torch.float64 if dtype is None else dtype
    with torch.inference_mode(False):  # gradients are compared, whatever the caller's mode
        return _verify(found, program, dtype)


def _verify(found: Accelerated, program: Program | Accelerated, dtype: torch.dtype) -> Verification:
    facts, plan = _facts_for(found, program), found.plan
    captured = facts.program
    with in_autocast(None, model_device(found.model).type):
        tasks = {
            name: _verify_task(captured[name], graph, facts[name], plan, dtype) for name, graph in found.program.items()
        }
    limits = [graph.check.tolerance for graph in captured.values() if graph.check is not None]
    return Verification(tasks, dtype, TOLERANCE[dtype], max(limits, default=TOLERANCE[dtype]))


def _facts_for(accelerated: Accelerated, captured: Program | Accelerated) -> Facts:
    """Facts of the captured program to compare with: the one given, where it is the program's own or the program was loaded."""
    if not isinstance(captured, Program):
        return accelerated.facts
    if accelerated.loaded:  # it knows no captured program but, at most, a copy
        return analyze(captured)
    own = accelerated.facts.program
    if any(own.get(name) is not graph for name, graph in captured.items()):
        raise VerificationError(
            "the accelerated program was made from another program than the one given",
            help="give the program that it was made from, or none: verify(accelerated)",
        )
    return accelerated.facts


def _verify_task(
    captured: TaskGraph, rewritten: TaskGraph, facts: TaskFacts, plan: Plan, dtype: torch.dtype
) -> TaskVerification:
    sites = plan.for_task(facts.name)
    plain = run_rewritten(captured, dtype)
    _require_finite_loss(captured, plain)
    mine, reference = run_rewritten(rewritten, dtype), _by_oracle(captured, rewritten, facts, sites, dtype)
    output = max(
        missing_rows(rewritten, mine, reference, facts), compare_outputs(rewritten, mine, reference), key=badness
    )
    gradient = compare_gradients(mine, reference)
    everything = [replace(site, keep=1.0, projections="shared") for site in sites]
    kept = Pipeline(rewrite_passes(facts, everything, plan.exact)).run_task(captured, facts)
    whole = run_rewritten(kept, dtype)
    errors = [compare_outputs(kept, whole, plain).error, compare_gradients(whole, plain).error]
    identity = float(torch.tensor(errors, dtype=torch.float64).max())  # unlike Python's max, a NaN stays
    return TaskVerification(
        output.error, gradient.error, output.where, gradient.where, identity, _capture_error(captured)
    )


def _require_finite_loss(captured: TaskGraph, plain: Results) -> None:
    """Refuse an example batch that shows nothing: its loss is no number before anything is dropped."""
    loss = plain.outputs[output_args(captured.graph).index(loss_node(captured))]
    if not bool(loss.isfinite()):
        raise VerificationError(
            f"task {captured.name!r}: the loss of the example batch is {float(loss)} without any plan, so there is nothing to "
            "compare",
            where=where(loss_node(captured)),
            help="give an example batch with a finite loss; a mean over labels is nan where all of them are ignored, so label "
            "at least one position of every sample",
        )


def _by_oracle(
    captured: TaskGraph, rewritten: TaskGraph, facts: TaskFacts, sites: Sequence[DropSite], dtype: torch.dtype
) -> Results:
    counter = held(rewritten.graph_module, STEP)
    step = 0 if counter is None else int(counter)
    return run_oracle(captured, facts, sites, dtype, step, rewritten.own_parameters())


def _capture_error(graph: TaskGraph) -> float | None:
    """How far the captured graph is from the user's forward, as capture found it; ``None`` where it did not compare them."""
    return graph.check.error if graph.check is not None and not graph.check.skipped else None

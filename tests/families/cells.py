"""The cells of one family's row: a task is captured, thinned by every kind of plan, judged, and written for ONNX."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokgraph as tg
from tests.families import eager_drops
from tests.families.family import Example, Family
from tokgraph.verification.compare import compare_gradients, compare_outputs, run_oracle, run_rewritten

Cell = dict[str, Any]
PLANS = ("exact", "hide", "freeze", "fastv")
COLUMNS = ("capture", "blocks", *PLANS, "oracle", "eager", "forward", "train-step", "flops", "seconds")
CHECKED = ("exact", "hide", "freeze")
"""Plans that the eager model is held against: what they drop is known without the model's values."""
BATCHES = (0, 1)
TOLERANCE = 1e-9
SHORT = 300


class Failed(Exception):
    """A comparison that did not hold, or a fact that is not as it should be."""


class Skipped(Exception):
    """Nothing to do: what comes before it was refused."""


def cell_of(make: Callable[[], Any]) -> Cell:
    """What a column holds: its value, or the code and the reason of what it failed with."""
    try:
        return {"state": "ok", "value": make()}
    except tg.TokgraphError as error:
        where = error.where
        place = next((x for x in (where.module, where.source) if x), None) if where is not None else None
        return {"state": "refused", "code": error.code, "why": _short(error.message) + (f" ({place})" if place else "")}
    except Skipped:
        return {"state": "skipped"}
    except Failed as error:
        return {"state": "failed", "code": "differs", "why": _short(str(error))}
    except Exception as error:  # what a table is for: every crash is a row's cell, not the end of the table
        return {"state": "failed", "code": type(error).__name__, "why": _short(str(error))}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHORT else line[: SHORT - 3] + "..."


@dataclass
class Row:
    """One task of a family, stage by stage; each stage is worked out when a column asks for it.

    Args:
        example: the family's model.
        name: the task.
    """

    example: Example
    name: str
    made: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def task(self) -> tg.Task:
        """The task as the user wrote it."""
        return self.example.tasks[self.name]

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the decoder layers."""
        return self.example.layers[self.name]

    def capture(self) -> list[str]:
        """Names of the dimensions that stay open; those that the model or the capture rules out are left out one by one."""
        reasons: list[str] = []
        for dynamic in _dimensions(self.task.dynamic):
            try:
                spec = tg.ModelSpec(self.example.model, {self.name: replace(self.task, dynamic=dynamic)})
                program = tg.capture(spec)
            except tg.CaptureError as error:
                reasons.append(error.message)
                if dynamic is None:
                    raise
                continue
            self.made |= {"program": program, "why": reasons}
            found = {d.name for d in program[self.name].dimensions if d.symbol is not None}
            fixed = {d.name for d in program[self.name].dimensions} - found
            if fixed and not reasons:
                reasons.append(f"asked for, and fixed by the model's code: {', '.join(sorted(fixed))}")
            return sorted(found)
        raise AssertionError

    @cached_property
    def facts(self) -> tg.Facts:
        """The facts of the captured task."""
        return tg.analyze(self._program)

    @property
    def _program(self) -> tg.Program:
        if "program" not in self.made:
            raise Skipped
        program: tg.Program = self.made["program"]
        return program

    def blocks(self) -> str:
        """How many of the declared layers are blocks; they must be these modules, in order."""
        found = [block.module for block in self.facts[self.name].blocks]
        if found != list(self.layers):
            raise Failed(f"blocks are {', '.join(found) or 'none'}; layers are {', '.join(self.layers)}")
        return f"{len(found)}/{len(self.layers)}"

    def sites(self, kind: str) -> tuple[tg.DropSite, ...]:
        """What the plans of the table drop: half of the visual rows, in all layers but the last or but first and last."""
        end = len(self.layers) - 1
        start = 0 if kind == "hide" or end == 1 else 1
        return (tg.DropSite(self.name, start, end, 0.5, mode="freeze" if kind == "freeze" else "hide"),)

    def plan(self, kind: str) -> str | None:
        """Plan and rewrite; `None`: the plan leaves the task as it is."""
        if kind == "exact":
            plan = tg.Plan(exact=True)
        elif kind == "fastv":
            if self.task.reads != "text":
                return None
            plan = tg.make_plan(self.facts, "fastv", k=min(2, len(self.layers) - 1))
        else:
            plan = tg.Plan(self.sites(kind), exact=True)
        self.made[kind] = tg.apply(self.facts, plan)
        return ""

    def _accelerated(self) -> dict[str, tg.Accelerated]:
        found = {kind: self.made[kind] for kind in PLANS if kind in self.made}
        if not found:
            raise Skipped
        return found

    def oracle(self) -> float:
        """The largest error of any plan against the oracle, on the example batch and on another one."""
        worst = 0.0
        for kind, accelerated in self._accelerated().items():
            verified = tg.verify(accelerated)
            verified.raise_if_failed()
            worst = max(worst, verified.max_output_error, verified.max_gradient_error, self._another(kind, accelerated))
        return worst

    def _another(self, kind: str, accelerated: tg.Accelerated) -> float:
        graphs = [self._on(graph, 1) for graph in (accelerated.program[self.name], self._program[self.name])]
        sites = accelerated.plan.for_task(self.name)
        mine = run_rewritten(graphs[0], torch.float64)
        reference = run_oracle(graphs[1], self.facts[self.name], sites, torch.float64)
        differences = (compare_outputs(graphs[0], mine, reference), compare_gradients(mine, reference))
        for found in differences:
            if not found.error <= TOLERANCE:
                raise Failed(f"{kind}, another batch: {found.where} differs from the oracle by {found.error:.1e}")
        return max(found.error for found in differences)

    def _on(self, graph: tg.TaskGraph, seed: int) -> tg.TaskGraph:
        return replace(graph, task=replace(graph.task, inputs=self.example.batch(self.name, seed)))

    def eager(self) -> float:
        """The largest error against the user's own model with drops by hooks, on both batches."""
        worst = 0.0
        done = [kind for kind in CHECKED if kind in self.made]
        if not done:
            raise Skipped
        for kind in done:
            for seed in BATCHES:
                error, where = eager_drops.distance(self._mine(kind, seed), self._by_hand(kind, seed))
                if not error <= TOLERANCE:
                    raise Failed(f"{kind}, batch {seed}: {where} differs from eager by {error:.1e}")
                worst = max(worst, error)
        return worst

    def _mine(self, kind: str, seed: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        graph = self._on(self.made[kind].program[self.name], seed)
        found = run_rewritten(graph, torch.float64)
        example: Any = graph.unflatten(found.outputs)
        loss = example["loss"] if isinstance(example, Mapping) else example
        names = {id(p): name for name, p in reversed(list(self.example.model.named_parameters()))}
        every = dict(self.example.model.named_parameters(remove_duplicate=False))  # tied ones have several names
        gradients = {names[id(every[name])]: gradient for name, gradient in found.gradients.items()}
        return (loss[0] if isinstance(loss, tuple) else loss), gradients

    def _by_hand(self, kind: str, seed: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        inputs = self.example.batch(self.name, seed)
        drops = []
        for site in () if kind == "exact" else self.sites(kind):
            assert self.task.visual is not None
            assert site.end is not None
            visual = eager_drops.visual_rows(self.task.visual, inputs, self.facts[self.name].demand.tokens)
            rows = eager_drops.dropped_evenly(visual, site.keep)
            drops.append(eager_drops.Drop(site.start, site.end, rows, site.mode))
        return eager_drops.run(self.example.model, self.task, inputs, self.layers, drops)

    def onnx(self, kind: str) -> str:
        """One file, of the plan that hides rows where there is one, checked in ONNX Runtime as every export is."""
        done = self._accelerated()
        accelerated = done.get("hide") or done.get("exact") or next(iter(done.values()))
        with tempfile.TemporaryDirectory() as folder:
            accelerated.export_onnx(Path(folder) / "onnx", (kind,))
        return ""

    def flops(self) -> float:
        """What of a training step's FLOPs is left under `exact`."""
        if "exact" not in self.made:
            raise Skipped
        programs = (self._program, self.made["exact"].program)
        before, after = (tg.costs(program, self.facts)[self.name].at().total().flops for program in programs)
        return after / before


def _dimensions(asked: Mapping[str, Mapping[int, str]] | None) -> Iterator[Mapping[str, Mapping[int, str]] | None]:
    """What to leave open: all that is asked for, then tokens alone, then nothing."""
    if asked:
        yield asked
        tokens = {name: {d: n for d, n in dims.items() if n == "tokens"} for name, dims in asked.items()}
        if tokens != asked and any(tokens.values()):
            yield {name: dims for name, dims in tokens.items() if dims}
    yield None


def measure(family: Family, columns: tuple[str, ...] = COLUMNS) -> Iterator[tuple[str, str, Cell]]:
    """The cells of a family, as they come: task, column, cell."""
    example = family.make()
    for name in example.tasks:
        yield from _measure_task(Row(example, name), columns)


def _measure_task(row: Row, columns: tuple[str, ...]) -> Iterator[tuple[str, str, Cell]]:
    began = time.monotonic()
    captured = cell_of(row.capture)
    if row.made.get("why"):
        captured["why"] = _short(row.made["why"][-1])
    yield row.name, "capture", captured
    if captured["state"] == "ok":
        steps: dict[str, Callable[[], Any]] = {
            "blocks": row.blocks,
            **{kind: (lambda kind=kind: row.plan(kind)) for kind in PLANS},
            "oracle": row.oracle,
            "eager": row.eager,
            "forward": lambda: row.onnx("forward"),
            "train-step": lambda: row.onnx("train-step"),
            "flops": row.flops,
        }
        for column, step in steps.items():
            if column in columns:
                yield row.name, column, cell_of(step)
    yield row.name, "seconds", {"state": "ok", "value": round(time.monotonic() - began, 1)}

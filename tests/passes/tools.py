"""What the tests of passes share: tiny models captured once, graphs of plain functions, readable differences of graphs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import tokgraph as tg
from tests import tiny
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import tensor
from tokgraph.ir.printer import format_graph
from tokgraph.passes import Pipeline
from tokgraph.passes.rewrite.realise import rewrite_passes, seeds

TASKS = ("understanding", "generation")


@dataclass(frozen=True)
class Captured:
    """A captured model with its facts, and one task of it."""

    program: tg.Program
    facts_of: tg.Facts
    task: str

    @classmethod
    def of(cls, spec: tg.ModelSpec, task: str) -> Captured:
        program = tg.capture(tg.ModelSpec(spec.model, {task: spec.tasks[task]}))
        return cls(program, tg.analyze(program), task)

    @property
    def graph(self) -> tg.TaskGraph:
        return self.program[self.task]

    @property
    def facts(self) -> TaskFacts:
        return self.facts_of[self.task]

    def sites(self, *sites: tg.DropSite) -> tuple[tg.DropSite, ...]:
        """The sites on this task, their ends filled in, outer spans first."""
        mine = tuple(replace(site, task=self.task).resolved(len(self.facts.blocks)) for site in sites)
        return tg.Plan(mine).for_task(self.task)

    def seeded(self, *sites: tg.DropSite, exact: bool = False) -> tg.TaskGraph:
        return Pipeline(seeds(self.facts, self.sites(*sites), exact)).run_task(self.graph, self.facts)

    def rewritten(self, *sites: tg.DropSite, exact: bool = False) -> tg.TaskGraph:
        return Pipeline(rewrite_passes(self.facts, self.sites(*sites), exact)).run_task(self.graph, self.facts)

    def apply(self, *sites: tg.DropSite, exact: bool = False) -> tg.Accelerated:
        return tg.apply(self.program, tg.Plan(self.sites(*sites), exact=exact), facts=self.facts_of)


@cache
def captured(task: str = "understanding", layers: int = 2, **options: Any) -> Captured:
    """The tiny model in float64, with one task captured; dimensions are static unless asked for."""
    options = {"dtype": "float64", "dynamic": False} | options
    return Captured.of(tiny.build(layers=layers, **options), task)


def site(start: int, end: int | None, keep: float = 0.5, selector: str = "uniform", **fields: Any) -> tg.DropSite:
    """A site of a task that is filled in later."""
    return tg.DropSite("", start, end, keep, selector, **fields)


@dataclass(frozen=True)
class Run:
    """Outputs of a task graph on its example batch, and the gradient of its loss for every parameter."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, graph: tg.TaskGraph) -> Run:
        parameters = graph.named_parameters()
        outputs = list(graph.graph_module(*graph.flatten(graph.example())))
        found = torch.autograd.grad(outputs[0], list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), found, strict=True)
        return cls(outputs, {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})

    def assert_equals(self, other: Run, tolerance: float = 1e-12) -> None:
        """Same outputs and gradients; a parameter that one graph lost counts as one without gradient."""
        for a, b in zip(self.outputs, other.outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for name in self.gradients | other.gradients:
            a, b = self.gradients.get(name), other.gradients.get(name)
            a, b = torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def traced(function: Callable[..., Any], *args: Any) -> tg.TaskGraph:
    """The ATen graph of a plain function; its first outputs need be no loss."""
    with torch.no_grad():
        exported = torch.export.export(_Function(function), args, strict=False).run_decompositions({})
    module = fx.GraphModule({}, exported.graph)
    module.graph.set_codegen(fx.graph.CodeGen())
    inputs = {n.name: x for n, x in zip(placeholders(module.graph), args, strict=True)}
    task = tg.Task(function, inputs, visual=tg.VisualTokens.positions(slice(0, 1)))
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    return tg.TaskGraph("traced", task, module, pytree.tree_structure(inputs), out_spec)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def node(graph: tg.TaskGraph | fx.Graph, name: str) -> fx.Node:
    nodes = graph.nodes if isinstance(graph, fx.Graph) else graph.graph.nodes
    return next(n for n in nodes if n.name == name)


def calls(graph: tg.TaskGraph, target: object) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.target is target]


# ------------------------------------------------------------------ snapshots


def _numbered(names: Iterable[str]) -> dict[str, str]:
    """Names without what depends on the version of torch: numbered from 1 by operator, in order of appearance."""
    seen: dict[str, int] = {}
    result: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"(_default|_Tensor|_Scalar)?(_\d+)?$", "", name)
        if name not in result:
            seen[stem] = seen.get(stem, 0) + 1
            result[name] = f"{stem}.{seen[stem]}" if seen[stem] > 1 else stem
    return result


def _lines(graph: tg.TaskGraph, names: dict[str, str]) -> list[str]:
    text = re.sub(r"%(\w+)", lambda m: f"%{names[m.group(1)]}", format_graph(graph))
    return [line.strip() for line in text.splitlines()]


def listing(graph: tg.TaskGraph, keep: Callable[[fx.Node], bool] = lambda n: True) -> str:
    """The graph as text, restricted to some nodes."""
    names = _numbered(n.name for n in graph.graph.nodes)
    kept = {names[n.name] for n in graph.graph.nodes if n.op != "get_attr" and keep(n)}
    found = []
    for line in _lines(graph, names):
        name = line.partition(" = ")[0].removeprefix("%")
        if name in kept or (line.startswith("return") and keep(graph.graph.output_node())):
            found.append(line)
    return "\n".join(found) + "\n"


def changes(before: tg.TaskGraph, after: tg.TaskGraph) -> str:
    """The lines that differ, ``-`` before and ``+`` after."""
    names = _numbered([*(n.name for n in before.graph.nodes), *(n.name for n in after.graph.nodes)])
    difference = difflib.unified_diff(_lines(before, names), _lines(after, names), n=0, lineterm="")
    return "".join(f"{line}\n" for line in difference if not line.startswith(("---", "+++", "@@")))


# ------------------------------------------------------------------ what every pass must leave behind


class _ShapeCheck(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        expected = tensor(n)
        if n.op == "call_function" and isinstance(result, Tensor):
            assert expected is not None, f"{n.name} has no value"
            shape = [d.node.hint if isinstance(d, torch.SymInt) else d for d in expected.shape]
            known = [
                a if b is None else b for a, b in zip(result.shape, shape, strict=True)
            ]  # of counted rows, none is
            assert list(result.shape) == known, f"{n.name}: {list(result.shape)} at run time, {shape} in its metadata"
            assert result.dtype == expected.dtype, n.name
        return result


def assert_well_formed(graph: tg.TaskGraph, before: tg.TaskGraph | None = None) -> None:
    """Every value's metadata is what a run gives; new nodes say who made them and where they belong."""
    graph.graph.lint()
    with torch.no_grad():
        _ShapeCheck(graph.graph_module).run(*graph.flatten(graph.example()))
    if before is None:
        return
    known = {n.name for n in before.graph.nodes}
    for n in graph.graph.nodes:
        if n.op == "call_function" and n.name not in known and isinstance(n.meta["val"], Tensor):
            assert n.meta.get("made_by"), f"{n.name} does not say which pass made it"
            assert "stack_trace" in n.meta, f"{n.name} has no stack trace"
    own, theirs = graph.named_parameters(), before.named_parameters()
    assert all(own[name] is theirs[name] for name in own)

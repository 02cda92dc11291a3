"""Graphs on devices that this machine lacks: fake CUDA tensors show that nothing stays behind, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import tokgraph as tg
from tests import tiny
from tests.harness import captured_tiny
from tokgraph.ir.devices import captured_device, same_device
from tokgraph.ir.evaluate import evaluate
from tokgraph.ir.interpreter import GraphInterpreter, in_dtype
from tokgraph.ir.node import fake_mode, tensor, value
from tokgraph.ir.program import TaskGraph
from tokgraph.passes.device import on_device
from tokgraph.passes.pipeline import validate

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Tabled(tiny.Unified):
    """With a constant that export lifts, calls that name the device, and one that means the CPU where the model is on a GPU."""

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=x.dtype).to(x.device)
        at = torch.arange(x.shape[1], device=x.device).unsqueeze(-1)
        return super().backbone(x * table.repeat(x.shape[-1] // 4) + 0.1 * at)


@pytest.fixture(scope="module")
def tabled() -> tg.Accelerated:
    spec = tiny.build(layers=3)
    task = spec.tasks["understanding"]
    return tg.optimize(tg.ModelSpec(Tabled(3), {"understanding": task}), "shared", verify=False)


def devices_of(graph: TaskGraph) -> set[torch.device]:
    """Where a graph's values are, and what its calls name."""
    named = [
        x for node in graph.graph.nodes for x in (*node.args, *node.kwargs.values()) if isinstance(x, torch.device)
    ]
    return {*named, *(x.device for node in graph.graph.nodes if (x := tensor(node)) is not None)}


def run_fake(graph: TaskGraph, device: torch.device) -> list[torch.Tensor]:
    """The graph's outputs where model and batch are fake tensors of a device: mixing devices raises."""
    mode = fake_mode(graph.graph)
    assert mode is not None

    class Run(fx.Interpreter):
        def fetch_attr(self, target: str) -> torch.Tensor:
            held = super().fetch_attr(target)
            at = (
                device if isinstance(held, torch.nn.Parameter) else held.device
            )  # constants are where the graph has them
            return torch.empty(held.shape, dtype=held.dtype, device=at)

    with torch.no_grad(), mode:
        leaves = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in graph.flatten(graph.task.inputs)]
        return list(Run(graph.graph_module).run(*leaves))


def test_a_graph_goes_to_another_device(tabled: tg.Accelerated) -> None:
    for graph in (tabled.program["understanding"], tabled.facts.program["understanding"]):
        assert devices_of(graph) == {CPU}
        there = on_device(graph, torch.device("meta"))
        assert devices_of(there) == {torch.device("meta")}
        assert all(x.device.type == "meta" for x in there.graph_module.buffers())
        assert devices_of(graph) == {CPU}  # which stays what it was
        validate(there.graph_module)
        assert [n.name for n in there.graph.nodes] == [n.name for n in graph.graph.nodes]
        assert on_device(graph, torch.device("cpu", 0)) is graph


def test_nothing_stays_behind(tabled: tg.Accelerated) -> None:
    """Fake CUDA tensors in the graph of the CPU raise, in the graph of the GPU they do not."""
    graph = tabled.program["understanding"]
    assert all(x.device == CPU for x in run_fake(graph, CPU))
    with pytest.raises(Exception, match="found two different devices|same device"):
        run_fake(graph, CUDA)
    there = on_device_without_gpu(graph)
    assert all(x.device.type == "cuda" for x in run_fake(there, CUDA))


def on_device_without_gpu(graph: TaskGraph) -> TaskGraph:
    """``on_device`` for CUDA; constants, which have values, become fake ones."""
    mode = fake_mode(graph.graph)
    assert mode is not None
    with pytest.MonkeyPatch.context() as patched:
        real = torch.Tensor.to

        def to(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            if args == (CUDA,) and not isinstance(x, torch._subclasses.FakeTensor):
                with mode:
                    return torch.empty(x.shape, dtype=x.dtype, device=CUDA)
            return real(x, *args, **kwargs)

        patched.setattr(torch.Tensor, "to", to)
        return on_device(graph, CUDA)


def test_other_devices_than_that_of_the_capture_are_left(tabled: tg.Accelerated) -> None:
    graph = tabled.program["understanding"].copy()
    first = next(node for node in graph.graph.nodes if torch.device("cpu") in node.kwargs.values())
    first.update_kwarg("device", CUDA)
    there = on_device(graph, torch.device("meta"))
    assert [n.name for n in there.graph.nodes if CUDA in n.kwargs.values()] == [first.name]


def test_interpreters_compute_where_the_model_is(tabled: tg.Accelerated) -> None:
    """On meta, where the whole graph runs: calls that name the CPU, and the constant, must follow the parameters."""
    graph = tabled.program["understanding"]
    _, constants = in_dtype(torch.float64, graph.graph_module)
    assert constants(CPU) == CPU
    module = on_device(graph, CPU).copy().graph_module
    for name, p in list(module.get_submodule("tensors").named_parameters(recurse=False)):
        setattr(module.get_submodule("tensors"), name, torch.nn.Parameter(p.detach().to("meta")))
    maps = in_dtype(torch.float64, module)
    assert maps[1](CPU) == torch.device("meta")
    outputs = GraphInterpreter(module, *maps).run(*graph.flatten(graph.task.inputs))
    assert all(x.device.type == "meta" for x in outputs)


def test_facts_of_a_model_without_storage_come_from_the_batch() -> None:
    """Calls that name ``meta`` are computed where the batch has values."""
    spec = tiny.build(layers=1)
    with torch.device("meta"):
        model = Tabled(1)
    program = tg.capture(tg.ModelSpec(model, {"understanding": spec.tasks["understanding"]}))
    graph = program["understanding"]
    at = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.arange.default)
    assert value(at).device.type == "meta"
    assert evaluate(graph, [at])[0].tolist() == list(range(tiny.TEXT + tiny.IMAGE))


def test_spellings_of_one_device() -> None:
    assert same_device(torch.device("cuda"), CUDA)
    assert same_device(torch.device("cpu:0"), CPU)
    assert not same_device(torch.device("cuda:1"), CUDA)
    assert not same_device(CPU, CUDA)
    assert captured_device(captured_tiny(3).program["understanding"].graph_module) == CPU


def test_models_and_batches_that_are_nowhere() -> None:
    spec = tiny.build(layers=1)
    spec.model.head.to("meta")
    with pytest.raises(tg.SpecError, match="on 2 devices: embed.weight is on cpu, head.weight is on meta"):
        tg.capture(spec)
    spec = tiny.build(layers=1)
    task = spec.tasks["understanding"]
    there = tg.Task(**{**vars(task), "inputs": {**task.inputs, "patches": task.inputs["patches"].to("meta")}})
    with pytest.raises(tg.SpecError, match="input 'patches' of the example batch is on the meta device"):
        tg.capture(tg.ModelSpec(spec.model, {"understanding": there}))


def test_a_plan_for_a_model_that_was_converted_since_its_capture() -> None:
    """The call compares the model with the capture, not with what the model was when the plan was applied."""
    spec = tiny.build(layers=2)
    facts = tg.analyze(tg.capture(tg.ModelSpec(spec.model, {"understanding": spec.tasks["understanding"]})))
    spec.model.double()
    accelerated = tg.apply(facts, tg.Plan(exact=True))
    batch = {k: x.double() if x.is_floating_point() else x for k, x in spec.tasks["understanding"].inputs.items()}
    mine, eager = accelerated["understanding"](**batch)[0], tiny.understand(spec.model, **batch)[0]
    assert mine.dtype is torch.float64
    torch.testing.assert_close(mine, eager, rtol=1e-12, atol=0)

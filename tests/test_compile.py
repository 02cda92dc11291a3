"""Compiled tasks: the same numbers, checks and steps as operator by operator, without graph breaks and recompilation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import tokgraph as tg
from tests import tiny
from tests.field import decoder as m
from tests.field import test_checks
from tests.harness import assert_same_gradients, captured_tiny, gradients
from tokgraph.ir.compilation import CompilationCheck, TaskCompilation

pytestmark = (
    pytest.mark.filterwarnings(  # torch._dynamo looks at inputs that have a history, and hides that it is warned
        "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning"
    )
)
GENERATION = pytest.param("generation", marks=pytest.mark.slow)
GRAPH, BLOCK = (pytest.param(by, marks=pytest.mark.slow) for by in ("graph", "block"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were compiled since the test began; there was no break in them."""
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


def planned(task: str = "understanding", policy: str = "shared", layers: int = 3, **options: Any) -> tg.TaskModule:
    captured = captured_tiny(layers)
    plan = tg.make_plan(captured.program, policy, facts=captured.facts, **options)
    return captured.apply(plan, task)[task]


def step(task: tg.TaskModule, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = task(**(inputs or task.task_graph.task.inputs))[0]
    return loss.detach(), gradients(task._of[0], loss)


@pytest.mark.parametrize("by", [GRAPH, "block"])
@pytest.mark.parametrize("task", ["understanding", GENERATION])
def test_the_same_step(task: str, by: str) -> None:
    module = planned(task)
    loss, expected = step(module)
    module.compile(by=by, backend="aot_eager")
    found, mine = step(module)
    torch.testing.assert_close(found, loss)
    assert_same_gradients(mine, expected, 1e-5)
    step(module)
    assert graphs() == module.variants.first.compiled(module.compilation).functions
    assert module.compile(False).compilation is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("by", ["graph", "block"])
def test_kernels(by: str) -> None:
    """By the backend that users have: half a minute each."""
    module = planned()
    loss, expected = step(module)
    module.compile(by=by)
    found, mine = step(module)
    torch.testing.assert_close(found, loss)
    assert_same_gradients(mine, expected, 1e-5)
    with pytest.raises(tg.BatchError, match="such tokens than the 6"):
        module(**{**module.task_graph.task.inputs, "ids": test_checks.one_image_token_less()["ids"]})


@pytest.mark.slow
def test_equal_blocks_are_compiled_once() -> None:
    few, many = (planned(policy="none", layers=layers).compile(by="block", backend="aot_eager") for layers in (3, 6))
    assert step(few)[0].isfinite()
    compiled = graphs()
    assert step(many)[0].isfinite()
    assert graphs() - compiled == compiled == 3  # before the blocks, a block, after them


@pytest.mark.slow
def test_parameters_stay_the_models_own() -> None:
    captured = captured_tiny(3)
    accelerated = captured.apply(tg.make_plan(captured.program, "shared", facts=captured.facts))
    keys = accelerated.state_dict().keys()
    accelerated.compile(backend="aot_eager")
    batch = captured.spec.tasks["generation"].inputs
    accelerated["generation"](**batch)[0].backward()
    assert accelerated.state_dict().keys() == keys
    assert captured.model.code_head.weight.grad is not None
    captured.model.zero_grad()


@pytest.mark.slow
def test_changes_of_the_model_are_followed() -> None:
    spec = tiny.build(layers=2)
    accelerated = tg.optimize(tg.ModelSpec(spec.model, {"generation": spec.tasks["generation"]}), "exact", verify=False)
    task = accelerated.compile(backend="aot_eager")["generation"]
    batch = spec.tasks["generation"].inputs
    before = task(**batch)[0]

    def both() -> Tensor:
        mine = task(**batch)[0]
        torch.testing.assert_close(mine, tiny.generate(spec.model, **batch)[0])
        return mine

    halves = {name: x * 0.5 for name, x in spec.model.state_dict().items()}
    spec.model.load_state_dict(halves, assign=True)  # other tensors in the same places
    assert not torch.equal(both(), before)
    assert graphs() == 1
    spec.model.eval()
    with torch.no_grad():
        both()
    spec.model.bfloat16()  # captured once more, and compiled
    assert task(**batch)[0].dtype is torch.bfloat16
    spec.model.float()
    spec.model.norm = nn.LayerNorm(16)
    with pytest.raises(tg.StaleError, match="norm"):  # the checks of a call are outside of compiled code
        task(**batch)
    accelerated.refresh()
    both()
    assert task.compilation is not None


@pytest.mark.parametrize("by", [GRAPH, "block"])
def test_a_wrong_batch_is_refused_with_the_same_message(by: str) -> None:
    task = test_checks.optimized(test_checks.counts)
    wrong = test_checks.one_image_token_less()
    with pytest.raises(tg.BatchError) as plain:
        task(**wrong)
    task.compile(by=by, backend="aot_eager")
    task(**test_checks.example())
    compiled = graphs()
    with pytest.raises(tg.BatchError) as mine:
        task(**wrong)
    assert str(mine.value) == str(plain.value)
    assert "11 tokens, 12 features" in mine.value.message
    task(**test_checks.example())
    assert graphs() == compiled
    with pytest.raises(tg.BatchError, match="captured for"):
        task(**test_checks.example(labels=wrong["labels"].int()))


@pytest.mark.slow
def test_row_counts_and_labels_are_checked() -> None:
    task = planned().compile(backend="aot_eager")
    batch = dict(task.task_graph.task.inputs)
    with pytest.raises(tg.BatchError, match="such tokens than the 6"):
        task(**{**batch, "ids": test_checks.one_image_token_less()["ids"]})
    with pytest.raises(tg.BatchError, match="reads= rules out"):
        task(**{**batch, "labels": torch.zeros_like(batch["labels"])})
    generation = planned("generation").compile(backend="aot_eager")
    batch = dict(generation.task_graph.task.inputs)
    with pytest.raises(tg.BatchError, match="out of range"):
        generation(**{**batch, "codes": batch["codes"] + 90})


class Averaged(nn.Module):
    """Keeps an average of its batches, and checks them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.Unified(2)
        self.register_buffer("seen", torch.zeros(()))


def averaging(model: Averaged, ids: Tensor, codes: Tensor) -> Tensor:
    with torch.no_grad():
        model.seen.mul_(0.9).add_(codes.float().mean() * 0.1)
    torch._assert((codes < 7).all(), "a code is too large")
    return tiny.generate(model.inner, ids, codes)[0]


def test_buffers_are_written_when_the_checks_hold() -> None:
    task = tiny.build(layers=2).tasks["generation"]
    batch = {**task.inputs, "codes": task.inputs["codes"] % 7}
    model = Averaged()
    spec = tg.ModelSpec(model, {"g": tg.Task(averaging, batch, visual_inputs=("codes",), reads="visual")})
    module = tg.optimize(spec, "none", verify=False).compile(backend="aot_eager")["g"]
    module(**batch)
    seen = model.seen.clone()
    torch.testing.assert_close(seen, batch["codes"].float().mean() * 0.1)
    with pytest.raises(tg.BatchError, match="a code is too large"):
        module(ids=batch["ids"], codes=torch.full_like(batch["codes"], 7))
    assert torch.equal(model.seen, seen)


@pytest.mark.slow
def test_each_step_draws_anew() -> None:
    module = planned(policy="random-ltd")
    module.step = 0
    plain = [float(step(module)[0]) for _ in range(4)]
    module.step = 0
    module.compile(backend="aot_eager")
    assert [float(step(module)[0]) for _ in range(4)] == pytest.approx(plain)
    assert len(set(plain)) > 1
    assert module.step == 4
    assert graphs() == 1
    outside = torch.compile(module.compile(False), backend="aot_eager", fullgraph=True)  # the user's own compilation
    module.step = 0
    batch = module.task_graph.task.inputs
    assert [float(outside(**batch)[0].detach()) for _ in range(4)] == pytest.approx(plain)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["graph", "block"])
def test_another_batch_is_not_compiled_again(by: str) -> None:
    captured = captured_tiny(3, dynamic=True)
    accelerated = captured.apply(tg.make_plan(captured.program, "shared", facts=captured.facts))
    for name, task in accelerated.items():
        before = graphs()
        task.compile(by=by, backend="aot_eager")
        step(task)
        compiled = graphs()
        assert compiled > before
        for batch in (3, 5):
            inputs = tiny.build(batch=batch, dynamic=True).tasks[name].inputs
            found = step(task, **inputs)
            expected = step(task.compile(False), **inputs)
            task.compile(by=by, backend="aot_eager")
            torch.testing.assert_close(found[0], expected[0])
            assert_same_gradients(found[1], expected[1], 1e-5)
        assert graphs() == compiled


def test_values_go_when_they_were_read() -> None:
    """Else a step would hold the stream behind every block."""
    module = planned()
    compiled = module.variants.first.compiled(tg.Compilation(by="block", backend="eager"))
    values = compiled._values(module.task_graph.flatten(module.task_graph.example()))
    compiled._run(values)
    assert set(values) == set(compiled._outputs.names)


def telling(model: m.Model, ids: Tensor, patches: Tensor, labels: Tensor) -> dict[str, Any]:
    """Outputs of every kind: sizes, constants that look like names, nothing, inputs, parameters."""
    batch, tokens = ids.shape
    sizes = {
        "rows": batch * 2,
        "half": batch * 0.5,
        "fits": batch == labels.shape[0],
        "nested": [tokens, (tokens % 5,)],
    }
    return {
        "loss": m.loss(model, ids, patches, labels),
        **sizes,
        "same": {"five": 5, "text": "ids", "none": None},
        "given": (ids, labels[:, 1:], ids == 1),
        "learned": (model.layers[0].feed[0].weight, model.head.weight * 2),
    }


@pytest.mark.parametrize(
    "how", [GRAPH, *(pytest.param(x, marks=pytest.mark.slow) for x in ("block", "checkpoint", "module"))]
)
def test_outputs_of_every_kind(how: str) -> None:
    model = m.model(layers=1)
    spec = m.spec(model, m.batch(), telling, dynamic=True)
    accelerated = tg.optimize(spec, "exact", verify=False)
    if how in ("graph", "block"):
        task = accelerated.compile(by=how, backend="eager")[m.TASK]
    else:
        module = accelerated.module(checkpoint=how == "checkpoint")
        task = partial(module.compile(backend="eager") if how == "module" else module, task=m.TASK)
    for batch in (m.batch(), m.batch((5, 1, 2), tokens=13, seed=3)):
        mine, expected = task(**batch), telling(model, **batch)
        assert set(mine) == set(expected)
        for found, wanted in zip(tree_leaves(mine), tree_leaves(expected), strict=True):
            assert type(found) is type(wanted)
            assert torch.allclose(found, wanted) if isinstance(wanted, Tensor) else found == wanted
        assert mine["learned"][0] is model.layers[0].feed[0].weight


@pytest.mark.slow
def test_a_copy_has_parameters_of_its_own() -> None:
    model = m.model(layers=1)
    accelerated = tg.optimize(m.spec(model, m.batch()), "none", verify=False).compile(by="block", backend="eager")
    originals = (accelerated[m.TASK], partial(accelerated.module().compile(backend="eager"), task=m.TASK))
    before = [run(**m.batch()) for run in originals]
    copies = [copy.deepcopy(run) for run in originals]
    with torch.no_grad():
        model.head.weight.mul_(2)
    for original, made, was in zip(originals, copies, before, strict=True):
        assert torch.equal(made(**m.batch()), was)
        assert not torch.equal(original(**m.batch()), was)


@pytest.mark.slow
def test_inputs_may_lie_in_memory_as_they_like() -> None:
    model = m.model(layers=1)
    task = tg.optimize(m.spec(model, m.batch()), "none", verify=False).compile(backend="aot_eager")[m.TASK]
    other = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in m.batch(seed=1).items()}
    for batch in (m.batch(), other):
        assert m.worst(task(**batch), m.loss(model, **batch), model) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("by", ["graph", "block"])
def test_a_batch_without_an_image(by: str) -> None:
    model, batch = m.model(layers=1), m.batch()
    batch["patches"] = batch["patches"].flatten(0, 1)
    sizes = {"ids": {1: "tokens"}, "labels": {1: "tokens"}, "patches": {0: "patches"}}
    task = tg.optimize(m.spec(model, batch, dynamic=sizes), "none", verify=False)[m.TASK]
    task.compile(by=by, backend="aot_eager")
    text = batch["ids"].masked_fill(batch["ids"] == m.IMAGE_ID, 5)
    for inputs in (batch, {"ids": text, "labels": text, "patches": batch["patches"][:0]}):
        assert m.worst(task(**inputs), m.loss(model, **inputs), model) < 1e-10


def broken(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend that cannot do the GELU of any block."""
    if any("gelu" in str(node.target) for node in graph_module.graph.nodes):
        raise RuntimeError("no kernel for aten.gelu.default\nand a page of advice")
    return graph_module.forward


@pytest.mark.parametrize("by", ["graph", BLOCK])
def test_what_cannot_be_compiled_is_named(by: str) -> None:
    task = planned().compile(by=by, backend=broken)
    with pytest.raises(tg.CompileError) as refused:
        step(task)
    assert refused.value.message == (
        "task 'understanding' cannot be compiled by broken, at block 0: RuntimeError: no kernel for aten.gelu.default"
    )
    assert refused.value.where is not None
    assert refused.value.where.module == "layers.0.mlp.1"
    assert refused.value.code == "TG013"
    step(task.compile(False))


@pytest.mark.parametrize("asked", [{"mode": "fastest"}, {"by": "layer"}, {"backend": "none such"}])
def test_what_there_is_not(asked: dict[str, str]) -> None:
    task = planned()
    with pytest.raises(tg.CompileError, match="fastest|layer|none such"):
        task.compile(**asked)(**task.task_graph.task.inputs)


@pytest.mark.slow
def test_optimize_compiles_and_compares() -> None:
    spec = tiny.build(layers=2)
    spec = tg.ModelSpec(spec.model, {"generation": spec.tasks["generation"]})
    stages: list[str] = []
    how = tg.Compilation(by="block", backend="aot_eager")
    accelerated = tg.optimize(spec, "exact", compile=how, progress=stages.append)
    assert stages == list(tg.stages.STAGES)
    assert accelerated["generation"].compilation == how
    found = accelerated.report["compilation"]
    assert found["passed"]
    assert found["tasks"]["generation"]["gradient_error"] < 1e-5
    assert "compilation" not in tg.optimize(spec, "exact", verify=False).report


def stale(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend whose code computes with the values of its first call, as a CUDA graph whose inputs nobody copies."""
    first: list[Any] = []

    def run(*given: Any) -> Any:
        first.extend(x.detach().clone() if isinstance(x, Tensor) else x for x in given[len(first) :])
        floats = [isinstance(x, Tensor) and x.is_floating_point() for x in given]
        return graph_module(*(x + (a - x).detach() if f else a for x, a, f in zip(given, first, floats, strict=True)))

    return run


@pytest.mark.parametrize("backend", ["eager", stale])
def test_later_steps_are_compared(backend: Any) -> None:
    captured = captured_tiny(2, dynamic=True)
    accelerated = captured.apply(tg.make_plan(captured.program, "none", facts=captured.facts), "understanding")
    before = {name: x.clone() for name, x in captured.model.state_dict().items()}
    accelerated.compile(by="block", backend=backend)
    assert bool(tg.verify_compiled(accelerated).failures()) == (backend is stale)
    assert all(torch.equal(x, before[name]) for name, x in captured.model.state_dict().items())


def test_a_difference_fails() -> None:
    check = CompilationCheck({"t": TaskCompilation(1.0, 1, 1e-6, float("nan"), "output 0", "head.weight")}, 1e-4)
    with pytest.raises(tg.VerificationError, match="the gradient of head.weight of the compiled graph differs by nan"):
        check.raise_if_failed()


def speechless(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend with a bare assertion."""
    raise AssertionError


def test_an_error_without_words_is_told_by_its_line() -> None:
    with pytest.raises(tg.CompileError, match=r"(?m)AssertionError: .*test_compile.py:\d+: raise AssertionError$"):
        step(planned().compile(backend=speechless))

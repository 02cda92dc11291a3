"""Lowered graphs against what they were lowered from: values, gradients, updates, names, and where each node belongs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, assert_same_gradients, captured_tiny, gradients
from tokgraph.passes.lower import (
    OPTIMIZERS,
    Lowered,
    Optimizer,
    lower_forward,
    lower_program,
    lower_train_step,
    lower_update_step,
)
from tokgraph.passes.lower.graph import lowered_place
from tokgraph.passes.lower.step import make_optimizer

U, G = "understanding", "generation"
TASKS = (U, G)
STEP = "tokgraph_step"
THINNED = tg.Plan((tg.DropSite(U, 1, 2, 0.5), tg.DropSite(G, 1, 2, 0.5)), exact=True)
RANDOM = tg.Plan((tg.DropSite(U, 0, 1, 0.5, "random", seed=5),), exact=True)
PLANS = {"captured": tg.Plan(), "thinned": THINNED}


def batch(task: str, rows: int, text: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of ``tests/tiny.py`` of any size: text, and six visual tokens in another place in each row."""
    generator = torch.Generator().manual_seed(rows + text)
    if task == G:
        ids = torch.randint(10, tiny.VOCABULARY, (rows, text), generator=generator)
        return {"ids": ids, "codes": torch.randint(0, tiny.CODES, (rows, tiny.IMAGE), generator=generator)}
    ids = torch.randint(10, tiny.VOCABULARY, (rows, text + tiny.IMAGE), generator=generator)
    for row in range(rows):
        ids[row, row % text : row % text + tiny.IMAGE] = tiny.IMAGE_ID
    patches = torch.rand(rows, tiny.IMAGE, 4, generator=generator, dtype=dtype)
    return {"ids": ids, "patches": patches, "labels": ids.masked_fill(ids == tiny.IMAGE_ID, -100)}


SIZES = [(2, 5), (3, 8)]
"""Rows and text tokens: those of the example batch, and others."""


def call(lowered: Lowered, inputs: Mapping[str, Tensor], **extra: Tensor) -> dict[str, Tensor]:
    """Run a lowered graph: output -> tensor."""
    given = {**lowered.initial, **inputs, **extra}
    outputs = lowered.module(*lowered.state.values(), *(given[name] for name in lowered.inputs))
    return dict(zip(lowered.outputs, outputs, strict=True))


@pytest.fixture(scope="module")
def two() -> Captured:
    return captured_tiny(2)


@pytest.fixture(scope="module")
def accelerated(two: Captured) -> Callable[[str], tg.Accelerated]:
    return cache(lambda name: two.apply({**PLANS, "random": RANDOM}[name]))


@pytest.fixture(scope="module")
def train_step(two: Captured, accelerated: Callable[[str], tg.Accelerated]) -> Callable[[str, str], Lowered]:
    """Plan, task -> its training step: seconds each, so they are shared."""
    return cache(lambda name, task: lower_train_step(accelerated(name).program[task], two.facts[task]))


# A model with what models have: tied and frozen weights, parameters that one task alone uses, nested results.


def read(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> dict[str, Any]:
    loss, logits = tiny.understand(model, ids, patches, labels)
    best = logits.max(-1)
    return {"logits": logits, "loss": loss, "more": (best[0], {"best": best[1], "same": logits}), "about": [None, 7]}


def draw(model: tiny.Unified, ids: Tensor, codes: Tensor) -> tuple[Any, ...]:
    loss, logits = tiny.generate(model, ids, codes)
    return loss, [logits, (codes, "name")], loss


@pytest.fixture(scope="module")
def rich() -> Captured:
    spec = tiny.build(layers=1, dtype="float64")
    model = spec.model
    model.head.weight = model.embed.weight
    model.code_head.weight = model.codes.weight
    model.layers[0].mlp[0].weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    old = spec.tasks
    return Captured.of(
        tg.ModelSpec(
            model,
            {
                U: tg.Task(read, old[U].inputs, old[U].dynamic, old[U].visual, reads="text"),
                G: tg.Task(draw, old[G].inputs, old[G].dynamic, visual_inputs=("codes",), reads="visual"),
            },
        )
    )


@pytest.fixture(scope="module")
def rich_step(rich: Captured) -> Callable[[str], Lowered]:
    return cache(lambda task: lower_train_step(rich.program[task], rich.facts[task]))


# The forward graph.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lower", [lower_forward, lower_program])
def test_the_same_outputs(two: Captured, accelerated: Any, lower: Callable[..., Lowered], plan: str, task: str) -> None:
    """On a batch of other sizes as well; what is exact stays exact, bit for bit."""
    graph = accelerated(plan).program[task]
    lowered = lower(graph, two.facts[task])
    assert (lowered.task, lowered.kind) == (task, "forward")
    for rows, text in SIZES:
        inputs = batch(task, rows, text)
        with torch.no_grad():
            expected = graph.graph_module(*graph.flatten(inputs))
        found = call(lowered, inputs)
        assert len(expected) == len(found)
        for name, actual, right in zip(found, found.values(), expected, strict=True):
            assert actual.shape == right.shape, name
            torch.testing.assert_close(actual, right, rtol=1e-6, atol=1e-6, msg=name)
            assert lower is lower_forward or torch.equal(actual, right), name


@pytest.mark.parametrize("task", TASKS)
def test_what_is_lowered_for_a_runtime_holds_none_of_our_operators(
    two: Captured, accelerated: Any, train_step: Any, task: str
) -> None:
    graph = accelerated("thinned").program[task]
    kept = lower_program(graph, two.facts[task])

    def ours(lowered: Lowered) -> list[str]:
        return [str(n.target) for n in lowered.module.graph.nodes if "tokgraph" in str(n.target)]

    assert sorted(ours(kept)) == sorted(str(n.target) for n in graph.graph.nodes if "tokgraph" in str(n.target))
    assert len(ours(kept)) > 3
    assert ours(lower_forward(graph, two.facts[task])) == []
    assert ours(train_step("thinned", task)) == []


def all_lowered(two: Captured, accelerated: Any, train_step: Any, rich: Captured, rich_step: Any) -> list[Lowered]:
    found = [rich_step(task) for task in TASKS] + [train_step("thinned", task) for task in TASKS]
    for task in TASKS:
        for lower in (lower_forward, lower_program):
            found += [lower(rich.program[task], rich.facts[task])]
            found += [lower(accelerated("thinned").program[task], two.facts[task])]
    return found


def test_flat_functional_graphs(
    two: Captured, accelerated: Any, train_step: Any, rich: Captured, rich_step: Any
) -> None:
    """Placeholders for state, then inputs; no attributes, nothing in place; outputs that are nodes of their own."""
    for lowered in all_lowered(two, accelerated, train_step, rich, rich_step):
        graph = lowered.module.graph
        graph.lint()
        nodes = list(graph.nodes)
        assert {node.op for node in nodes} == {"placeholder", "call_function", "output"}
        placeholders = [node for node in nodes if node.op == "placeholder"]
        assert nodes[: len(placeholders)] == placeholders
        assert len(placeholders) == len(lowered.state) + len(lowered.inputs)
        assert [node.name for node in placeholders[len(lowered.state) :]] == list(lowered.inputs)
        assert len({node.target for node in placeholders}) == len(placeholders)
        mutable = [n for n in nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]
        assert mutable == []
        outputs = graph.output_node().args[0]
        assert len(outputs) == len(set(outputs)) == len(lowered.outputs) == len(set(lowered.outputs))
        assert {node.op for node in outputs} == {"call_function"}
        assert all(node.users for node in nodes if node.op == "call_function"), "no dead code"


def test_lowering_leaves_the_graph_as_it_was(rich: Captured) -> None:
    graph = rich.program[U]
    before, state = str(graph.graph), copy.deepcopy(rich.model.state_dict())
    lower_train_step(graph, rich.facts[U])
    assert str(graph.graph) == before
    assert all(torch.equal(x, state[name]) for name, x in rich.model.state_dict().items())
    assert all(p.grad is None for p in rich.model.parameters())


def test_state_is_the_models_own(rich: Captured) -> None:
    """The same objects under the names of the ``state_dict``; a tied weight once, under its first name."""
    for task in TASKS:
        lowered = lower_program(rich.program[task], rich.facts[task])
        own = rich.model.state_dict(keep_vars=True)
        named = {name: x for name, x in lowered.state.items() if not name.startswith("_constants.")}
        assert all(own[name] is x for name, x in named.items())
        assert len({id(x) for x in lowered.state.values()}) == len(lowered.state)
    assert {"embed.weight", "head.bias"} <= lower_program(rich.program[U], rich.facts[U]).state.keys()
    assert "head.weight" not in lower_program(rich.program[U], rich.facts[U]).state


def test_names_of_outputs(two: Captured, accelerated: Any, rich: Captured) -> None:
    assert lower_forward(two.program[U], two.facts[U]).outputs == ("loss", "output_1")
    thinned = lower_forward(accelerated("thinned").program[U], two.facts[U])
    assert thinned.outputs == ("loss", "output_1", "rows/output_1")
    reads = lower_forward(rich.program[U], rich.facts[U])
    assert reads.outputs == ("logits", "loss", "more.output_0", "more.output_1.best", "more.output_1.same")
    assert reads.fixed == {5: None, 6: 7}
    draws = lower_forward(rich.program[G], rich.facts[G])
    assert draws.outputs == ("loss", "output_1.output_0", "output_1.output_1.output_0", "output_2")
    assert draws.fixed == {3: "name"}


def test_values_under_their_names(rich: Captured) -> None:
    """Results in results, one tensor returned twice, an input returned: each output is what the forward returns there."""
    inputs = {task: batch(task, 3, 7, torch.float64) for task in TASKS}
    with torch.no_grad():
        reads, draws = read(rich.model, **inputs[U]), draw(rich.model, **inputs[G])
    expected = {
        "logits": reads["logits"],
        "loss": reads["loss"],
        "more.output_0": reads["more"][0],
        "more.output_1.best": reads["more"][1]["best"],
        "more.output_1.same": reads["more"][1]["same"],
    }
    assert_equal(call(lower_forward(rich.program[U], rich.facts[U]), inputs[U]), expected)
    expected = {
        "loss": draws[0],
        "output_1.output_0": draws[1][0],
        "output_1.output_1.output_0": inputs[G]["codes"],
        "output_2": draws[2],
    }
    assert_equal(call(lower_forward(rich.program[G], rich.facts[G]), inputs[G]), expected)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-12, atol=1e-12, msg=name)


def test_rows_of_a_compact_output(two: Captured, accelerated: Any) -> None:
    """They name the rows of the tensor that the whole model returns."""
    for rows, text in SIZES:
        inputs = batch(U, rows, text)
        plan = tg.Plan(exact=True)
        exact = call(lower_forward(two.apply(plan, U).program[U], two.facts[U]), inputs)
        whole = tiny.understand(two.model, **inputs)[1]
        index = exact["rows/output_1"]
        assert index.shape == exact["output_1"].shape[:2]
        assert index.shape[1] < whole.shape[1]
        picked = torch.stack([sample[rows] for sample, rows in zip(whole, index, strict=True)])
        torch.testing.assert_close(exact["output_1"], picked, rtol=1e-5, atol=1e-5)


def test_a_size_that_follows_the_batch_is_not_fixed() -> None:
    """A result that is a number and no tensor, but not the same number for every batch: refused, if not kept."""
    spec = tiny.build(layers=1)
    old = spec.tasks[G]

    def sized(model: tiny.Unified, ids: Tensor, codes: Tensor) -> tuple[Tensor, Any]:
        return tiny.generate(model, ids, codes)[0], ids.shape[1]

    captured = Captured.of(
        tg.ModelSpec(spec.model, {G: tg.Task(sized, old.inputs, old.dynamic, visual_inputs=("codes",))})
    )
    try:
        lowered = lower_forward(captured.program[G], captured.facts[G])
    except tg.TokgraphError:
        return
    assert not any(isinstance(x, torch.SymInt) for x in lowered.fixed.values())


# The training step.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_autograds(two: Captured, accelerated: Any, train_step: Any, plan: str, task: str) -> None:
    """On batches of two sizes; a parameter that the task does not use has no output."""
    lowered, graph = train_step(plan, task), accelerated(plan).program[task]
    unused = {U: ("codes", "code_head"), G: ("patches", "head")}[task]
    used = [name for name, _ in two.model.named_parameters() if name.partition(".")[0] not in unused]
    assert sorted(lowered.outputs) == sorted(["loss", *(f"grad/{name}" for name in used)])
    assert lowered.outputs[0] == "loss"
    for rows, text in SIZES:
        inputs = batch(task, rows, text)
        if plan == "captured":
            loss = {U: tiny.understand, G: tiny.generate}[task](two.model, **inputs)[0]
        else:
            loss = graph.unflatten(graph.graph_module(*graph.flatten(inputs)))[0]
        expected = gradients(two.model, loss)
        found = call(lowered, inputs)
        torch.testing.assert_close(found.pop("loss"), loss.detach(), rtol=1e-5, atol=1e-6)
        actual = {name.removeprefix("grad/"): grad for name, grad in found.items()}
        assert_same_gradients(actual, {name: expected[name] for name in actual}, 2e-5)
        assert all(not expected[name].any() for name in expected.keys() - actual.keys())


@pytest.mark.parametrize("task", TASKS)
def test_tied_and_frozen_parameters(rich: Captured, rich_step: Any, task: str) -> None:
    """One gradient for a weight of two names, none for a frozen one; and the values are those of eager autograd."""
    lowered, model = rich_step(task), rich.model
    loss = {U: lambda x: read(model, **x)["loss"], G: lambda x: draw(model, **x)[0]}[task]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for rows, text in SIZES:
        inputs = batch(task, rows, text, torch.float64)
        value = loss(inputs)
        found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
        expected = {f"grad/{name}": g for (name, _), g in zip(named, found, strict=True) if g is not None}
        assert_equal(call(lowered, inputs), {"loss": value.detach(), **expected})
    assert "grad/embed.weight" in lowered.outputs
    assert "grad/head.weight" not in lowered.outputs
    assert ("grad/codes.weight" in lowered.outputs) == (task == G)
    assert not {"grad/layers.0.mlp.0.weight", "grad/norm.bias"} & set(lowered.outputs)
    assert "layers.0.mlp.0.weight" in lowered.state


def test_a_step_goes_on_from_changed_weights(rich: Captured, rich_step: Any) -> None:
    """Values are read from the state at each call: nothing of them is in the graph."""
    lowered = rich_step(G)
    changed = copy.deepcopy(rich.model)
    with torch.no_grad():
        for p in changed.parameters():
            p.mul_(1.5)
    state = changed.state_dict()
    inputs = batch(G, 3, 6, torch.float64)
    moved = [state.get(name, x) for name, x in lowered.state.items()]
    loss = draw(changed, **inputs)[0]
    found = lowered.module(*moved, *inputs.values())
    expected = torch.autograd.grad(loss, changed.code_head.bias)[0]
    torch.testing.assert_close(found[0], loss.detach())
    torch.testing.assert_close(found[lowered.outputs.index("grad/code_head.bias")], expected)


# Where nodes belong.


def places(lowered: Lowered) -> list[dict[str, Any]]:
    return [lowered_place(n) for n in lowered.module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("task", TASKS)
def test_the_backward_work_of_a_parameter_is_where_the_parameter_is(train_step: Any, task: str) -> None:
    lowered = train_step("thinned", task)
    outputs = dict(zip(lowered.outputs, lowered.module.graph.output_node().args[0], strict=True))
    seen = set()
    for name, node in outputs.items():
        found = re.fullmatch(r"grad/((?:layers\.(\d)\.(\w+))?.*)\.\w+", name)
        if found is None:
            assert name == "loss"
            continue
        place = lowered_place(node)
        assert place["phase"] == "backward", name
        assert place["module"] == found[1], name
        assert place["block"] == (int(found[2]) if found[2] else None), name
        if found[3]:
            kind = {"norm1": "norm", "norm2": "norm", "attention": "attention", "mlp": "ffn"}[found[3]]
            assert place["kind"] == kind, name
        seen.add(place["block"])
    assert seen == {None, 0, 1}


@pytest.mark.parametrize("task", TASKS)
def test_phases(train_step: Any, two: Captured, task: str) -> None:
    """Backward work follows forward work, from the last block to the first; every block has both."""
    lowered = train_step("thinned", task)
    found = places(lowered)
    assert {place["phase"] for place in found} == {"forward", "backward"}
    backward = [place["block"] for place in found if place["phase"] == "backward" and place["block"] is not None]
    assert backward == sorted(backward, reverse=True)
    forward = [place["block"] for place in found if place["phase"] == "forward" and place["block"] is not None]
    assert set(forward) == set(backward) == {0, 1}
    matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    for block in (0, 1):
        count = dict.fromkeys(("forward", "backward"), 0)
        for node in lowered.module.graph.nodes:
            if node.target in matmuls and lowered_place(node)["block"] == block:
                count[lowered_place(node)["phase"]] += 1
        assert count["backward"] == 2 * count["forward"] > 0, "two contractions for each of the forward pass"
    assert {place["phase"] for place in places(lower_forward(two.program[task], two.facts[task]))} == {"forward"}


def test_the_loss_is_forward_work(train_step: Any) -> None:
    lowered = train_step("captured", G)
    loss = lowered.module.graph.output_node().args[0][0]
    assert lowered_place(loss)["phase"] == "forward"
    assert lowered_place(loss)["kind"] == "head"


def test_every_node_of_a_step_knows_its_place(train_step: Any) -> None:
    for task in TASKS:
        nodes = [n for n in train_step("thinned", task).module.graph.nodes if n.op == "call_function"]
        assert [n.name for n in nodes if "tokgraph" not in (n.meta.get("custom") or {})] == []


# The update step.

RULES: dict[str, tuple[Optimizer, Callable[..., torch.optim.Optimizer]]] = {
    "plain": (make_optimizer("sgd", {"lr": 0.1}), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        make_optimizer("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "adamw": (
        make_optimizer("adamw", {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-6}),
        lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6),
    ),
    "adamw's defaults": (make_optimizer("adamw", {}), lambda p: torch.optim.AdamW(p)),
}


@pytest.mark.parametrize("rule", [r if r != "plain" else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_three_updates(rich: Captured, rule: str) -> None:
    """Outputs fed back, on batches of different sizes, against ``torch.optim`` on a copy of the model."""
    ours, torchs = RULES[rule]
    lowered = lower_update_step(rich.program[G], ours, rich.facts[G])
    assert lowered.kind == "update-step"
    model = copy.deepcopy(rich.model)
    optimizer = torchs(model.parameters())
    parameters = dict(model.named_parameters())
    held = dict(lowered.initial)
    assert {name.partition("/")[0] for name in held} == ({"param"} if rule == "plain" else {"param", "state"})
    for rows, text in [(2, 5), (3, 8), (1, 6)]:
        inputs = batch(G, rows, text, torch.float64)
        optimizer.zero_grad()
        loss = draw(model, **inputs)[0]
        loss.backward()
        optimizer.step()
        found = call(lowered, inputs, **held)
        torch.testing.assert_close(found.pop("loss"), loss.detach(), rtol=1e-9, atol=1e-9)
        new = {name.removeprefix("new_"): x for name, x in found.items()}
        assert new.keys() <= held.keys()
        held |= new
        for name, parameter in parameters.items():
            if f"param/{name}" in held:
                torch.testing.assert_close(held[f"param/{name}"], parameter.detach(), rtol=1e-7, atol=1e-7, msg=name)
        for name, x in held.items():
            if name.startswith("state/"):
                _, what, of = name.split("/")
                known = optimizer.state[parameters[of]]
                expected = known[{"momentum": "momentum_buffer"}.get(what, what)]
                torch.testing.assert_close(x, expected, rtol=1e-7, atol=1e-9, msg=name)
    frozen = {"layers.0.mlp.0.weight", "norm.bias"}
    used = {n for n, p in parameters.items() if p.grad is not None}
    assert {name.removeprefix("param/") for name in new if name.startswith("param/")} == used
    assert used.isdisjoint(frozen)
    assert rich.model.embed.weight is not model.embed.weight


def test_an_update_step_takes_what_it_gives(rich: Captured) -> None:
    """Inputs are those that the loss depends on: no other parameter has to be passed along."""
    lowered = lower_update_step(rich.program[G], make_optimizer("sgd", {"momentum": 0.5}), rich.facts[G])
    given = {name.removeprefix("new_") for name in lowered.outputs if name != "loss"}
    assert {name for name in lowered.inputs if "/" in name} == given
    updates = [place for place in places(lowered) if place["phase"] == "update"]
    assert {place["kind"] for place in updates} == {"optimizer"}
    assert {"embed", "layers.0.attention.qkv"} <= {place["module"] for place in updates}


def test_optimizers_by_name() -> None:
    assert set(OPTIMIZERS) == {"sgd", "adamw"}
    assert make_optimizer("sgd", {"lr": 3.0}).lr == 3.0
    with pytest.raises(TypeError, match=r"sgd has no option 'beta1'; it has lr, momentum, weight_decay"):
        make_optimizer("sgd", {"beta1": 0.5})
    with pytest.raises(KeyError):
        make_optimizer("lion", {})


# Plans that draw at random.


def test_the_step_of_a_random_plan_is_an_input(two: Captured, accelerated: Any) -> None:
    task = accelerated("random")[U]
    forward = lower_forward(task.task_graph, two.facts[U])
    train = lower_train_step(task.task_graph, two.facts[U])
    kept = lower_program(task.task_graph, two.facts[U])
    inputs = batch(U, 3, 7)
    losses = set()
    try:
        for step in range(5):
            task.step = step
            with torch.no_grad():
                loss = task.task_graph.unflatten(task.graph_module(*task.task_graph.flatten(inputs)))[0]
            losses.add(loss.item())
            for lowered in (forward, train):
                found = call(lowered, inputs, **{STEP: torch.tensor(step)})
                torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)
    finally:
        task.step = 0
    assert len(losses) > 2, "other steps draw other rows"
    for lowered in (forward, train):
        assert lowered.inputs[-1] == STEP
        assert STEP not in lowered.state
        assert lowered.initial[STEP].item() == 0
    assert STEP in kept.state
    assert STEP not in kept.inputs


def test_plans_that_do_not_draw_have_no_step(two: Captured, accelerated: Any, train_step: Any) -> None:
    for lowered in (train_step("thinned", U), lower_forward(accelerated("thinned").program[U], two.facts[U])):
        assert lowered.initial == {}
        assert lowered.inputs == tuple(two.program[U].task.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_example_step(digits_example: Captured, task: str) -> None:
    """Four blocks with rotary positions, root mean square norms and a gated FFN."""
    thinned = digits_example.apply(tg.Plan((tg.DropSite(task, 1, 3, 0.5, mode="freeze"),), exact=True), task)
    graph = thinned.program[task]
    lowered = lower_train_step(graph, digits_example.facts[task])
    inputs = dict(digits_example.spec.tasks[task].inputs)
    loss = graph.unflatten(graph.graph_module(*graph.flatten(inputs)))["loss"]
    expected = gradients(digits_example.model, loss)
    found = call(lowered, inputs)
    torch.testing.assert_close(found.pop("loss"), loss.detach(), rtol=1e-10, atol=1e-10)
    actual = {name.removeprefix("grad/"): grad for name, grad in found.items()}
    assert len(actual) > 20
    assert_same_gradients(actual, {name: expected[name] for name in actual}, 1e-9)


class Mixed(nn.Module):
    """A decoder behind an image encoder that convolves, as real ones do, and its slice begins before the first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = tiny.Unified(1)
        self.cut = nn.Conv2d(1, 16, (2, 3), stride=(2, 2), padding=(0, 1))


def mixed(model: Mixed, ids: Tensor, pixels: Tensor) -> Tensor:
    features = model.cut(pixels).flatten(2).transpose(1, 2)[:, -20:-1]  # all of seven but the last
    x = model.decoder.embed(ids)
    x = x.masked_scatter((ids == tiny.IMAGE_ID).unsqueeze(-1), features.flatten(0, 1))
    logits = model.decoder.head(model.decoder.backbone(x))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_an_encoder_that_convolves_and_slices_beyond_the_start() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    ids = batch(U, 2, 5)["ids"]
    pixels = torch.rand(2, 1, 2, 14, dtype=torch.float64)
    dynamic = {"ids": {0: "batch"}, "pixels": {0: "batch"}}
    task = tg.Task(mixed, {"ids": ids, "pixels": pixels}, dynamic, tg.VisualTokens.ids(input="ids", equal=9))
    captured = Captured.of(tg.ModelSpec(model, {"t": task}))
    lowered = lower_train_step(captured.program["t"], captured.facts["t"])
    lacking = [
        f"aten.{name}_backward.default" for name in ("convolution", "slice", "masked_scatter", "gelu", "nll_loss")
    ]
    assert not {str(n.target) for n in lowered.module.graph.nodes} & set(lacking)
    for rows in (2, 3):
        inputs = {"ids": batch(U, rows, 5)["ids"], "pixels": torch.rand(rows, 1, 2, 14, dtype=torch.float64)}
        loss = mixed(model, **inputs)
        expected = gradients(model, loss)
        found = call(lowered, inputs)
        torch.testing.assert_close(found.pop("loss"), loss.detach(), rtol=1e-12, atol=1e-12)
        actual = {name.removeprefix("grad/"): grad for name, grad in found.items()}
        assert "cut.weight" in actual
        assert_same_gradients(actual, {name: expected[name] for name in actual}, 1e-10)


def test_results_are_read_as_the_forward_returns_them(rich: Captured) -> None:
    """``fixed`` and the outputs together are the flat result."""
    inputs = batch(U, 2, 5, torch.float64)
    lowered = lower_forward(rich.program[U], rich.facts[U])
    tensors = iter(call(lowered, inputs).values())
    count = len(lowered.outputs) + len(lowered.fixed)
    flat = [lowered.fixed[i] if i in lowered.fixed else next(tensors) for i in range(count)]
    result = pytree.tree_unflatten(flat, rich.program[U].out_spec)
    expected = read(rich.model, **inputs)
    assert list(result) == list(expected)
    assert result["about"] == [None, 7]
    torch.testing.assert_close(result["more"][1]["same"], expected["logits"].detach())

"""Lowered training steps: gradients are autograd's, and every node knows where it belongs."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, assert_same_gradients, gradients
from tests.passes.lower.programs import SIZES, TASKS, G, U, assert_equal, batch, call, draw, places, read
from tokgraph.passes.lower import lower_forward, lower_train_step
from tokgraph.passes.lower.graph import lowered_place


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("plan", [pytest.param("captured", marks=pytest.mark.slow), "thinned"])
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
    assert {place["phase"] for place in places(lower_forward(two.program[task]))} == {"forward"}


def test_the_loss_is_forward_work(train_step: Any) -> None:
    lowered = train_step("captured", G)
    loss = lowered.module.graph.output_node().args[0][0]
    assert lowered_place(loss)["phase"] == "forward"
    assert lowered_place(loss)["kind"] == "head"


def test_every_node_of_a_step_knows_its_place(train_step: Any) -> None:
    for task in TASKS:
        nodes = [n for n in train_step("thinned", task).module.graph.nodes if n.op == "call_function"]
        assert [n.name for n in nodes if "tokgraph" not in (n.meta.get("custom") or {})] == []


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_example_step(digits_example: Captured, task: str) -> None:
    """Four blocks with rotary positions, root mean square norms and a gated FFN."""
    thinned = digits_example.apply(tg.Plan((tg.DropSite(task, 1, 3, 0.5, mode="freeze"),), exact=True), task)
    graph = thinned.program[task]
    lowered = lower_train_step(graph)
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
    lowered = lower_train_step(captured.program["t"])
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


class Latents(nn.Module):
    """Four rows of a sample stand where a mask is true: by a write, or read beside the others."""

    ROWS = 4

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.latents, self.written = nn.Parameter(torch.ones(self.ROWS, 4)), written

    def forward(self, ids: Tensor) -> Tensor:
        h, rows = self.embed(ids), self.latents.expand(ids.shape[0], -1, -1)
        if self.written:
            h = h.clone()
            h[ids == 8] = rows.flatten(0, 1)
            return self.head(h).square().mean()
        taken = h[ids == 8].view(ids.shape[0], self.ROWS, 4) * rows
        return self.head(h).square().mean() + taken.square().mean()


@pytest.mark.parametrize("written", [True, False])
def test_rows_of_a_mask_are_a_multiple_of_the_samples(written: bool) -> None:
    """PyTorch's rounding of bounds has four times the samples past any 64-bit number."""
    model = Latents(written)
    ids = torch.arange(18).reshape(2, 9) % 7
    ids[:, 2:6] = 8
    more = torch.arange(33).reshape(3, 11) % 7
    more[:, 3:7] = 8
    visual = tg.VisualTokens.ids(input="ids", equal=8)
    open_sizes = {"ids": {0: "batch", 1: "tokens"}}
    task = tg.Task(lambda model, ids: model(ids), {"ids": ids}, dynamic=open_sizes, visual=visual, reads="text")
    program = tg.capture(tg.ModelSpec(model, {"read": task}))
    assert {d.name for d in program["read"].dimensions if d.symbol is not None} == {"batch", "tokens"}
    lowered = lower_train_step(program["read"])
    for batch_ids in (ids, more):
        loss = model(batch_ids)
        found = call(lowered, {"ids": batch_ids})
        torch.testing.assert_close(found.pop("loss"), loss.detach())
        assert_equal(found, {f"grad/{name}": g for name, g in gradients(model, loss).items()})

"""Regions without gradients, hooks, functions with a backward pass of their own: kept, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import tokgraph as tg
from tests.field.models import FEATURES, VLM, assert_same, batch, seeded, spec, understanding
from tokgraph.errors import Where

HIDDEN = 16


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("average", torch.zeros(HIDDEN))

    def features(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Frozen(Tower):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Inference(Tower):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = self.features(x)
        return y.clone()


class Switched(Tower):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y = self.features(x)
        torch.set_grad_enabled(before)
        return y


class Nested(Tower):
    """Gradients on again inside, and values that pass through a region untouched."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        with torch.no_grad():
            z, w = torch.tanh(y), y
            with torch.enable_grad():
                v = self.two(z) + 3 * y
        return z + w + v


class InAutocast(Tower):
    """Torch's export forgets a mode inside a region of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            with torch.no_grad():
                y = self.features(x)
            return y + self.features(x)


class Data(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return y + (y.round() - y).data


class DetachedInPlace(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.features(x))
        z = 2 * y
        y.detach_()
        return y + z


class Average(Tower):
    """A code book's running average, changed where there are no gradients, and read where there are."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)
        return y - self.average


KEPT = [
    Frozen, Nested, InAutocast,
    *(pytest.param(tower, marks=pytest.mark.slow) for tower in (Inference, Switched, DetachedInPlace, Average, Data)),
]  # fmt: skip


@pytest.mark.parametrize("tower", KEPT, ids=lambda t: t.__name__)
def test_no_gradient_flows_where_there_is_none(tower: type[Tower]) -> None:
    model = seeded(lambda: VLM(tower=tower()))
    program = tg.capture(spec(model))
    b = batch(seed=3)
    for plan in (tg.Plan(), tg.Plan(exact=True)):
        accelerated = tg.apply(program, plan)
        assert_same(model, lambda: understanding(model, **b), lambda a=accelerated: a["u"](**b))


@pytest.mark.slow
def test_a_detached_tower_has_no_backward_pass_in_the_costs() -> None:
    costs = {}
    for tower in (Tower, Frozen):
        program = tg.capture(spec(seeded(lambda t=tower: VLM(tower=t()))))
        facts = tg.analyze(program)
        costs[tower] = tg.costs(program, facts)["u"].at().total()
    assert costs[Frozen].forward_flops == costs[Tower].forward_flops
    assert costs[Frozen].backward_flops < costs[Tower].backward_flops


@pytest.mark.slow
def test_a_frozen_tower_has_no_gradient_in_onnx_and_in_saved_programs(tmp_path: Path) -> None:
    model = seeded(lambda: VLM(tower=Frozen()))
    for block in model.blocks:
        block.k.bias.requires_grad_(False)  # its gradient is rounding, which no two runtimes share
    accelerated = tg.optimize(spec(model), "exact")
    found = accelerated.export_onnx(tmp_path / "onnx", "train-step")
    (file,) = found["files"].values()
    assert set(file["without_gradient"]) >= {"tower.one.weight", "tower.two.bias"}
    accelerated.save(tmp_path / "saved")
    back = tg.load_accelerated(tmp_path / "saved")
    loss = back["u"](**batch())
    loss.backward()
    gradients = {name: p.grad for name, p in back.named_parameters()}
    assert gradients["tower.one.weight"] is None or not gradients["tower.one.weight"].any()
    assert gradients["projector.weight"].any()


class Scale(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.1 * g


class Scaled(Tower):
    def forward(self, x: Tensor) -> Tensor:
        return Scale.apply(self.features(x))


class Unscaled(Tower):
    """No gradient is asked of the function, so that none is lost."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        with torch.no_grad():
            z = Scale.apply(y)
        return y + z


class ByHand(Tower):
    """What the error for :class:`Scaled` says to write."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return y * 0.1 + (y - y * 0.1).detach()


class TensorHook(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if y.requires_grad:
            y.register_hook(lambda g: 0.1 * g)
        return y


class NodeHook(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if y.grad_fn is not None:
            y.grad_fn.register_prehook(lambda gs: tuple(0.1 * g for g in gs))
        return y


class ByMode(Tower):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) * (0.5 if torch.is_grad_enabled() else 1.0)


class ByRequirement(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return 2 * y if y.requires_grad else y


class Clamped(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        with torch.no_grad():
            y[:, :2].clamp_(-0.1, 0.1)
        return y


class ClampedData(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        y.data.clamp_(-0.1, 0.1)
        return y


class AssignedData(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.features(x))
        y.data = y.detach().clamp(-0.1, 0.1)
        return y


REFUSED = [
    (Scaled, "torch.autograd.Function Scale"),
    (TensorHook, "registers a hook on the gradient"),
    (NodeHook, "the gradient of .* differs"),
    (ByMode, r"something else under torch.no_grad\(\)"),
    pytest.param(ByRequirement, r"something else under torch.no_grad\(\)", marks=pytest.mark.slow),
    (Clamped, "in place, past autograd"),
    (ClampedData, "in place, past autograd"),
    pytest.param(AssignedData, r"assigns to .data", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("tower", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_a_graph_would_lose_is_refused_by_name(tower: type[Tower], message: str) -> None:
    with pytest.raises(tg.CaptureError, match=message) as raised:
        tg.capture(spec(seeded(lambda: VLM(tower=tower()))))
    assert raised.value.help
    if tower not in (NodeHook, ByRequirement):  # which only the comparison finds
        assert raised.value.where is not None
        assert raised.value.where.module == "tower"
        assert Path(str(raised.value.where.source).rpartition(":")[0]) == Path(__file__)


@pytest.mark.parametrize("tower", [pytest.param(Unscaled, marks=pytest.mark.slow), ByHand])
def test_what_does_the_same_in_plain_operators_is_kept(tower: type[Tower]) -> None:
    model, b = seeded(lambda: VLM(tower=tower())), batch(seed=3)
    accelerated = tg.apply(tg.capture(spec(model)), tg.Plan(exact=True))
    assert_same(model, lambda: understanding(model, **b), lambda: accelerated["u"](**b))


def test_backward_hooks_of_modules_are_refused_those_of_parameters_kept() -> None:
    model, seen = seeded(VLM), []
    handle = model.blocks[1].norm1.register_full_backward_hook(lambda m, i, o: tuple(0.1 * g for g in i))
    with pytest.raises(tg.CaptureError, match="backward hook of LayerNorm") as raised:
        tg.capture(spec(model))
    assert raised.value.where == Where(module="blocks.1.norm1")
    handle.remove()
    everywhere = nn.modules.module.register_module_full_backward_hook(lambda m, i, o: None)
    try:
        with pytest.raises(tg.CaptureError, match="for all modules"):
            tg.capture(spec(model))
    finally:
        everywhere.remove()
    model.head.weight.register_hook(lambda g: (seen.append("hook"), 0.5 * g)[1])
    model.head.weight.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
    accelerated = tg.apply(tg.capture(spec(model)), tg.Plan(exact=True))
    assert seen == []  # capture runs neither
    b = batch(seed=3)
    assert_same(model, lambda: understanding(model, **b), lambda: accelerated["u"](**b))
    assert seen == ["hook", "after"] * 2


def test_a_branch_on_the_mode_that_changes_nothing_is_kept() -> None:
    class Same(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return self.features(x) if torch.is_grad_enabled() else self.two(torch.tanh(self.one(x)))

    assert tg.capture(spec(seeded(lambda: VLM(tower=Same()))))["u"].check.error == 0.0


@pytest.mark.parametrize("mode", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode])
def test_the_mode_around_capture_does_not_count(mode: Any) -> None:
    model, b = seeded(VLM), batch(seed=3)
    with mode():
        accelerated = tg.optimize(spec(model, inputs=batch()), "exact")
    assert accelerated.verification.passed
    assert accelerated.report["tasks"]["u"]["activation_bytes"]["before"] > 0
    assert_same(model, lambda: understanding(model, **b), lambda: accelerated["u"](**b))


@pytest.mark.slow
def test_parameters_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = VLM()
    with pytest.raises(tg.CaptureError, match="made under torch.inference_mode"):
        tg.capture(spec(model))


def test_a_model_of_which_nothing_trains_is_verified() -> None:
    model = seeded(VLM).requires_grad_(False)
    accelerated = tg.optimize(spec(model), "exact")
    assert accelerated.verification.passed
    assert accelerated.captured["u"].check.gradients == 0
    assert accelerated.report["tasks"]["u"]["activation_bytes"]["ratio"] == 1.0

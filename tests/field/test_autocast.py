"""Autocast around the call, as trainers and hand-written loops have it: eager's result under the same autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests.field.models import VLM, assert_same, batch, cross_entropy, seeded, spec, understanding


def z_loss(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids, patches).float()  # does nothing outside of autocast
    return cross_entropy(logits, labels) + 0.1 * logits.logsumexp(-1).pow(2).mean()


@pytest.mark.parametrize("forward", [understanding, z_loss])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_autocast_around_the_call(dtype: torch.dtype, forward) -> None:  # type: ignore[no-untyped-def]
    model, b = seeded(VLM), batch(seed=3)
    acc = tg.optimize(spec(model, forward), "none", verify=False)

    def cast(call):  # type: ignore[no-untyped-def]
        def inside() -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return call()

        return inside

    assert_same(model, cast(lambda: forward(model, **b)), cast(lambda: acc["u"](**b)), 4 * torch.finfo(dtype).eps)
    assert_same(model, lambda: forward(model, **b), lambda: acc["u"](**b))  # and outside of it again


def test_a_region_around_capture_does_not_count() -> None:
    model, b = seeded(VLM), batch(seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        acc = tg.optimize(spec(model), "exact")
    assert_same(model, lambda: understanding(model, **b), lambda: acc["u"](**b))


@pytest.mark.slow
def test_scaled_gradients() -> None:
    """``GradScaler`` multiplies the loss and divides the gradients."""
    model, b = seeded(VLM), batch(seed=3)
    acc = tg.optimize(spec(model), "exact", verify=False)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    before = model.head.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = acc["u"](**b)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    mine = model.head.weight.grad.clone()
    optimizer.zero_grad()
    understanding(model, **b).backward()
    torch.testing.assert_close(mine, model.head.weight.grad, rtol=0, atol=2e-2 * float(mine.abs().max()))
    scaler.step(optimizer)
    assert not torch.equal(before, model.head.weight)


def test_a_saved_program_is_of_no_region(tmp_path) -> None:  # type: ignore[no-untyped-def]
    acc = tg.optimize(spec(seeded(VLM)), "exact", verify=False)
    acc.save(tmp_path / "saved")
    loaded = tg.load_accelerated(tmp_path / "saved")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(tg.TokgraphError, match="autocast") as raised:
        loaded["u"](**batch())
    assert raised.value.code == "TG012"

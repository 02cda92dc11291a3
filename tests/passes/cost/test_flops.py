"""FLOPs against hand calculations and against the counter of the eager model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokgraph as tg
from tests import tiny
from tests.passes import models
from tests.passes.models import VOCABULARY, Decoder
from tests.passes.tools import TASKS, captured, site, traced
from tokgraph.passes.cost.flops import Flops, count_flops

B, S, H = 2, models.TOKENS, 4


def matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def test_a_linear_layer() -> None:
    """Backward: one product for the weight; the input needs no gradient."""
    layer = torch.nn.Linear(3, 5)
    spec_inputs = {"x": torch.rand(2, 7, 3)}
    task = tg.Task(lambda model, x: model(x).sum(), spec_inputs, visual=tg.VisualTokens.positions(slice(1)))
    (graph,) = tg.capture(tg.ModelSpec(layer, {"t": task})).values()
    product = matmul(2 * 7, 3, 5)
    assert count_flops(graph) == Flops(product, product)
    assert count_flops(graph).total == 2 * product


@pytest.mark.parametrize("block", [models.PreNorm, models.Eager])
def test_one_block_by_hand(block: type[torch.nn.Module]) -> None:
    """Four projections, scores, weighted sum, FFN and head; every product is two more in the backward pass.

    The exception is none: the embedding is trained, so the first projections' inputs need gradients as well.
    """
    (graph,) = tg.capture(models.spec(block, depth=1)).values()
    projections = 4 * matmul(B * S, H, H)
    attention = 2 * B * matmul(S, H, S)
    ffn = 2 * matmul(B * S, H, 2 * H)
    head = matmul(B * S, H, VOCABULARY)
    forward = projections + attention + ffn + head
    assert count_flops(graph) == Flops(forward, 2 * forward)


def test_frozen_parameters_cost_no_backward() -> None:
    spec = models.spec(models.PreNorm, depth=1)
    for parameter in spec.model.parameters():
        parameter.requires_grad_(False)
    (graph,) = tg.capture(spec).values()
    assert count_flops(graph).backward == 0
    spec.model.get_submodule("head").weight.requires_grad_(True)
    (graph,) = tg.capture(spec).values()
    assert count_flops(graph).backward == matmul(B * S, H, VOCABULARY)


def eager_flops(spec: tg.ModelSpec, task: str) -> Flops:
    """What the counter says of the user's forward, on real tensors."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = spec.tasks[task].forward(spec.model, **spec.tasks[task].inputs)
        forward = counter.get_total_flops()
        result[0].backward()
        total = counter.get_total_flops()
    spec.model.zero_grad(set_to_none=True)
    return Flops(forward, total - forward)


@pytest.mark.parametrize("task", TASKS)
def test_the_captured_graph_costs_what_the_eager_model_costs(task: str) -> None:
    spec = tiny.build(layers=2, dtype="float64", dynamic=False)
    assert count_flops(captured(task).graph) == eager_flops(spec, task)


@pytest.mark.parametrize("task", TASKS)
def test_thinning_saves_exactly_the_work_of_the_rows_left_out(task: str) -> None:
    """A hidden span at keep 0.5 leaves out 3 of 11 rows of the tiny model, in everything its block computes."""
    found = captured(task)
    rows, gone, hidden, batch = 11, 3, 16, 2

    def block(n: int) -> int:
        return batch * (matmul(n, hidden, 8 * hidden) + 2 * 2 * matmul(n, 8, n))  # qkv, out and FFN: 3 + 1 + 2 + 2

    before, after = count_flops(found.graph), count_flops(found.rewritten(site(0, 1, 0.5)))
    assert before.forward - after.forward == block(rows) - block(rows - gone)
    assert before.backward - after.backward == 2 * (block(rows) - block(rows - gone))


def test_the_model_need_not_have_storage() -> None:
    spec = models.spec(models.PreNorm, depth=1)
    (graph,) = tg.capture(spec).values()
    on_meta = tg.ModelSpec(models.decoder(models.PreNorm, depth=1).to("meta"), spec.tasks)
    (meta,) = tg.capture(on_meta).values()
    assert count_flops(meta) == count_flops(graph)


def test_counting_draws_nothing_and_changes_nothing() -> None:
    """No gradient is left behind, no random number used."""
    found = captured("understanding")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    count_flops(found.graph)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in found.graph.graph_module.parameters())


def test_a_graph_without_parameters() -> None:
    graph = traced(lambda x, w: (F.linear(x, w).sum(),), torch.rand(2, 3), torch.rand(4, 3))
    assert count_flops(graph) == Flops(matmul(2, 3, 4), 0)


def test_dropout_costs_nothing() -> None:
    class Dropping(models.PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, training=True))

    (plain,) = tg.capture(models.spec(models.PreNorm, depth=1)).values()
    spec = models.spec(Dropping, depth=1)
    assert isinstance(spec.model, Decoder)
    task = tg.Task(models.embedded, spec.tasks["t"].inputs, visual=tg.VisualTokens.positions(slice(1, 3)))
    (dropping,) = tg.capture(tg.ModelSpec(spec.model, {"t": task})).values()
    assert count_flops(dropping) == count_flops(plain)

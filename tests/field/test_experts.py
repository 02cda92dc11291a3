"""Experts as models route tokens to them, over merged axes: each row is its own, whatever way it takes and comes back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends import debugging
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import HIDDEN, TASK, Block
from tests.harness import gradients
from tokgraph.ir.node import value
from tokgraph.passes.cost.roofline import roofline
from tokgraph.passes.lower import places_of

EXPERTS, CHOSEN, INNER = 4, 2, 8
Routed = Callable[["Experts", Tensor], Tensor]


class Experts(Block):
    """A layer whose feed-forward net is a few of several."""

    def __init__(self, routed: Routed) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
        self.routed = routed

    def choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.gate(rows).softmax(-1).topk(CHOSEN, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = x + self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        return x + self.routed(self, self.norm2(x).reshape(-1, HIDDEN)).reshape(x.shape)


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gathered(layer: Experts, rows: Tensor) -> Tensor:
    """Every row with copies of its experts' matrices."""
    weights, chosen = layer.choose(rows)
    x, chosen = rows.repeat_interleave(CHOSEN, dim=0), chosen.reshape(-1)
    x = gated(torch.bmm(layer.up[chosen], x.unsqueeze(-1)).squeeze(-1))
    x = torch.bmm(layer.down[chosen], x.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    return x.view(rows.shape[0], CHOSEN, -1).sum(1)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    from transformers.integrations import moe  # noqa: F401  (registers its operator)

    return torch.ops.transformers.grouped_mm_fallback(x, weight.mT, ends)


def sorted_and_put_back(layer: Experts, rows: Tensor) -> Tensor:
    weights, chosen = layer.choose(rows)
    groups, order = torch.sort(chosen.reshape(-1))
    ends = torch.histc(groups.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0, dtype=torch.int32)
    x = grouped(gated(grouped(rows[order // CHOSEN], layer.up, ends)), layer.down, ends)
    x = x * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return x[inverse].view(rows.shape[0], CHOSEN, -1).sum(1)


def sorted_and_added(layer: Experts, rows: Tensor) -> Tensor:
    weights, chosen = layer.choose(rows)
    order = chosen.flatten().argsort(stable=True)
    ends = F.one_hot(chosen.flatten(), EXPERTS).sum(0).cumsum(0).to(torch.int32)
    x = grouped(gated(grouped(rows.index_select(0, order // CHOSEN), layer.up, ends)), layer.down, ends)
    return torch.zeros_like(rows).index_add(0, order // CHOSEN, x * weights.flatten()[order][:, None])


def repeated(layer: Experts, rows: Tensor) -> Tensor:
    """All rows for every expert, times its share of them."""
    best, chosen = layer.gate(rows).topk(1, dim=1)
    share = torch.full_like(layer.gate(rows), -torch.inf).scatter_(1, chosen, best).sigmoid()
    x = (rows.repeat(EXPERTS, 1) * share.transpose(0, 1).reshape(-1, 1)).view(EXPERTS, -1, HIDDEN)
    x = torch.bmm(gated(torch.bmm(x, layer.up.mT)), layer.down.mT).view(-1, HIDDEN)
    return x.reshape(EXPERTS, -1, HIDDEN).sum(0)


def by_einsum(layer: Experts, rows: Tensor) -> Tensor:
    weights, chosen = layer.choose(rows)
    share = (F.one_hot(chosen, EXPERTS).to(weights.dtype) * weights.unsqueeze(-1)).sum(1)
    x = torch.einsum("tef,edf->ted", gated(torch.einsum("td,efd->tef", rows, layer.up)), layer.down)
    return (x * share.unsqueeze(-1)).sum(1)


def all_of_them(layer: Experts, rows: Tensor) -> Tensor:
    weights, chosen = layer.choose(rows)
    found = torch.zeros_like(rows)
    for number in range(EXPERTS):
        x = F.linear(gated(F.linear(rows, layer.up[number])), layer.down[number])
        found = found + x * (weights * (chosen == number)).sum(-1, keepdim=True)
    return found


def of_limited_number(layer: Experts, rows: Tensor) -> Tensor:
    """An expert takes so many rows and no more, the first ones: whether a row is among them depends on all before it."""
    weights, chosen = layer.choose(rows)
    taken = F.one_hot(chosen, EXPERTS)
    place = taken.flatten(0, 1).cumsum(0).view_as(taken)
    share = (((place <= 8) & (taken > 0)).to(weights.dtype) * weights.unsqueeze(-1)).sum(1)
    return by_einsum(layer, rows) * share.sum(-1, keepdim=True)


def sorted_with_a_limit(layer: Experts, rows: Tensor) -> Tensor:
    _, chosen = layer.choose(rows)
    groups, order = torch.sort(chosen.reshape(-1))
    ends = torch.histc(groups.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0, dtype=torch.int32)
    x = grouped(gated(grouped(rows[order // CHOSEN], layer.up, ends)), layer.down, ends)
    place = torch.arange(order.shape[0]) - F.pad(ends, (1, -1))[groups]
    x = x * (place < 8).unsqueeze(-1)
    return torch.zeros_like(rows).index_add(0, order // CHOSEN, x)


def facts_of(routed: Routed, dynamic: bool = False) -> tuple[m.Model, tg.Facts]:
    model = m.model(partial(Experts, routed), layers=2)
    return model, tg.analyze(tg.capture(m.spec(model, m.batch(), dynamic=dynamic)))


def slow(*routed: Routed) -> list[object]:
    return [pytest.param(one, marks=pytest.mark.slow) for one in routed]


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "routed", [gathered, *slow(sorted_and_put_back, sorted_and_added, repeated, by_einsum, all_of_them)]
)
def test_drops_among_experts_are_those_by_hand(routed: Routed, dynamic: bool) -> None:
    model, facts = facts_of(routed, dynamic)
    accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 0, 1, 0.5),)))
    tg.verify(accelerated).raise_if_failed()
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = m.loss(model, **inputs, span=range(1), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("routed", [of_limited_number, sorted_with_a_limit])
def test_experts_that_take_a_limited_number_of_rows_are_refused(routed: Routed) -> None:
    _, facts = facts_of(routed)
    with pytest.raises(tg.IllegalRewriteError, match="block 0"):
        tg.apply(facts, tg.Plan((tg.DropSite(TASK, 0, 1, 0.5),)))


def test_products_of_experts_are_the_models_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In reports, and in compiled code: a row meets its own experts only."""
    model, facts = facts_of(sorted_and_put_back)
    task = tg.apply(facts, tg.make_plan(facts, "none"))[TASK]
    graph = task.task_graph
    products = [node.name for node in graph.graph.nodes if "grouped_mm" in str(node.target)]
    assert {places_of(graph)[name].kind for name in products} == {"ffn"}
    rates = tg.Rates("slow to multiply", {torch.float64: 1.0}, 1e9)
    assert {time.bound for time in roofline(graph, rates) if time.node in products} == {"matmul"}

    compiled: list[torch.fx.GraphModule] = []
    run = debugging.boxed_nop
    monkeypatch.setattr(debugging, "boxed_nop", lambda found, inputs: compiled.append(found) or run(found, inputs))
    expected = gradients(model, task(**m.batch()))
    found = gradients(model, task.compile(backend="aot_eager")(**m.batch()))
    assert all(torch.allclose(found[name], expected[name], rtol=1e-10) for name in expected)
    once = 2 * m.batch()["ids"].numel() * CHOSEN * (3 * INNER * HIDDEN) * len(model.layers)
    assert [grouped_flops(one) for one in compiled] == [once, 2 * once]


def grouped_flops(graph_module: torch.fx.GraphModule) -> int:
    products = [node for node in graph_module.graph.nodes if str(node.target).startswith("tokgraph.grouped_mm")]
    return sum(
        flop_registry[x.target.overloadpacket](*torch.fx.map_arg(x.args, value), out_val=value(x)) for x in products
    )

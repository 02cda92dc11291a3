"""Sites are placed by depth only where blocks are layers, in every task; frozen rows are what they were before the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import TASK, Block, Model
from tokgraph.planning import Policy
from tokgraph.report.summary import summarise


class Later(Model):
    """Image features come in again after the first layers (DeepStack)."""

    def forward(self, ids: Tensor, patches: Tensor, span: range = range(0), hidden: Tensor | None = None) -> Tensor:
        x = self.enter(ids, patches)
        for number, layer in enumerate(self.layers):
            x = torch.where(hidden.unsqueeze(-1), x, layer(x, hidden)) if number in span else layer(x)
            if number == 1:
                again = torch.zeros_like(x).masked_scatter((ids == m.IMAGE_ID).unsqueeze(-1), self.patch(patches))
                x = x + again
        return self.read(x)


class Appended(Model):
    """Queries of the model's own are appended to the tokens before the last layers."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__(blocks)
        self.queries = nn.Parameter(torch.randn(2, m.HIDDEN))

    def forward(self, ids: Tensor, patches: Tensor) -> Tensor:
        x = self.enter(ids, patches)
        for number, layer in enumerate(self.layers):
            if number == 2:
                x = torch.cat([x, self.queries.expand(len(x), -1, -1)], 1)
            x = layer(x)
        return self.read(x[:, :-2])


class Repeating(Block):
    """Attends three times by the same projections."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        for _ in range(3):
            x = x + self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        return x + self.feed(self.norm2(x))


BROKEN = {
    "appended": (lambda: m.model(layers=4, cls=Appended), m.loss, r"2 of 4 .* 2 blocks .*layers.2 .. layers.3"),
    "repeated": (
        lambda: m.model(Repeating, layers=1),
        m.loss,
        r"block 0 holds 3 of 3 .*layers.0.*one module is used for several layers",
    ),
}
PLANS = ("fastv", "pyramiddrop", "random-ltd", "dart", "task-specific", "himix", "himix-hmgen-share-all", "shared")


@pytest.mark.parametrize(
    "how",
    [h if h == "appended" else pytest.param(h, marks=pytest.mark.slow) for h in BROKEN],
)
def test_no_site_is_placed_where_blocks_are_no_layers(how: str) -> None:
    make, forward, why = BROKEN[how]
    program = tg.capture(m.spec(make(), m.batch(), forward))
    facts = tg.analyze(program)
    for policy in ("none", "exact"):
        tg.verify(tg.apply(facts, tg.make_plan(facts, policy))).raise_if_failed()
    by_hand = tg.Plan((tg.DropSite(TASK, 0, 1),))
    for plan in (*PLANS, by_hand):
        with pytest.raises(tg.PlanError, match=why) as caught:
            tg.apply(facts, plan if isinstance(plan, tg.Plan) else tg.make_plan(facts, plan))
        assert caught.value.where is not None
        assert "layers." in str(caught.value.where.module)
        assert "0 <= start" not in str(caught.value)
    outside = summarise(facts)["tasks"][TASK]["attention_outside_blocks"]
    assert len(outside) == len(facts[TASK].unplaced)
    assert all("layers." in found["module"] for found in outside)


def test_features_that_come_in_again_are_no_layer() -> None:
    model = m.model(layers=4, cls=Later)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch())))
    assert [b.module for b in facts[TASK].blocks] == [f"layers.{number}" for number in range(4)]
    accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 2, 3, 0.5),)))
    other = m.batch((5, 1), seed=3)
    by_hand = m.loss(model, **other, span=range(2, 3), hidden=m.dropped(other["ids"]))
    assert m.worst(accelerated[TASK](**other), by_hand, model) < 1e-8


def test_a_policy_of_the_users_own_is_checked_by_its_plan() -> None:
    @dataclass(frozen=True)
    class Mine(Policy):
        name: ClassVar[str] = "field-mine"

        def decide(self, facts: tg.Facts) -> tg.Plan:
            return tg.Plan((tg.DropSite(TASK, 0, 1),))

    facts = tg.analyze(tg.capture(m.spec(m.model(Repeating, layers=1), m.batch())))
    with pytest.raises(tg.PlanError, match="no site can be placed by depth"):
        tg.make_plan(facts, Mine())


class TwoAttentions(Block):
    """The second attention reads what the first has added."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(m.HIDDEN, 3 * m.HIDDEN)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = x + self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        x = x + self.attend(*self.second(self.norm1(x)).chunk(3, -1), hidden)
        return x + self.feed(self.norm2(x))


class SideBySide(TwoAttentions):
    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        one, other = (self.attend(*made(h).chunk(3, -1), hidden) for made in (self.qkv, self.second))
        x = x + self.out(one - 0.5 * other)
        return x + self.feed(self.norm2(x))


class Sandwich(Block):
    """A feed-forward net before the attention, too (macaron)."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return super().forward(x + torch.tanh(self.feed(self.norm1(x))), hidden)


@pytest.mark.parametrize("block", [TwoAttentions, pytest.param(Sandwich, marks=pytest.mark.slow)])
def test_frozen_rows_may_not_have_changed_in_the_block(block: type[Block]) -> None:
    """Hidden ones are as right as ever, and every block is a layer."""
    model, inputs = m.model(block), m.batch()
    facts = tg.analyze(tg.capture(m.spec(model, inputs)))
    assert [b.module for b in facts[TASK].blocks] == ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(tg.IllegalRewriteError, match="what the block has added"):
        tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 2, mode="freeze"),)))
    accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),)))
    tg.verify(accelerated).raise_if_failed()
    other = m.batch((5, 1), seed=3)
    by_hand = m.loss(model, **other, span=range(1, 2), hidden=m.dropped(other["ids"]))
    assert m.worst(accelerated[TASK](**other), by_hand, model) < 1e-8


@pytest.mark.slow
def test_attentions_side_by_side_freeze() -> None:
    facts = tg.analyze(tg.capture(m.spec(m.model(SideBySide), m.batch())))
    accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 2, mode="freeze"),)))
    tg.verify(accelerated).raise_if_failed()


def skipping(model: Model, ids: Tensor, patches: Tensor, labels: Tensor, first: int = 0) -> Tensor:
    x = model.enter(ids, patches)
    for layer in model.layers[first:]:
        x = layer(x)
    return m.cross_entropy(model.read(x), labels)


def two_tasks(first: int) -> tg.Facts:
    model, inputs = m.model(layers=4), m.batch()
    spec = m.spec(model, inputs)
    other = m.spec(model, inputs, partial(skipping, first=first)).tasks[TASK]
    return tg.analyze(tg.capture(tg.ModelSpec(model, {**spec.tasks, "other": other})))


@pytest.mark.slow
def test_shared_wants_the_same_layers_in_all_tasks() -> None:
    with pytest.raises(tg.PlanError, match=r"block 1 of task 'understanding' and in block 0 of task 'other'"):
        tg.make_plan(two_tasks(first=1), "shared")


@pytest.mark.slow
def test_shared_takes_tasks_of_the_same_layers() -> None:
    assert len(tg.make_plan(two_tasks(first=0), "shared").sites) == 2


class Looking(nn.Module):
    """Cross-attention of tokens to image features."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(m.HIDDEN, m.HIDDEN), nn.Linear(m.FEATURES, m.HIDDEN)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        q, k = (m.heads(y).transpose(1, 2) for y in (self.query(x), self.key(features)))
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


class Beside(Model):
    """Cross-attentions in a list of their own, before or after their layers, and not before each."""

    at: tuple[int, ...] = (0, 1, 2)
    after = False

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__(blocks)
        self.cross = nn.ModuleList(Looking() for _ in self.at)

    def forward(self, ids: Tensor, patches: Tensor, span: range = range(0), hidden: m.Hidden = None) -> Tensor:
        x = self.enter(ids, patches)
        for number, layer in enumerate(self.layers):
            before, here = x, hidden if number in span else None
            looking = self.cross[self.at.index(number)] if number in self.at else None
            if looking is not None and not self.after:
                x = x + looking(x, patches)
            x = layer(x, here)
            if looking is not None and self.after:
                x = x + looking(x, patches)
            if here is not None:
                x = torch.where(here.unsqueeze(-1), before, x)
        return self.read(x)


class BesideAfter(Beside):
    after = True


class BesideSome(Beside):
    at = (0, 2)


@pytest.mark.parametrize("cls", [Beside, pytest.param(BesideAfter, marks=pytest.mark.slow)])
def test_what_a_list_of_its_own_adds_belongs_to_the_layer_of_its_number(cls: type[Beside]) -> None:
    model = m.model(cls=cls)
    accelerated = tg.optimize(m.spec(model, m.batch()), tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),)))
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = m.loss(model, **inputs, span=range(1, 2), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10


def test_no_site_is_placed_where_a_part_may_be_of_either_layer() -> None:
    facts = tg.analyze(tg.capture(m.spec(m.model(cls=BesideSome), m.batch())))
    tg.verify(tg.apply(facts, tg.make_plan(facts, "exact"))).raise_if_failed()
    with pytest.raises(tg.PlanError, match=r"cross\.1 adds to the residual stream between two layers") as caught:
        tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),)))
    assert "test_depth.py" in str(caught.value.where)
    assert summarise(facts)["tasks"][TASK]["between_blocks"][0]["module"] == "cross.1"

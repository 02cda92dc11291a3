"""Layers are found in decoders of every structure, and drops in them are those of a loop by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field import structures as s
from tests.field.decoder import TASK

QUICK = {"features again", "experts", "two streams"}
"""What the default run looks at; the others take longer than they tell."""
STRUCTURES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in s.STRUCTURES]
MIDDLE, LAST = range(1, 3), range(2, 4)


def facts_of(structure: str, dynamic: bool = False) -> tuple[s.Looped, tg.Facts]:
    model = s.model(structure)
    return model, tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss, dynamic=dynamic)))


def gone(ids: Tensor) -> Tensor:
    """What a site without restore drops at a ratio of 0.5: the last image row is demanded, and one of the others stays."""
    visual = ids == m.IMAGE_ID
    free = visual & F.pad(visual[:, 1:], (0, 1))
    return free & (free.cumsum(1) > 1)


def worst(facts: tg.Facts, model: s.Looped, site: tg.DropSite, exact: bool = False) -> float:
    """The largest difference from the loop by hand, on the example batch and on another one."""
    accelerated = tg.apply(facts, tg.Plan((site,), exact=exact))
    tg.verify(accelerated).raise_if_failed()
    span = range(site.start, len(model.layers) if site.end is None else site.end)
    found = []
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        dropped = m.dropped(inputs["ids"]) if site.restore else gone(inputs["ids"])
        by_hand = model.loss(**inputs, span=span, dropped=dropped, hide=site.mode == "hide")
        found.append(m.worst(accelerated[TASK](**inputs), by_hand, model))
    return max(found)


SITES = {
    "hide": tg.DropSite(TASK, 1, 3, 0.5),
    "freeze": tg.DropSite(TASK, 0, 2, 0.5, mode="freeze"),
    "gone": tg.DropSite(TASK, 2, 4, 0.5, restore=False),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_block_is_a_layer_and_drops_are_those_by_hand(structure: str) -> None:
    model, facts = facts_of(structure)
    assert [block.module for block in facts[TASK].blocks] == [f"layers.{number}" for number in range(4)]
    assert (facts[TASK].unplaced, facts[TASK].between) == ((), ())
    for name, site in SITES.items():
        assert worst(facts, model, site) < 1e-10, name


@pytest.mark.parametrize("loop", [n if n == "one layer" else pytest.param(n, marks=pytest.mark.slow) for n in s.LOOPS])
def test_every_call_of_a_layer_is_a_block(loop: str) -> None:
    block, cls = s.LOOPS[loop]
    model = m.model(block, 4, cls)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
    assert [block.module for block in facts[TASK].blocks] == [f"layers.{i % cls.different}" for i in range(4)]
    for name in ("hide",) if loop == "one layer" else SITES:
        assert worst(facts, model, SITES[name]) < 1e-10, name


class Placed(s.Again):
    """Positions are added before the first layer, and features behind all but the last."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.places = nn.Embedding(16, m.HIDDEN)

    def begin(self, x: Tensor) -> Tensor:
        return x + self.places.weight[: x.shape[1]]


class Beginning(s.Again):
    """Features are added before each layer."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.again.append(nn.Linear(m.FEATURES, m.HIDDEN))

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x + self.features(number, x), hidden)


@pytest.mark.parametrize("block", [s.PostNorm, pytest.param(m.Block, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cls", [Placed, Beginning])
def test_what_is_added_in_a_loop_is_not_what_is_added_once_before_it(
    cls: type[s.Again], block: type[nn.Module]
) -> None:
    """By what they compute, positions might be what the first layer adds as others add features; lines of code tell."""
    model = m.model(block, 3, cls)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
    for start in range(3):
        assert worst(facts, model, tg.DropSite(TASK, start, start + 1, 0.5)) < 1e-10


@pytest.mark.parametrize("structure", ["two streams", pytest.param("hyper-connections", marks=pytest.mark.slow)])
def test_streams_that_begin_as_one_value_need_no_third_layer(structure: str) -> None:
    """The last of two layers is compared with the first, before which one value plays every role."""
    model = s.model(structure, layers=2)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
    for span in ((0, 1), (1, 2)):
        assert worst(facts, model, tg.DropSite(TASK, *span, 0.5)) < 1e-10


@pytest.mark.slow
def test_norms_are_those_of_a_row_in_all_streams() -> None:
    """Of both batches, each stream alone would have chosen others in at least one sample."""
    model = s.model("two streams", layers=2)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(seed=3), s.loss)))
    accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 2, 0.5, "norm"),)))
    tg.verify(accelerated).raise_if_failed()
    for inputs in (m.batch(seed=3), m.batch(seed=10)):
        streams = model.layers[0](model.begin(model.enter(inputs["ids"], inputs["patches"])))
        dropped = lowest(torch.cat(streams, -1), inputs["ids"])
        assert not any(torch.equal(dropped, lowest(x, inputs["ids"])) for x in streams)
        by_hand = model.loss(**inputs, span=range(1, 2), dropped=dropped)
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10


def lowest(x: Tensor, ids: Tensor) -> Tensor:
    """The two visual rows of each sample whose norms are the smallest."""
    norms = x.norm(dim=-1).masked_fill(ids != m.IMAGE_ID, torch.inf)
    return torch.zeros_like(norms, dtype=torch.bool).scatter(1, norms.topk(2, largest=False).indices, True)


def test_a_layer_that_goes_on_behind_the_chain_gets_no_site() -> None:
    """Of one layer there is nothing to compare its end with."""
    facts = tg.analyze(tg.capture(m.spec(s.model("experts", layers=1), m.batch(), s.loss)))
    with pytest.raises(tg.PlanError, match="1 of 1 attentions .*the last layer goes on at"):
        tg.apply(facts, tg.Plan((tg.DropSite(TASK, 0, 1),)))


@pytest.mark.slow
@pytest.mark.parametrize("structure", sorted(set(s.STRUCTURES) - {"features again, by index"})[::3])
def test_spans_at_the_ends_with_exact_and_symbolic_sizes(structure: str) -> None:
    model, facts = facts_of(structure, dynamic=True)
    for start, end, mode in ((0, 1, "hide"), (2, 4, "hide"), (0, 4, "freeze")):
        assert worst(facts, model, tg.DropSite(TASK, start, end, 0.5, mode=mode), exact=True) < 1e-10


class RootMeanSquare(nn.Module):
    """A norm in plain operators: what divides the rows is computed from them."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()


def test_a_last_layer_that_is_made_otherwise_ends_at_its_last_addition_not_in_a_norm() -> None:
    torch.manual_seed(0)
    layers = [s.Scaled() for _ in range(3)]
    for layer in layers:
        layer.norm1, layer.norm2 = RootMeanSquare(), RootMeanSquare()
    layers[-1].feed[1] = nn.Tanh()
    model = s.Looped(layers).double()
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
    assert worst(facts, model, tg.DropSite(TASK, 1, 3, 0.5, restore=False)) < 1e-10
    assert worst(facts, model, tg.DropSite(TASK, 1, 3, 0.5)) < 1e-10


class OtherAtTheEnd(s.FirstToAll):
    """Behind the last layer something is added in another way than behind those before it."""

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        last = number == len(self.layers) - 1
        return layer(x, hidden) + self.first.tanh() if last else super().each(number, layer, x, hidden)


@pytest.mark.parametrize("layers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_added_behind_every_layer_is_its_end_also_of_the_second_of_two(layers: int) -> None:
    """With two layers, what is added is the state before the first: the last block ended in front of the addition."""
    model = m.model(layers=layers, cls=s.FirstToAll)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
    assert worst(facts, model, tg.DropSite(TASK, layers - 1, layers, mode="freeze")) < 1e-10


def test_a_last_layer_behind_which_other_things_are_added_is_refused() -> None:
    """It may end before the addition, or behind it."""
    model = m.model(layers=2, cls=OtherAtTheEnd)
    with pytest.raises(tg.AnalysisError, match="the last layer adds to the stream in another way"):
        tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))

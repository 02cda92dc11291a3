"""A layer behind the decoder that predicts one more token (DeepSeek-V3), and losses at values inside of a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field import structures as s
from tests.field.decoder import HIDDEN, IGNORED, IMAGE_ID, TASK, Block
from tests.field.test_structures import SITES, worst


def rolled(rows: Tensor) -> Tensor:
    return torch.roll(rows, -1, 1)


def padded(rows: Tensor) -> Tensor:
    return F.pad(rows[:, 1:], (0, 0, 0, 1))


class OneMore(s.Looped):
    """Behind the last layer another one takes its rows and the embeddings of the next tokens, and predicts those after them.

    Args:
        blocks: the layers.
        following: rows to those that follow them.
    """

    def __init__(self, blocks: list[nn.Module], following: Callable[[Tensor], Tensor] = rolled) -> None:
        super().__init__(blocks)
        self.more, self.join, self.following = Block(), nn.Linear(2 * HIDDEN, HIDDEN), following
        self.norm_state, self.norm_token = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def begin(self, x: Tensor) -> Tensor:
        self.first = x
        return x

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        if number < len(self.layers) - 1:
            return 0.0
        h = torch.cat([self.norm_state(x), self.norm_token(self.following(self.first))], -1)
        ids, _, labels = self.inputs
        image = ids == IMAGE_ID
        labels = F.pad(labels, (0, 2), value=IGNORED)[:, 2:]
        labels = labels.masked_fill(image & F.pad(image, (0, 1))[:, 1:], IGNORED)  # of rows that predict no text
        return 0.3 * F.cross_entropy(self.read(self.more(self.join(h))).flatten(0, 1), labels.flatten())


def facts_of(following: Callable[[Tensor], Tensor], dynamic: bool = False) -> tuple[OneMore, tg.Facts]:
    model = m.model(layers=4, cls=lambda blocks: OneMore(blocks, following))  # type: ignore[arg-type]
    return model, tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss, dynamic=dynamic)))


@pytest.mark.parametrize(
    ("following", "dynamic"),
    [(rolled, False), *(pytest.param(f, True, marks=pytest.mark.slow) for f in (rolled, padded))],
)
def test_a_layer_that_predicts_one_more_token_is_behind_the_decoder(
    following: Callable[[Tensor], Tensor], dynamic: bool
) -> None:
    model, facts = facts_of(following, dynamic)
    assert [block.module for block in facts[TASK].blocks] == [f"layers.{number}" for number in range(4)]
    for name in ("hide", "freeze"):
        assert worst(facts, model, SITES[name], exact=name == "hide") < 1e-10, name
    with pytest.raises(tg.IllegalRewriteError, match="drops rows for good, and aten.scaled_dot_product_attention"):
        tg.apply(facts, tg.Plan((SITES["gone"],)))  # it would see fewer keys


class OfTheList(OneMore):
    """The layer is the last item of the decoder's own list."""

    def __init__(self, blocks: list[nn.Module], following: Callable[[Tensor], Tensor] = rolled) -> None:
        super().__init__([*blocks, Block()], following)
        self.all = self._modules.pop("layers")
        del self._modules["more"]

    @property
    def layers(self) -> list[nn.Module]:  # type: ignore[override]
        return list(self.all)[:-1]  # type: ignore[arg-type]

    @property
    def more(self) -> nn.Module:  # type: ignore[override]
        return list(self.all)[-1]  # type: ignore[arg-type]


class OfFewerTokens(OfTheList):
    """It takes the rows that have a next token."""

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        if number < len(self.layers) - 1:
            return 0.0
        h = torch.cat([self.norm_state(x[:, :-1]), self.norm_token(self.first[:, 1:])], -1)
        return 0.3 * F.cross_entropy(
            self.read(self.more(self.join(h)))[:, :-1].flatten(0, 1), self.inputs[2][:, 2:].flatten()
        )


@pytest.mark.parametrize("cls", [OfTheList, pytest.param(OfFewerTokens, marks=pytest.mark.slow)])
def test_it_may_be_an_item_of_the_list_of_layers(cls: type[OneMore]) -> None:
    """All sites were refused, since one item of the list is no block."""
    model = m.model(layers=4, cls=cls)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
    assert [block.module for block in facts[TASK].blocks] == [f"all.{number}" for number in range(4)]
    for name in ("hide", "freeze"):
        assert worst(facts, model, SITES[name]) < 1e-10, name
    with pytest.raises(tg.TokgraphError):  # it would see fewer keys
        tg.verify(tg.apply(facts, tg.Plan((SITES["gone"],)))).raise_if_failed()


class Continued(s.Looped):
    """From the third layer on rows have been mapped, and an exit reads what they were: these layers are the decoder's."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.map = nn.Linear(HIDDEN, HIDDEN)

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return super().each(number, layer, self.map(x) if number == 2 else x, hidden)

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        return m.cross_entropy(self.read(x), self.inputs[2]) if number == 1 else 0.0


@pytest.mark.parametrize("layers", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_layers_behind_a_map_are_not_left_out(layers: int) -> None:
    """The map reads the decoder's rows alone, so that they are no layers that predict further tokens."""
    facts = tg.analyze(tg.capture(m.spec(m.model(layers=layers, cls=Continued), m.batch(), s.loss)))
    with pytest.raises(tg.PlanError, match=f"{layers - 2} of {layers} attentions .* which of two layers map belongs"):
        tg.apply(facts, tg.Plan((SITES["hide"],)))


class InsideALayer(s.Looped):
    """A term of the loss is read off between attention and feed-forward net of one layer."""

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        h = x + layer.out(layer.attend(*layer.qkv(layer.norm1(x)).chunk(3, -1), hidden))
        if number == 1:
            self.first = h
        return h + layer.feed(layer.norm2(h))

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        if number != 1:
            return 0.0
        return 0.2 * (self.first if kept is None else self.first[kept]).square().mean()


class PredictingInsideALayer(InsideALayer):
    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        return 0.2 * m.cross_entropy(self.read(self.first), self.inputs[2]) if number == 1 else 0.0


@pytest.mark.slow
def test_a_loss_inside_of_a_layer() -> None:
    """A mean is one over the rows that are kept; a prediction needs rows that a span there does not make."""
    for cls, sites in ((InsideALayer, ("hide", "freeze")), (PredictingInsideALayer, ("gone",))):
        model = m.model(layers=4, cls=cls)
        facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
        for name in sites:
            assert worst(facts, model, SITES[name], exact=True) < 1e-10, (cls, name)
    with pytest.raises(tg.IllegalRewriteError, match="cross_entropy_loss.default reads rows of it beside the decoder"):
        tg.apply(facts, tg.Plan((SITES["hide"],)))

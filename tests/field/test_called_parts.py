"""Models that call the parts of their layers themselves: blocks are named by the layers' list all the same."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import tokgraph as tg
from tests.field import decoder as m
from tests.field import structures as s
from tests.field.decoder import TASK
from tests.field.test_structures import SITES, worst


class Parts(s.Looped):
    """No layer is ever called."""

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        x = x + layer.out(layer.attend(*layer.qkv(layer.norm1(x)).chunk(3, -1), hidden))
        return x + layer.feed(layer.norm2(x))


class Outside(s.Looped):
    """What a layer makes is scaled and added by the model."""

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return x + 0.2 * (layer(x, hidden) - x)


class OneAttention(Parts):
    """All layers have one attention, which is in none of them, and a scale each that is in no list."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.attention = blocks[0].qkv
        for layer in self.layers[1:]:
            layer.qkv = self.attention


class SomeLook(s.Looped):
    """Some layers have a layer in another list in front of them that looks at the image (Flamingo)."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.at = nn.ModuleDict({"0": s.Looking(), "2": s.Looking()})

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        if str(number) in self.at:
            x = self.at[str(number)](x, self.inputs[1])
        return layer(x, hidden)


@pytest.mark.parametrize(
    "cls", [Parts, *(pytest.param(c, marks=pytest.mark.slow) for c in (Outside, OneAttention, SomeLook))]
)
def test_blocks_have_the_names_of_layers(cls: type[s.Looped]) -> None:
    """They had none, or that of what stands in front of a layer, so that no site was placed at all."""
    model = m.model(layers=4, cls=cls)
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
    assert [block.module for block in facts[TASK].blocks] == [f"layers.{number}" for number in range(4)]
    assert worst(facts, model, SITES["hide"]) < 1e-10

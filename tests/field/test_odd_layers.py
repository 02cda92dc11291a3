"""Layers that begin or end in another way than the others of their decoder get no site on something else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests.field import decoder as m
from tests.field import structures as s
from tests.field.decoder import HIDDEN, TASK, Block


class Normed(nn.Module):
    """A layer with a norm of its own before it, or behind it."""

    def __init__(self, layer: nn.Module, behind: bool = False) -> None:
        super().__init__()
        self.layer, self.norm, self.behind = layer, nn.LayerNorm(HIDDEN), behind

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.norm(self.layer(x, hidden)) if self.behind else self.layer(self.norm(x), hidden)


class Unnormed(s.PostNorm):
    """A post-norm layer without its last norm."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.out(self.attend(*self.qkv(x).chunk(3, -1), hidden)))
        return x + self.feed(x)


class Feeding(Block):
    """A layer without attention."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return 0.9 * x + self.feed(self.norm2(x))


class Listed(Block):
    """Two attentions in a list, then the feed-forward net."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(s.Scaled() for _ in range(2))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        for part in self.parts:
            x = part(x, hidden)
        return x + self.feed(self.norm2(x))


class Skipping(s.Looped):
    """What the first half of the layers made is joined to what enters the second."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.join = nn.ModuleList(nn.Linear(2 * HIDDEN, HIDDEN) for _ in blocks)

    def begin(self, x: Tensor) -> Tensor:
        self.kv: list[Tensor] = []
        return x

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x if number < 2 else self.join[number](torch.cat([x, self.kv[3 - number]], -1)), hidden)

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> float:
        self.kv.append(x)
        return 0.0


class Swapping(s.Looped):
    """Two streams: a layer reads what it did not write last, and adds to the other."""

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.tanh()

    def each(self, number: int, layer: nn.Module, x: tuple[Tensor, Tensor], hidden: Tensor | None) -> s.State:
        return x[1], x[0] + layer(x[1], hidden) - x[1]

    def end(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return self.read(x[0] + 2 * x[1])


def facts_of(block: Callable[[], nn.Module], cls: type[s.Looped] = s.Looped, **at: nn.Module) -> tg.Facts:
    """The facts of four layers, some of which (``at_0``) are others."""
    torch.manual_seed(0)
    layers = [at.get(f"at_{number}") or block() for number in range(4)]
    return tg.analyze(tg.capture(m.spec(cls(layers).double(), m.batch(), s.loss)))


ODD: dict[str, tuple[Callable[[], tg.Facts], str]] = {
    "first norm": (lambda: facts_of(Block, at_0=Normed(Block())), "the first layer begins at layer_norm already"),
    "first norm of post-norm layers": (
        lambda: facts_of(s.PostNorm, at_0=Normed(s.PostNorm())),
        "the first layer begins at layer_norm already",
    ),
    "pre- and post-norm": (
        lambda: facts_of(s.Scaled, at_1=s.PostNorm(), at_3=s.PostNorm()),
        "the first layer begins at layer_norm already",
    ),
    "no last norm": (lambda: facts_of(s.PostNorm, at_3=Unnormed()), "the last layer ends in another way"),
    "feed-forward first": (lambda: facts_of(s.Scaled, at_0=Feeding()), "layers.0 is an item of the layers' list"),
    "feed-forward last": (lambda: facts_of(s.Scaled, at_3=Feeding()), "layers.3 is an item of the layers' list"),
    "streams that change places": (lambda: facts_of(Block, Swapping), "states of two layers before it"),
    "attentions in a list": (lambda: facts_of(Listed), "several blocks lie in layers.0, which does more"),
}
QUICK = {"first norm", "no last norm", "feed-forward first"}


@pytest.mark.parametrize("odd", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ODD])
def test_layers_that_modules_contradict_get_no_site(odd: str) -> None:
    make, why = ODD[odd]
    with pytest.raises(tg.TokgraphError, match=why):
        tg.apply(make(), tg.Plan((tg.DropSite(TASK, 0, 2, 0.5, mode="freeze"),)))


def refused(facts: tg.Facts, start: int, end: int, why: str) -> None:
    with pytest.raises(tg.IllegalRewriteError, match=why):
        tg.apply(facts, tg.Plan((tg.DropSite(TASK, start, end, 0.5),)))


def test_rows_that_change_their_width_cannot_stay_as_they_are() -> None:
    facts = facts_of(Block, Skipping)
    refused(facts, 1, 3, r"block 1: its rows are \(16,\) of torch.float64 before it and \(32,\)")
    tg.verify(tg.apply(facts, tg.Plan((tg.DropSite(TASK, 0, 1, 0.5),)))).raise_if_failed()


def test_a_last_layer_that_goes_on_gets_no_site() -> None:
    facts = facts_of(s.Scaled, at_3=Normed(s.Scaled(), behind=True))
    refused(facts, 3, 4, "block 3: aten.layer_norm.default .*there it goes on, as no layer before it")
    tg.verify(tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 3, 0.5),)))).raise_if_failed()


class Turned(s.Looped):
    """Every layer reads the tokens from the last to the first."""

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x.flip(1), None if hidden is None else hidden.flip(1)).flip(1)


def test_rows_that_were_turned_around_are_not_taken_for_other_tokens() -> None:
    with pytest.raises(tg.AnalysisError, match="aten.flip.default moves rows to places of other tokens"):
        facts_of(s.Scaled, Turned)


class Placed(s.Looped):
    """Before each layer embeddings of positions are added: its own, or those of all."""

    def __init__(self, blocks: list[nn.Module], own: bool = True) -> None:
        super().__init__(blocks)
        places = [nn.Embedding(32, HIDDEN) for _ in blocks]
        self.places = nn.ModuleList(places) if own else places[0]

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        places = self.places[number] if isinstance(self.places, nn.ModuleList) else self.places
        return layer(x + places(torch.arange(x.shape[1]))[None], hidden)


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_made_for_an_addition_between_layers_tells_where_it_belongs(own: bool) -> None:
    torch.manual_seed(0)
    model = Placed([Block() for _ in range(3)], own).double()
    facts = tg.analyze(tg.capture(m.spec(model, m.batch(), s.loss)))
    for start, end in ((1, 2), (0, 2)):
        accelerated = tg.apply(facts, tg.Plan((tg.DropSite(TASK, start, end, 0.5),)))
        tg.verify(accelerated).raise_if_failed()
        for inputs in (m.batch(), m.batch((5, 1), seed=3)):
            by_hand = model.loss(**inputs, span=range(start, end), dropped=m.dropped(inputs["ids"]))
            assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10


class Permuted(s.Looped):
    """From the third layer on tokens are in another order, by an index."""

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(x[:, torch.arange(x.shape[1] - 1, -1, -1)] if number == 2 else x, hidden)


def test_layers_behind_another_order_of_tokens_are_layers() -> None:
    with pytest.raises(tg.TokgraphError, match="layers.2 is an item of the layers' list, and no block"):
        tg.apply(facts_of(Block, Permuted), tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),)))

"""States between layers as minimum cuts: what crosses, what does not, and where nothing can be told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field import structures as s
from tests.field.decoder import HIDDEN, TASK
from tokgraph.errors import AnalysisError
from tokgraph.ir.node import module_path
from tokgraph.passes.analysis.axes import AxisClasses
from tokgraph.passes.analysis.flow import computed_from
from tokgraph.passes.analysis.likeness import alike
from tokgraph.passes.analysis.states import Layers, Unfound, find_layers
from tokgraph.passes.analysis.structure import task_facts
from tokgraph.passes.analysis.units import find_units


def graph_of(model: nn.Module, forward: Callable[..., Tensor] = s.loss, inputs: dict[str, Tensor] | None = None):
    (graph,) = tg.capture(m.spec(model, m.batch() if inputs is None else inputs, forward)).values()
    return graph


def layers_of(model: nn.Module, **more: object) -> Layers | Unfound:
    graph = graph_of(model, **more)  # type: ignore[arg-type]
    classes = AxisClasses(graph.graph)
    units = find_units(graph, classes)
    assert units is not None
    return find_layers(graph.graph, units, classes)


def test_of_a_plain_decoder_the_cuts_are_its_chain() -> None:
    graph = graph_of(m.model(cls=s.Looped))
    facts = task_facts(graph)
    classes = AxisClasses(graph.graph)
    found = find_layers(graph.graph, find_units(graph, classes), classes)  # type: ignore[arg-type]
    assert isinstance(found, Layers)
    assert tuple(node.name for (node,) in found.states) == facts.stream
    assert found.born == {}


@pytest.mark.parametrize(
    ("structure", "values"), [("two streams", 2), pytest.param("hyper-connections", 3, marks=pytest.mark.slow)]
)
def test_streams_that_begin_as_copies_are_all_in_every_state(structure: str, values: int) -> None:
    found = layers_of(s.model(structure, layers=3))
    assert isinstance(found, Layers)
    assert [len(state) for state in found.states] == [values] * 4
    assert len(set(found.states[0])) == 1
    assert all(len(set(state)) == values for state in found.states[1:])


def test_keys_that_later_layers_use_again_cross_once() -> None:
    found = layers_of(s.model("shared keys"))
    assert isinstance(found, Layers)
    assert {number: len(values) for number, values in found.born.items()} == {1: 2}
    assert [len(state) for state in found.states] == [1] * 5


def test_routers_and_what_comes_in_again_do_not_cross() -> None:
    (block, *_) = task_facts(graph_of(s.model("experts", layers=3))).blocks
    assert [(side.why, side.merged) for side in block.sides] == [("", True), ("", True), ("", False)]
    (block, *_) = task_facts(graph_of(s.model("features again", layers=3))).blocks
    assert not any("scatter" in name for name in block.nodes)


class Summed(s.Balanced):
    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor:
        return self.layers[number].probabilities.sum((0, 1)).square().sum()


def test_a_sum_over_rows_of_a_block_is_named() -> None:
    """What it means of fewer rows cannot be told: its author may divide by their number."""
    facts = tg.analyze(tg.capture(m.spec(m.model(s.Experts, 3, Summed), m.batch(), s.loss)))
    with pytest.raises(
        tg.IllegalRewriteError, match=r"block 1: aten.sum\S* reads rows of it beside the decoder"
    ) as caught:
        tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 2),)))
    assert caught.value.where is not None


class NormBetween(s.Looped):
    """A norm of a list of its own before each layer."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.between = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in blocks)

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(self.between[number](x), hidden)


class NormBehind(NormBetween):
    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return self.between[number](layer(x, hidden))


class OneNorm(NormBetween):
    """The same norm before each layer, and behind the last one as well: it has no number."""

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        return layer(self.norm(x), hidden)


@pytest.mark.parametrize(
    ("cls", "before"), [(NormBetween, True), (NormBehind, False), pytest.param(OneNorm, True, marks=pytest.mark.slow)]
)
def test_what_lies_between_layers_belongs_to_the_one_it_is_made_for(cls: type[s.Looped], before: bool) -> None:
    found = layers_of(m.model(layers=3, cls=cls))
    assert isinstance(found, Layers)
    ends = {module_path(node).split(".")[0] for state in found.states[1:] for node in state}
    assert ends == {"layers" if before else "between"}


class Skips(NormBetween):
    """Later layers read earlier ones through linear maps in a list of their own, numbered anew."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.skip = nn.ModuleList([nn.Linear(2 * HIDDEN, HIDDEN)])

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        self.kept = [x] if number == 0 else [*self.kept, x]
        x = layer(self.skip[0](torch.cat([x, self.kept[1]], -1)) if number == 2 else x, hidden)
        if number == len(self.layers) - 1:
            del self.kept
        return x


def test_what_may_belong_to_either_layer_is_named() -> None:
    found = layers_of(m.model(layers=3, cls=Skips))
    assert isinstance(found, Unfound)
    assert "skip.0" in found.why


class Dense(s.Looped):
    """Every layer reads the results of all layers before it."""

    def begin(self, x: Tensor) -> Tensor:
        self.sum = [x]
        return x

    def each(self, number: int, layer: nn.Module, x: Tensor, hidden: Tensor | None) -> Tensor:
        self.sum = [*self.sum, layer(x, hidden)]
        return sum(0.1 * (i + number) * y for i, y in enumerate(self.sum, 1))


def test_a_decoder_without_layers_to_cut_is_refused_with_the_reason() -> None:
    with pytest.raises(AnalysisError, match=r"residual stream .*; nor can its layers be cut apart at layers\.\d"):
        tg.analyze(tg.capture(m.spec(m.model(layers=4, cls=Dense), m.batch(), s.loss)))


class Joined(m.Block):
    """What the attention makes is joined to the rows by an operator that is no addition, before a linear map takes both."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        made = self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        return self.mix(torch.cat([x, made], -1))


def test_what_joins_rows_to_attention_without_adding_is_named() -> None:
    found = layers_of(m.model(Joined, layers=2, cls=s.Looped))
    assert isinstance(found, Unfound)
    assert "aten.cat.default" in found.why
    assert found.node.target is torch.ops.aten.cat.default


class Alone(m.Block):
    """Nothing leads past the attention."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))


def test_a_decoder_without_residuals_is_told_so() -> None:
    found = layers_of(m.model(Alone, layers=2, cls=s.Looped))
    assert isinstance(found, Unfound)
    assert "nothing is added" in found.why


class AttendingAgain(m.Block):
    """One attention, used in every layer; and in between, gated rows, so that no value alone connects layers."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        for _ in range(2):
            x = 0.5 * x + self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        return x + self.feed(self.norm2(x))


def test_a_layer_that_attends_again_shows_no_layers() -> None:
    found = layers_of(m.model(AttendingAgain, layers=2, cls=s.Looped))
    assert isinstance(found, Unfound)
    assert "one module" in found.why


# ------------------------------------------------------------------ what stands beside the decoder


def flow(model: nn.Module, ids: Tensor, patches: Tensor, noise: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """Noised features take the image's places; the velocity at their rows, and text, are what the loss reads."""
    at = time[:, None, None]
    x = model.enter(ids, (1 - at) * noise + at * patches)
    for layer in model.layers:
        x = layer(x, None, time[:, None, None] * model.layers[0].norm1.weight)
    image = (ids == m.IMAGE_ID).unsqueeze(-1)
    made = model.read(x)[..., : m.FEATURES]
    wanted = torch.zeros_like(made).masked_scatter(image, patches - noise)
    return m.cross_entropy(model.read(x), labels) + ((made - wanted).square() * image).sum() / image.sum()


def test_noise_time_and_targets_are_no_stream() -> None:
    b = m.batch()
    inputs = {"ids": b["ids"], "patches": b["patches"], "noise": torch.randn_like(b["patches"])}
    inputs |= {"time": torch.rand(2, dtype=torch.float64), "labels": b["labels"]}
    found = layers_of(m.model(s.Taking, layers=3), forward=flow, inputs=inputs)
    assert isinstance(found, Layers)
    assert [len(state) for state in found.states] == [1] * 4


class Depth(m.Model):
    """A transformer over the three codes of each row follows the decoder."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.depth = nn.ModuleList(m.Block() for _ in range(4))
        self.codes = nn.Parameter(torch.randn(3, HIDDEN))


def codes(model: Depth, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
    x = model.enter(ids, patches)
    for layer in model.layers:
        x = layer(x)
    y = (x.unsqueeze(2) + model.codes).flatten(0, 1)
    for layer in model.depth:
        y = layer(y)
    labels = labels.unsqueeze(-1).expand(-1, -1, 3)
    return F.cross_entropy(model.read(y).flatten(0, 1), labels.flatten(), ignore_index=m.IGNORED)


def test_a_longer_transformer_behind_the_decoder_is_not_taken_for_it() -> None:
    blocks = task_facts(graph_of(m.model(layers=2, cls=Depth), forward=codes)).blocks
    assert [block.module for block in blocks] == ["layers.0", "layers.1"]


def test_alike_compares_roles() -> None:
    graph = graph_of(s.model("two streams", layers=3))
    classes = AxisClasses(graph.graph)
    found = find_layers(graph.graph, find_units(graph, classes), classes)  # type: ignore[arg-type]
    assert isinstance(found, Layers)
    _, one, other, last = found.states
    stops, before = {x: [i] for i, x in enumerate(one)}, {x: i for i, x in enumerate(other)}
    region = computed_from(one)
    assert alike(last[0], other[0], before, stops, region)
    assert not alike(last[1], other[0], before, stops, region)
    assert not alike(last[0], other[0], {x: 1 - i for x, i in before.items()}, stops, region)

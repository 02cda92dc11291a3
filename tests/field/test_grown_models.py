"""What a model gets after capture where its forward looks for something: modules, tensors, attributes, other methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field.models import FEATURES, VLM, Block, assert_same, batch, seeded, spec, understanding
from tests.field.test_changed_models import Scaled, acc, follows, refused  # noqa: F401  (a fixture)


class Open(Scaled):
    """A forward that goes through what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.named = nn.ModuleList(), nn.ModuleDict()
        self.register_parameter("prompt", None)
        self.nested = {"scales": [1.0, 2.0]}
        self.activation = F.gelu

    def hidden(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        x = super().hidden(ids, patches)
        for module in self.extra:
            x = x + module(x)
        if "adapter" in self.named:
            x = x + self.named["adapter"](x)
        if self.prompt is not None:
            x = x + self.prompt
        if hasattr(self, "soft"):
            x = x + self.soft
        return self.activation(x) * getattr(self, "gain", 1.0) * self.nested["scales"][1]


@pytest.fixture(scope="module")
def facts() -> tg.Facts:
    return tg.analyze(tg.capture(spec(seeded(Open).eval())))


@pytest.fixture(autouse=True)
def put_back(facts: tg.Facts) -> Iterator[None]:
    yield
    facts.program.model.nested["scales"][1] = 2.0


def one_more_block(model: nn.Module) -> None:
    model.blocks.append(Block(16, 2, 0.0))


def first_of_a_list(model: nn.Module) -> None:
    model.extra.append(nn.Linear(16, 16))


def entry(model: nn.Module) -> None:
    model.named["adapter"] = nn.Linear(16, 16)


def parameter_that_was_none(model: nn.Module) -> None:
    model.prompt = nn.Parameter(torch.ones(16))


def bias_that_was_none(model: nn.Module) -> None:
    model.head.bias = nn.Parameter(torch.ones(model.head.out_features))


def parameter_looked_for(model: nn.Module) -> None:
    model.soft = nn.Parameter(torch.ones(16))


def attribute_looked_for(model: nn.Module) -> None:
    model.gain = 2.0


def forward_of_a_block(model: nn.Module) -> None:
    before = model.blocks[1].forward
    model.blocks[1].forward = lambda x: before(x) * 2


def method_of_a_block(model: nn.Module) -> None:
    before = model.blocks[1].feed
    model.blocks[1].feed = lambda x: before(x) * 2


def number_in_depth(model: nn.Module) -> None:
    model.nested["scales"][1] = 3.0


def function(model: nn.Module) -> None:
    model.activation = torch.relu


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (one_more_block, "blocks.2 was added"),
        pytest.param(first_of_a_list, "extra.0 was added", marks=pytest.mark.slow),
        (entry, "named.adapter was added"),
        pytest.param(
            parameter_that_was_none, "prompt, which the forward looked for, was added", marks=pytest.mark.slow
        ),
        (bias_that_was_none, "head.bias, which the forward looked for, was added"),
        pytest.param(parameter_looked_for, "soft, which the forward looked for, was added", marks=pytest.mark.slow),
        pytest.param(attribute_looked_for, "gain, which the forward looked for, was added", marks=pytest.mark.slow),
        (forward_of_a_block, "the forward of blocks.1 was replaced"),
        pytest.param(method_of_a_block, "the feed of blocks.1 was replaced", marks=pytest.mark.slow),
        (number_in_depth, r"nested was .*2.0.*, it is .*3.0"),
        (function, r"activation was \w+ .*gelu, it is \w+ .*relu"),
    ],
)
def test_what_a_model_gets_is_refused_and_refreshed(
    change: Callable[[nn.Module], None],
    what: str,
    acc: tg.Accelerated,  # noqa: F811
) -> None:
    follows(acc)
    change(acc.model)
    refused(acc, what)


@pytest.mark.parametrize("name", ["forward", "feed"])
def test_a_method_of_a_class_that_is_replaced_is_refused(
    name: str,
    acc: tg.Accelerated,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = getattr(Block, name)
    monkeypatch.setattr(Block, name, lambda self, x: before(self, x) * 2)
    with pytest.raises(tg.StaleError, match=f"{name} of the class Block was replaced"):
        acc["u"](**batch())
    monkeypatch.undo()
    follows(acc)


def test_what_the_forward_does_not_look_for_may_come(acc: tg.Accelerated) -> None:  # noqa: F811
    acc.model.note, acc.model.blocks[0].seen = "x", 3
    acc.model.unused = nn.Linear(2, 2)
    acc.model.register_buffer("count", torch.zeros(()))
    follows(acc)
    acc.model.gain = 1.5
    with pytest.raises(tg.StaleError, match="gain"):
        acc["u"](**batch())


def test_an_attribute_that_says_what_the_class_says_is_no_change() -> None:
    class Flagged(VLM):
        scale = 1.0

        def forward(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
            return super().forward(ids, patches) * self.scale

    model = seeded(Flagged)
    program = tg.optimize(spec(model), "none", verify=False)
    model.scale = 1.0
    assert_same(model, lambda: understanding(model, **batch(seed=3)), lambda: program["u"](**batch(seed=3)))
    model.scale = 2.0
    with pytest.raises(tg.StaleError, match=r"scale was 1.0, it is 2.0"):
        program["u"](**batch())


def reseeded() -> None:
    torch.manual_seed(9)


def forked() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(9)


def by_the_generator() -> None:
    torch.default_generator.manual_seed(9)


@pytest.mark.parametrize("seeds", [reseeded, forked, by_the_generator])
def test_a_forward_that_seeds_the_generator_is_refused(seeds: Callable[[], None]) -> None:
    def forward(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        seeds()
        return understanding(model, ids, patches + torch.randn_like(patches), labels)

    with pytest.raises(tg.CaptureError, match="random generator"):
        tg.capture(spec(seeded(VLM), forward))


class Root(nn.Module):
    """A norm that returns its input's type whatever the type of its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * F.normalize(x, dim=-1)).to(x.dtype)


class Cast(VLM):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm1, block.norm2 = Root(), Root()


def test_one_of_several_modules_that_was_converted_is_named_where_the_graph_fails() -> None:
    model = seeded(Cast)
    program = tg.optimize(spec(model), "none", verify=False)
    model.blocks[1].norm2.double()
    with pytest.raises(tg.StaleError, match=r"blocks.1.norm2.weight was torch.float32 on cpu, it is torch.float64"):
        program["u"](**batch())
    program.refresh()
    assert_same(model, lambda: understanding(model, **batch(seed=3)), lambda: program["u"](**batch(seed=3)))


def test_an_input_of_another_type_is_told_to_be_converted() -> None:
    program = tg.optimize(spec(seeded(VLM)), "none", verify=False)
    with pytest.raises(tg.BatchError, match=r"'ids' is torch.int32") as raised:
        program["u"](**{**batch(), "ids": batch()["ids"].int()})
    assert "convert the input with .to(torch.int64)" in str(raised.value)


class Normed(nn.Module):
    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(FEATURES, 16), nn.BatchNorm1d(16, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x).transpose(1, 2)).transpose(1, 2)


def test_running_statistics_that_come_out_alike_are_kept_and_put_back() -> None:
    model = seeded(lambda: VLM(tower=Normed(1.0)))
    before = {name: x.clone() for name, x in model.named_buffers()}
    program = tg.optimize(spec(model), "none", verify=False)
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())
    assert_same(model, lambda: understanding(model, **batch(seed=3)), lambda: program["u"](**batch(seed=3)))


def test_a_capture_that_fails_puts_running_statistics_back() -> None:
    model = seeded(lambda: VLM(tower=Normed(None)))  # an average over all batches, which counts them in Python
    before = {name: x.clone() for name, x in model.named_buffers()}
    with pytest.raises(tg.CaptureError):
        tg.capture(spec(model))
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())


@pytest.mark.slow
def test_a_model_is_optimized_under_anomaly_detection() -> None:
    with torch.autograd.set_detect_anomaly(True):
        program = tg.optimize(spec(seeded(VLM)), "exact", verify=False)
        assert program["u"](**batch()).isfinite()


@pytest.mark.slow
def test_numbers_taken_out_of_a_tensor_do_not_stop_the_accounts() -> None:
    def forward(model: nn.Module, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        return understanding(model, ids, patches * torch.tensor(patches.tolist()).mean(), labels)

    model = seeded(VLM)
    program = tg.optimize(spec(model, forward), "none", verify=False)
    assert_same(model, lambda: forward(model, **batch(seed=3)), lambda: program["u"](**batch(seed=3)))


def test_a_module_of_torch_jit_is_refused_by_name() -> None:
    model = seeded(VLM)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        model.norm = torch.jit.script(model.norm)
    with pytest.raises(tg.CaptureError, match=r"norm is a module of torch.jit"):
        tg.capture(spec(model))

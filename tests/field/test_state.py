"""What a forward changes: buffers are written as eager does, Python state is refused or told, the user's model stays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tokgraph as tg
from tests.field.models import VLM, Block, assert_same, batch, seeded, spec, understanding
from tests.field.test_grad_modes import HIDDEN, Tower
from tokgraph.passes.capture.state import State


class Normed(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.features(x).transpose(1, 2)).transpose(1, 2)


class Counting(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[0]
        return self.features(x) / self.seen


class Rebinding(Counting):
    """What is read after the binding is the new tensor, gradients and all."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        self.average = 0.9 * self.average.detach() + 0.1 * y.mean((0, 1))
        self.seen = self.seen + 1
        return y - self.average


class Spectral(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.utils.spectral_norm(self.one)


@pytest.mark.parametrize(
    "tower", [Normed, *(pytest.param(tower, marks=pytest.mark.slow) for tower in (Rebinding, Counting, Spectral))]
)
def test_buffers_are_written_as_eager_does_call_after_call(tower: type[Tower]) -> None:
    model = seeded(lambda: VLM(tower=tower()))
    before = {name: (x, x.clone()) for name, x in model.named_buffers()}
    accelerated = tg.optimize(spec(model), "exact")
    assert accelerated.verification.passed
    assert accelerated.captured["u"].check.buffers
    for name, x in model.named_buffers():
        assert x is before[name][0]
        assert torch.equal(x, before[name][1]), f"{name} moved"
    for seed in (3, 4):
        b = batch(seed=seed)
        state = State(model)
        losses, buffers = [], []
        for call in (lambda b=b: understanding(model, **b), lambda b=b: accelerated["u"](**b)):
            loss = call()
            loss.backward()  # of a graph whose buffers have moved on
            losses.append(loss)
            buffers.append({name: x.detach().clone() for name, x in model.named_buffers()})
            if len(losses) == 1:
                state.restore()
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(buffers[0], buffers[1])
    loss = accelerated["u"](**b)
    accelerated["u"](**b)  # a second call before the backward pass of the first
    loss.backward()


class Loaded(Block):
    """Counts expert loads, of its rows."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.register_buffer("load", torch.zeros(HIDDEN))
        self.register_buffer("calls", torch.zeros(()))

    def feed(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.load += x.mean((0, 1))
        return super().feed(x)


class Called(Loaded):
    def feed(self, x: Tensor) -> Tensor:
        self.calls += x.shape[0]
        return Block.feed(self, x)


def test_a_buffer_that_rows_of_a_span_are_written_to_is_refused_there() -> None:
    model = seeded(lambda: VLM(layers=3, block=Loaded))
    program, b = tg.capture(spec(model)), batch(seed=3)
    accelerated = tg.apply(program, tg.Plan(exact=True))
    assert_same(model, lambda: understanding(model, **b), lambda: accelerated["u"](**b))
    for mode in ("hide", "freeze"):
        with pytest.raises(tg.IllegalRewriteError, match="block 1: a buffer is written from its rows") as raised:
            tg.apply(program, tg.Plan((tg.DropSite("u", 1, 2, keep=0.5, mode=mode),)))
        assert raised.value.where.module == "blocks.1"
    counted = tg.capture(spec(seeded(lambda: VLM(layers=3, block=Called))))
    accelerated = tg.apply(counted, tg.Plan((tg.DropSite("u", 1, 2, keep=0.5),), exact=True))
    accelerated["u"](**b)
    assert [float(block.calls) for block in counted.model.blocks] == [2.0] * 3


@pytest.mark.slow
def test_files_hold_no_buffer_that_a_call_changes(tmp_path: Path) -> None:
    accelerated = tg.apply(tg.capture(spec(seeded(lambda: VLM(tower=Normed())))), tg.Plan(exact=True))
    for write in (lambda: accelerated.save(tmp_path / "a"), lambda: accelerated.export_onnx(tmp_path / "b")):
        with pytest.raises(tg.ExportError, match="changes the buffer 'tower.bn"):
            write()


class Stepping(Tower):
    step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.features(x) * (2.0 if self.step > 1000 else 1.0)


class Recurrent(Tower):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        self.last = y.detach().mean() + (0 if self.last is None else self.last)
        return y * self.last


class Listing(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(1)
        return self.features(x) * len(self.history)


class Unregistered(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        self.table.mul_(0.9)
        return self.features(x) * self.table


class Clipping(Tower):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.one.weight.clamp_(-0.1, 0.1)
        return self.features(x)


class Replacing(Tower):
    def forward(self, x: Tensor) -> Tensor:
        self.one.weight = nn.Parameter(self.one.weight.detach().clone())
        return self.features(x)


class Growing(Tower):
    def forward(self, x: Tensor) -> Tensor:
        self.average = torch.cat([self.average, self.average[:1]])
        return self.features(x)


class Drawing(Tower):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) * (2.0 if random.random() < 0.5 else 1.0)


class DrawingNumPy(Tower):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) * float(np.random.rand())


class Outside(Tower):
    calls: ClassVar[list[int]] = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.features(x) * self.calls[0]


REFUSED = [
    (Stepping, "reads the attribute tower.step"),
    pytest.param(Recurrent, "reads the attribute tower.last", marks=pytest.mark.slow),
    (Listing, "reads the attribute tower.history"),
    (Unregistered, "changes the tensor tower.table"),
    (Clipping, "changes the parameter tower.one.weight in place"),
    pytest.param(Replacing, "changes the parameter tower.one.weight", marks=pytest.mark.slow),
    pytest.param(Growing, "binds a tensor of another shape or type to the buffer 'average'", marks=pytest.mark.slow),
    (Drawing, "draws from Python's random"),
    pytest.param(DrawingNumPy, "draws from numpy.random", marks=pytest.mark.slow),
    (Outside, "does not compute the same twice"),
]


@pytest.mark.parametrize(("tower", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_state_that_a_graph_would_not_keep_is_refused(tower: type[Tower], message: str) -> None:
    model = seeded(lambda: VLM(tower=tower()))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attributes, drawn = dict(vars(model.tower)), (torch.get_rng_state(), random.getstate())
    with pytest.raises(tg.CaptureError, match=message):
        tg.capture(spec(model))
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert {k: v for k, v in vars(model.tower).items() if k not in attributes or v is not attributes[k]} == {}
    assert getattr(model.tower, "history", []) == []
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]


class Caching(Tower):
    """Activations that the forward itself sets and reads, and one that is there for others to read."""

    aux: Tensor
    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.aux = self.features(x)
        self.seen = self.aux.mean()
        return self.aux * 2


class Lazy(Tower):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scales"):
            self.register_buffer("scales", torch.linspace(1, 2, HIDDEN))
        return self.features(x) * self.scales


def test_activations_in_attributes_are_fine_and_told_where_nothing_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    model, b = seeded(lambda: VLM(tower=Caching())), batch(seed=3)
    graph = tg.capture(spec(model))
    assert graph["u"].check.notes == (
        "the forward sets attributes that the captured graph leaves as they are: tower.seen",
    )
    assert "tower.seen" in caplog.text
    assert "seen" not in vars(model.tower)
    accelerated = tg.apply(graph, tg.Plan(exact=True))
    assert_same(model, lambda: understanding(model, **b), lambda: accelerated["u"](**b))


@pytest.mark.slow
def test_tables_built_by_the_first_call_stay() -> None:
    model, b = seeded(lambda: VLM(tower=Lazy())), batch(seed=3)
    accelerated = tg.apply(tg.capture(spec(model)), tg.Plan(exact=True))
    table = model.tower.scales
    assert_same(model, lambda: understanding(model, **b), lambda: accelerated["u"](**b))
    assert model.tower.scales is table


class Doubling(Tower):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x.mul_(2))


@pytest.mark.slow
def test_a_batch_is_changed_as_eager_changes_it() -> None:
    model, b = seeded(lambda: VLM(tower=Doubling())), batch(seed=3)
    example = batch()
    accelerated = tg.optimize(spec(model, inputs=example), "exact")
    assert torch.equal(example["patches"], batch()["patches"])
    mine, theirs = ({k: x.clone() for k, x in b.items()} for _ in range(2))
    torch.testing.assert_close(accelerated["u"](**mine), understanding(model, **theirs))
    assert torch.equal(mine["patches"], theirs["patches"])
    assert not torch.equal(mine["patches"], b["patches"])


class Noisy(Tower):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.features(x), 0.25, self.training)
        return y + 0.1 * torch.randn_like(y)


@pytest.mark.slow
def test_the_same_seed_draws_the_same_numbers() -> None:
    model, b = seeded(lambda: VLM(tower=Noisy(), dropout=0.25)), batch(seed=3)
    accelerated = tg.optimize(spec(model), "none")
    assert accelerated.captured["u"].check.random == "equal"
    assert_same(model, lambda: understanding(model, **b), lambda: accelerated["u"](**b))


class DrawingInVain(Tower):
    """Nothing reads the first draw, and a graph leaves it out: the same seed gives other numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        torch.rand_like(y)
        return F.dropout(y, 0.5, self.training)


class DrawingInVainWithoutGradients(DrawingInVain):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.grad_fn is not None:
            y.grad_fn.register_prehook(lambda gs: tuple(0.1 * g for g in gs))
        return y


def test_what_draws_other_numbers_is_compared_without_chance() -> None:
    check = tg.capture(spec(seeded(lambda: VLM(tower=DrawingInVain(), dropout=0.25))))["u"].check
    assert check.random == "other"
    assert check.error < 1e-5
    with pytest.raises(tg.CaptureError, match="the gradient of tower.* differs .*leaves no trace"):
        tg.capture(spec(seeded(lambda: VLM(tower=DrawingInVainWithoutGradients(), dropout=0.25))))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Reentrant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)


@pytest.mark.parametrize("block", [Checkpointed, Reentrant])
def test_recomputation_inside_the_model_is_told_with_what_it_costs(block: type[Block]) -> None:
    model, b = seeded(lambda: VLM(block=block)), batch(seed=3)
    program = tg.capture(spec(model))
    (note,) = program["u"].check.notes
    found = note.rpartition(": ")[2].split()
    assert "torch.utils.checkpoint at " + __file__ in note
    assert int(found[0].replace(",", "")) > int(found[4].replace(",", ""))
    accelerated = tg.apply(program, tg.Plan(exact=True))
    assert_same(model, lambda: understanding(model, **b), lambda: accelerated["u"](**b))

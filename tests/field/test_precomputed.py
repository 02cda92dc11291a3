"""Submodules that run before the graph: what a task computes with them, and every gradient, is what its forward computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import HIDDEN, IMAGE_ID, TASK

DYNAMIC = {
    "ids": {0: "batch", 1: "tokens"},
    "labels": {0: "batch", 1: "tokens"},
    "patches": {0: "batch"},
    "counts": {0: "batch"},
}


class Tower(nn.Module):
    """Takes as many patches of each sample as its count says, a value; has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out, self.norm = (
            nn.Linear(m.FEATURES, HIDDEN),
            nn.Linear(HIDDEN, HIDDEN),
            nn.BatchNorm1d(HIDDEN),
        )

    def forward(self, patches: Tensor, counts: Tensor) -> Any:
        rows = torch.cat([x[:n] for x, n in zip(patches, counts.tolist(), strict=True)])
        return self.out(self.norm(self.patch(rows)).relu())


class Seeing(m.Model):
    """A decoder behind a tower; subclasses say how it is called."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        del self.patch
        self.tower = self.make()

    def make(self) -> nn.Module:
        return Tower()

    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        return self.tower(patches, counts)

    def loss(self, ids: Tensor, patches: Tensor, counts: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids).masked_scatter((ids == IMAGE_ID).unsqueeze(-1), self.features(patches, counts))
        for layer in self.layers:
            x = layer(x)
        return m.cross_entropy(self.read(x), labels)


def loss(model: Seeing, **inputs: Tensor) -> Tensor:
    return model.loss(**inputs)


def batch(at: tuple[int, ...] = (2, 3), image: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Samples have one patch more than the tower takes."""
    inputs = m.batch(at, image=image, seed=seed)
    generator = torch.Generator().manual_seed(seed + 7)
    patches = torch.randn(len(at), image + 1, m.FEATURES, generator=generator, dtype=torch.float64)
    return {**inputs, "patches": patches, "counts": torch.tensor([image] * len(at))}


def spec_of(model: nn.Module, dynamic: bool = False, path: str = "tower", **task: Any) -> tg.ModelSpec:
    dims = {**DYNAMIC, "patches": {0: "batch", 1: "patches"}, path: {0: "features"}} if dynamic else None
    return m.spec(model, batch(), loss, dynamic=dims, precomputed=path, **task)


def same(accelerated: tg.Accelerated, model: nn.Module, inputs: dict[str, Tensor], forward: Callable = loss) -> None:
    """Loss, gradients of all parameters and buffers are those of the forward."""
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    reference = forward(twin, **inputs)
    reference.backward()
    torch.set_rng_state(state)
    mine = accelerated[TASK](**inputs)
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    found = dict(zip(trained, torch.autograd.grad(mine, list(trained.values()), allow_unused=True), strict=True))
    torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)
    for name, p in twin.named_parameters():
        expected = p.grad
        got = found.get(name)
        assert (got is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12, msg=name)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


def exact(spec: tg.ModelSpec) -> tg.Accelerated:
    facts = tg.analyze(tg.capture(spec))
    return tg.apply(facts, tg.make_plan(facts, "exact"))


@pytest.mark.slow
def test_numbers_of_features_may_differ_from_batch_to_batch_and_drops_reach_the_tower(tmp_path: Path) -> None:
    model = m.model(cls=Seeing)
    facts = tg.analyze(tg.capture(spec_of(model, dynamic=True)))
    graph = facts.program[TASK]
    assert graph.check is not None
    assert graph.check.batches == 2
    assert graph.trained_inputs == ("tower",)
    assert any("tower: computed before the graph" in note for note in graph.check.notes)
    accelerated = tg.apply(facts, tg.Plan(()))
    for inputs in (batch(), batch((5, 1), seed=3), batch((1, 2, 3), image=2, seed=4)):
        same(accelerated, model, inputs)
    thinned = tg.apply(facts, tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),)))
    tg.verify(thinned).raise_if_failed()
    model.tower.norm.eval()
    for inputs in (batch(), batch((5, 1), seed=3)):
        ids = inputs["ids"]
        x = model.embed(ids).masked_scatter(
            (ids == IMAGE_ID).unsqueeze(-1), model.features(inputs["patches"], inputs["counts"])
        )
        dropped = m.dropped(ids)
        for number, layer in enumerate(model.layers):
            x = layer(x) if number != 1 else torch.where(dropped.unsqueeze(-1), x, layer(x, dropped))
        by_hand = m.cross_entropy(model.read(x), inputs["labels"])
        assert m.worst(thinned[TASK](**inputs), by_hand, model) < 1e-10
    thinned.save(tmp_path)
    loaded = tg.load_accelerated(tmp_path)
    given = model.features(inputs["patches"], inputs["counts"])
    assert torch.equal(loaded[TASK](**inputs, tower=given), thinned[TASK](**inputs))
    tg.verify(loaded).raise_if_failed()


# ------------------------------------------------------------------ other ways to call one


class Frozen(Seeing):
    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        with torch.no_grad():
            return self.tower(patches, counts)


class Twice(Seeing):
    """Called in a loop, once on what it gave before."""

    def make(self) -> nn.Module:
        return nn.Linear(HIDDEN, HIDDEN)

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.widen = nn.Linear(m.FEATURES, HIDDEN)

    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        x = self.widen(patches[:, :-1].flatten(0, 1))
        for _ in range(2):
            x = self.tower(x).tanh()
        return x


class Checkpointed(Seeing):
    """A reentrant checkpoint around the tower: what it computes has no gradients until it is recomputed."""

    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        return checkpoint(self.tower, patches.requires_grad_(), counts, use_reentrant=True)

    def make(self) -> nn.Module:
        tower = super().make()
        tower.norm.eval()  # or recomputing would count the batch twice
        return tower


@dataclass
class Result:
    rows: Tensor
    hidden: tuple[Tensor, ...]
    count: int
    name: str | None = None


class Structured(Tower):
    def forward(self, patches: Tensor, counts: Tensor) -> Result:
        rows = super().forward(patches, counts)
        return Result(rows, (rows * 2, rows), rows.shape[0])


class OfDataclass(Seeing):
    def make(self) -> nn.Module:
        return Structured()

    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        found = self.tower(patches, counts)
        return (found.rows + 0.5 * found.hidden[0] + found.hidden[1])[: found.count]


class Scaling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5


class Untraceable(Tower):
    """What no graph could hold: a backward of its own, hooks, noise from NumPy's generator would be another."""

    def forward(self, patches: Tensor, counts: Tensor) -> Tensor:
        return Scaling.apply(super().forward(patches, counts))


class Hooked(Seeing):
    def make(self) -> nn.Module:
        tower = Untraceable()
        tower.register_forward_hook(lambda module, args, result: result * 1.5)
        tower.out.register_full_backward_hook(lambda module, grads, _: tuple(2 * g for g in grads))
        return tower


class Dropping(Seeing):
    def make(self) -> nn.Module:
        return nn.ModuleDict({"tower": Tower(), "drop": nn.Dropout(0.5)})

    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        return self.encoded(patches, counts)

    def encoded(self, patches: Tensor, counts: Tensor) -> Tensor:
        return self.tower["drop"](self.tower["tower"](patches, counts))


class DeepStacked(Seeing):
    """Features come in again; the tower gives a list."""

    class Lists(Tower):
        def forward(self, patches: Tensor, counts: Tensor) -> list[Tensor]:
            rows = super().forward(patches, counts)
            return [rows, rows.sin()]

    def make(self) -> nn.Module:
        return self.Lists()

    def loss(self, ids: Tensor, patches: Tensor, counts: Tensor, labels: Tensor) -> Tensor:
        first, again = self.tower(patches, counts)
        mask = (ids == IMAGE_ID).unsqueeze(-1)
        x = self.embed(ids).masked_scatter(mask, first)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            x = x + torch.zeros_like(x).masked_scatter(mask, again) if number == 0 else x
        return m.cross_entropy(self.read(x), labels)


WAYS: dict[str, tuple[type[Seeing], str]] = {
    "frozen": (Frozen, "tower"),
    "a checkpoint": (Checkpointed, "tower"),
    "in a loop": (Twice, "tower"),
    "a dataclass": (OfDataclass, "tower"),
    "hooks and a backward of its own": (Hooked, "tower"),
    "a method, with dropout": (Dropping, "encoded"),
    "a list, used twice": (DeepStacked, "tower"),
}


@pytest.mark.parametrize("way", [w if w == "in a loop" else pytest.param(w, marks=pytest.mark.slow) for w in WAYS])
def test_ways_to_call_a_submodule(way: str) -> None:
    cls, path = WAYS[way]
    model = m.model(cls=cls, layers=2)
    if way == "frozen":
        model.tower.requires_grad_(False)
    accelerated = exact(spec_of(model, path=path))
    tg.verify(accelerated).raise_if_failed()
    for inputs in (batch(), batch((5, 1), seed=3)):
        same(accelerated, model, inputs)


@pytest.mark.slow
def test_a_frozen_decoder_trains_its_tower() -> None:
    model = m.model(cls=Seeing, layers=2)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("tower"))
    accelerated = exact(spec_of(model))
    tg.verify(accelerated).raise_if_failed()
    same(accelerated, model, batch((5, 1), seed=3))
    cost = tg.costs(accelerated.program, accelerated.facts)[TASK]
    assert cost.total().backward_flops > 0  # through the decoder, into the tower


@pytest.mark.slow
def test_changes_of_the_model_are_followed() -> None:
    model = m.model(cls=Seeing, layers=2)
    accelerated = exact(spec_of(model))
    model.eval()
    same(accelerated, model, batch())
    model.float()
    single = {k: x.float() if x.is_floating_point() else x for k, x in batch((5, 1), seed=3).items()}
    torch.testing.assert_close(accelerated[TASK](**single), model.loss(**single))
    model.double()
    model.tower = Tower().double().eval()
    accelerated.refresh()
    same(accelerated, model, batch())
    module = accelerated.trainable(TASK)
    assert torch.equal(module(**batch())["loss"], accelerated[TASK](**batch()))
    given = model.features(batch()["patches"], batch()["counts"])
    assert torch.equal(accelerated[TASK](**batch(), tower=given), accelerated[TASK](**batch()))  # computed once, kept


@pytest.mark.slow
def test_what_is_precomputed_may_carry_the_visual_tokens() -> None:
    class Joined(Seeing):
        def loss(self, ids: Tensor, patches: Tensor, counts: Tensor, labels: Tensor) -> Tensor:
            x = torch.cat([self.tower(patches, counts).unflatten(0, (patches.shape[0], -1)), self.embed(ids)], 1)
            for layer in self.layers:
                x = layer(x)
            return m.cross_entropy(self.read(x)[:, -ids.shape[1] :], labels)

    model = m.model(cls=Joined, layers=3)
    accelerated = tg.optimize(
        spec_of(model, visual=None, visual_inputs="tower"), tg.Plan((tg.DropSite(TASK, 1, 2, 0.5),))
    )
    assert accelerated.facts[TASK].visual.count == 4
    same(exact(spec_of(model, visual=None, visual_inputs=("tower",))), model, batch((5, 1), seed=3))


# ------------------------------------------------------------------ refused


class NotCalled(Seeing):
    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        return type(self.tower).forward(self.tower, patches, counts)


class AfterDecoder(Seeing):
    def loss(self, ids: Tensor, patches: Tensor, counts: Tensor, labels: Tensor) -> Tensor:
        x = self.layers[0](self.embed(ids))
        rows = self.tower(patches + x.mean(), counts)
        for layer in self.layers[1:]:
            x = layer(x.masked_scatter((ids == IMAGE_ID).unsqueeze(-1), rows))
        return m.cross_entropy(self.read(x), labels)


class Objects(Tower):
    def forward(self, patches: Tensor, counts: Tensor) -> Any:
        return super().forward(patches, counts), object()


class OfObjects(Seeing):
    def make(self) -> nn.Module:
        return Objects()

    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        return self.tower(patches, counts)[0]


class Counting(Seeing):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.register_buffer("calls", torch.zeros(()))

    def features(self, patches: Tensor, counts: Tensor) -> Tensor:
        self.calls += 1
        return self.tower(patches, counts)


REFUSED = {
    "forward itself called": (NotCalled, "does not call tower"),
    "after the decoder": (AfterDecoder, "attends before the last call of tower"),
    "an object": (OfObjects, "tower returns a object"),
    "a buffer before it": (Counting, "writes the buffer calls before the last call of tower"),
}


@pytest.mark.parametrize("why", sorted(REFUSED))
def test_refused(why: str) -> None:
    cls, text = REFUSED[why]
    with pytest.raises(tg.CaptureError, match=text):
        tg.capture(spec_of(m.model(cls=cls, layers=2)))


def test_names_of_tensors_that_there_are_not() -> None:
    for task in ({"dynamic": {"tower.1": {0: "features"}}}, {"visual": None, "visual_inputs": "tower.1"}):
        spec = m.spec(m.model(cls=Seeing, layers=1), batch(), loss, precomputed="tower", **task)
        with pytest.raises(tg.SpecError, match="no 'tower.1' among what is precomputed"):
            tg.capture(spec)


def test_paths_that_are_none() -> None:
    model = m.model(cls=Seeing, layers=1)
    for path in ("eye", "tower.patch.weight", "", "tower..patch"):
        with pytest.raises(tg.SpecError, match="no submodule of the model"):
            spec_of(model, path=path)


@pytest.mark.slow
def test_batches_that_do_not_fit() -> None:
    class OfLists(DeepStacked):
        class Lists(Tower):
            def forward(self, patches: Tensor, counts: Tensor) -> list[Tensor]:
                rows = super().forward(patches, counts)
                return [rows, rows.sin()] if len(counts) < 3 else [rows, rows.sin(), rows.cos()]

    dims = {**DYNAMIC, "tower": {0: "features"}}
    accelerated = exact(m.spec(m.model(cls=OfLists, layers=2), batch(), loss, dynamic=dims, precomputed="tower"))
    with pytest.raises(tg.BatchError, match="gets 3 tensors from tower, and 2 in the example"):
        accelerated[TASK](**batch((1, 2, 3)))
    with pytest.raises(tg.BatchError, match=r"what is precomputed \(tower\) fails on this batch"):
        accelerated[TASK](**{**batch(), "patches": batch()["patches"][..., 1:]})
    fixed = exact(spec_of(m.model(cls=Seeing, layers=2)))
    with pytest.raises(tg.BatchError, match="input 'tower' has 7 in dimension 0"):
        fixed[TASK](**{**batch(), "counts": torch.tensor([4, 3])})
    with pytest.raises(tg.BatchError, match="takes the inputs ids, patches, labels, counts; got ids"):
        fixed[TASK](ids=batch()["ids"])

"""Experts of modalities that take rows and put them back: by masks, positions, lists and ranges. Drops are those by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests.field import decoder as m
from tokgraph.passes.simplify.taken import routed
from tokgraph.report import make_report

SLOW = pytest.mark.slow
Expert = Callable[[Tensor], Tensor]
Way = Callable[[Tensor, list[Tensor], Expert, Expert, int], Tensor]
"""Rows, where each expert works, the experts, the width of what they return."""


def by_mask(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    out = x.new_zeros(*x.shape[:2], width)
    out[~at[0]] = text(x[~at[0]])
    out[at[0]] = image(x[at[0]])
    return out


def by_scattered_mask(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    out = torch.empty(*x.shape[:2], width, dtype=x.dtype)
    for mask, expert in ((~at[0], text), (at[0], image)):
        out = out.masked_scatter(mask.unsqueeze(-1), expert(x[mask]))
    return out


def by_elements(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    """A mask over elements, and experts that each choose two ways for a row (ERNIE 4.5 VL)."""

    def chosen(expert: Expert, rows: Tensor) -> Tensor:
        weights, ways = rows[:, :4].softmax(-1).topk(2)
        several = rows.repeat_interleave(2, 0) * (1 + ways.flatten().unsqueeze(1))
        made = expert(several) * weights.flatten().unsqueeze(1)
        return made.view(-1, 2, width).sum(1)

    out, mask = x.new_zeros(*x.shape[:2], width), at[0].unsqueeze(-1)
    for kind, expert in ((~mask.expand_as(x), text), (mask.expand_as(x), image)):
        put = kind[..., :1].expand_as(out)
        out[put] = chosen(expert, x[kind].view(-1, x.shape[-1])).flatten()
    return out


def by_neighbours(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    """The last row of an image is text."""
    vision = torch.zeros_like(at[0])
    vision[:, :-1] = at[0][:, :-1] & at[0][:, 1:]
    return by_mask(x, [vision], text, image, width)


def by_places(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    out = x.new_zeros(*x.shape[:2], width)
    for mask, expert in ((~at[0], text), (at[0], image)):
        places = torch.where(mask)
        out[places] = expert(x[places])
    return out


def by_columns(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    out = x.new_zeros(*x.shape[:2], width)
    for mask, expert in ((~at[0], text), (at[0], image)):
        samples, rows = mask.nonzero()[:, 0], mask.nonzero()[:, 1]
        out = out.index_put((samples, rows), expert(x[samples, rows]))
    return out


def by_flat_places(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_zeros(flat.shape[0], width)
    for mask, expert in ((~at[0], text), (at[0], image)):
        places = mask.flatten().nonzero().squeeze(1)
        out = out.index_copy(0, places, expert(flat[places]))
    return out.view(*x.shape[:2], width)


def by_sum(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_zeros(flat.shape[0], width)
    for mask, expert in ((~at[0], text), (at[0], image)):
        places = mask.flatten().nonzero()
        taken = flat.gather(0, places.expand(-1, flat.shape[1]))
        out = out.scatter_add(0, places.expand(-1, width), expert(taken))
    return out.view(*x.shape[:2], width)


def by_more(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    """One expert for all rows, and more for those of the image."""
    out = text(x).clone()
    out[at[0]] = out[at[0]] + image(x[at[0]])
    return out


def by_list(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    out = x.new_zeros(*x.shape[:2], width)
    for rows, expert in zip(at, (text, image), strict=True):
        out[:, rows] = expert(x[:, rows])
    return out


def by_flat_list(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_zeros(flat.shape[0], width)
    for rows, expert in zip(at, (text, image), strict=True):
        out[rows] = expert(flat[rows])
    return out.view(*x.shape[:2], width)


def by_list_of_sample(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    out, samples = x.new_zeros(*x.shape[:2], width), torch.arange(x.shape[0])[:, None]
    out[samples, at[0]] = text(x[samples, at[0]])
    taken = x.gather(1, at[1][..., None].expand(-1, -1, x.shape[-1]))
    return out.scatter(1, at[1][..., None].expand(-1, -1, width), image(taken))


def by_ranges(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    return torch.cat([text(x[:, :2]), image(x[:, 2:6]), text(x[:, 6:])], 1)


def by_writes(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
    out = x.new_zeros(*x.shape[:2], width)
    out[:, :2], out[:, 2:6], out[:, 6:] = text(x[:, :2]), image(x[:, 2:6]), text(x[:, 6:])
    return out


BY_MASK = (
    by_mask,
    by_scattered_mask,
    by_elements,
    by_neighbours,
    by_places,
    by_columns,
    by_flat_places,
    by_sum,
    by_more,
)
SAME_PLACES = (by_list, by_ranges, by_writes)
WAYS = (*BY_MASK, *SAME_PLACES, by_flat_list, by_list_of_sample)


class Mixed(nn.Module):
    """A layer whose experts share its attention."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(m.HIDDEN) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(m.HIDDEN, 3 * m.HIDDEN) for _ in range(2))
        self.feed = nn.ModuleList(m.Block().feed for _ in range(2))
        self.out, self.way = nn.Linear(m.HIDDEN, m.HIDDEN), way

    def forward(self, x: Tensor, hidden: m.Hidden, at: list[Tensor]) -> Tensor:
        q, k, v = self.way(x, at, *(self.behind(i, self.qkv[i]) for i in (0, 1)), 3 * m.HIDDEN).chunk(3, -1)
        x = x + self.out(m.plain(q, k, v, hidden))
        return x + self.way(x, at, *(self.behind(i + 2, self.feed[i]) for i in (0, 1)), m.HIDDEN)

    def behind(self, norm: int, then: nn.Module) -> Expert:
        return lambda rows: then(self.norms[norm](rows))


class Mixture(m.Model):
    """A decoder of such layers."""

    def forward(  # type: ignore[override]
        self, ids: Tensor, patches: Tensor, at: list[Tensor], span: range = range(0), hidden: m.Hidden = None
    ) -> Tensor:
        x = self.enter(ids, patches)
        for number, layer in enumerate(self.layers):
            dropped = hidden if number in span else None
            after = layer(x, dropped, at)
            x = after if dropped is None else torch.where(dropped.unsqueeze(-1), x, after)
        return self.read(x)


def loss(model: Mixture, ids: Tensor, patches: Tensor, labels: Tensor, at: list[Tensor], **by_hand: Any) -> Tensor:
    return m.cross_entropy(model(ids, patches, at, **by_hand), labels)


def batch(way: Way, seed: int = 0, samples: int = 2, image: bool | None = None) -> dict[str, Any]:
    """Rows of the image, or all, or none of them, go to the second expert."""
    places = [2] * samples if way in SAME_PLACES else [2 + (i + seed) % 3 for i in range(samples)]
    found = m.batch(places, seed=seed)
    vision = found["ids"] == m.IMAGE_ID if image is None else torch.full_like(found["ids"], image, dtype=torch.bool)
    at = [vision]
    if way is by_list:
        at = [(~vision[0]).nonzero().flatten().flip(0), vision[0].nonzero().flatten()]
    elif way is by_flat_list:
        at = [(~vision).flatten().nonzero().flatten(), vision.flatten().nonzero().flatten()]
    elif way is by_list_of_sample:
        at = [torch.stack([row.nonzero().flatten() for row in rows]) for rows in (~vision, vision)]
    return {**found, "at": at}


def mixture(way: Way, layers: int = 2) -> Mixture:
    torch.manual_seed(0)
    return Mixture([Mixed(way) for _ in range(layers)]).double()


def facts_of(model: Mixture, way: Way) -> tg.Facts:
    return tg.analyze(tg.capture(m.spec(model, batch(way), loss)))


SITE = tg.Plan((tg.DropSite(m.TASK, 0, 1, 0.5),), exact=True)


@pytest.mark.parametrize("way", [w if w is by_list else pytest.param(w, marks=SLOW) for w in WAYS])
def test_drops_are_those_by_hand(way: Way) -> None:
    model = mixture(way)
    facts = facts_of(model, way)
    accelerated = tg.apply(facts, SITE)
    assert not accelerated.program[m.TASK].graph.find_nodes(op="call_function", target=routed)
    for inputs in (batch(way), batch(way, seed=1)):
        reference = loss(model, **inputs, span=range(1), hidden=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[m.TASK](**inputs), reference, model) < 1e-10
    if way is by_neighbours:
        for image in (False, True):  # nothing for one of the experts
            inputs = batch(way, seed=2, image=image)
            reference = loss(model, **inputs, span=range(1), hidden=m.dropped(inputs["ids"]))
            assert m.worst(accelerated[m.TASK](**inputs), reference, model) < 1e-10
    report = make_report(accelerated)["tasks"][m.TASK]
    assert report["tokens_per_block"]["after"] == [2.0, 1.0]  # the last row of the image is read
    assert report["flops"]["ratio"] < 0.95


@SLOW
@pytest.mark.parametrize("way", [by_neighbours, by_ranges])
def test_verified_and_frozen(way: Way) -> None:
    model = mixture(way)
    facts = facts_of(model, way)
    for plan in (
        SITE,
        tg.Plan((tg.DropSite(m.TASK, 0, 1, 0.5, mode="freeze"),)),
        tg.Plan((tg.DropSite(m.TASK, 1, None, 0.5, restore=False),)),
    ):
        tg.verify(tg.apply(facts, plan)).raise_if_failed()


@SLOW
def test_experts_are_counted_by_the_rows_that_they_take() -> None:
    """A graph that computes both values of every row, to be followed, is counted and run as the model's code is."""
    model = mixture(by_mask, layers=1)
    facts = facts_of(model, by_mask)[m.TASK]
    both, whole = (
        sum(n.work.forward_flops for n in facts.cost.at().nodes if n.module.startswith(f"layers.0.{part}"))
        for part in ("qkv", "out")
    )
    assert both == 3 * whole
    assert facts.profile["layers.0.qkv.1.weight"] == 1.0
    assert facts.profile["layers.0.qkv.0.weight"] == 0.0


@SLOW
def test_a_row_that_is_given_twice_is_refused() -> None:
    model = mixture(by_list, layers=1)
    task = tg.optimize(m.spec(model, batch(by_list), loss), "exact")[m.TASK]
    inputs = batch(by_list)
    inputs["at"] = [inputs["at"][0], torch.tensor([2, 3, 4, 4])]
    with pytest.raises(tg.BatchError, match="two positions of a list are one row"):
        task(**inputs)


@SLOW
def test_rows_that_something_else_reads_are_left_to_the_model() -> None:
    """Rows of the image attend to one another inside: no row by row function, so that no row can be dropped there."""

    def mixing(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
        out = x.new_zeros(*x.shape[:2], width)
        rows = image(x[at[0]])
        out[at[0]] = rows - rows.sum(0) / rows.shape[0]
        out[~at[0]] = text(x[~at[0]])
        return out

    model = mixture(mixing)
    facts = facts_of(model, mixing)
    with pytest.raises(tg.IllegalRewriteError, match=r"how many rows aten\.index\.Tensor takes depends on values"):
        tg.apply(facts, SITE)
    inputs = batch(mixing, seed=1)
    assert (
        m.worst(tg.apply(facts, tg.make_plan(facts, "exact"))[m.TASK](**inputs), loss(model, **inputs), model) < 1e-10
    )


class Begun(m.Model):
    """Rows of the image are changed in front of the layers."""

    change: Callable[[Tensor, Tensor], Tensor]

    def forward(self, ids: Tensor, patches: Tensor, amount: Tensor) -> Tensor:  # type: ignore[override]
        x, mask = self.enter(ids, patches), ids == m.IMAGE_ID
        out = x.clone()
        out[mask] = type(self).change(x[mask], (self.norm.weight[:1] * amount)[mask])
        for layer in self.layers:
            out = layer(out)
        return self.read(out)


def begun(model: Begun, ids: Tensor, patches: Tensor, labels: Tensor, amount: Tensor) -> Tensor:
    return m.cross_entropy(model(ids, patches, amount), labels)


CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divided": lambda x, amount: x / amount,
    "log": lambda x, amount: x + amount.log(),
    "root": lambda x, amount: x * amount.sqrt(),
    "norm": lambda x, amount: x / (x * amount).norm(dim=-1, keepdim=True),
    "root mean square": lambda x, amount: x * torch.rsqrt((x * amount).pow(2).mean(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("change", [c if c == "divided" else pytest.param(c, marks=SLOW) for c in CHANGES])
def test_rows_that_have_no_value_are_not_computed(change: str) -> None:
    """Amounts of text may be 0 in another batch: its rows would be infinite, and gradients NaN."""
    model = m.model(cls=type("Begun", (Begun,), {"change": CHANGES[change]}), layers=1)
    inputs = m.batch()
    inputs["amount"] = torch.rand(*inputs["ids"].shape, 1, dtype=torch.float64) + 0.5
    other = {**inputs, "amount": inputs["amount"] * (inputs["ids"] == m.IMAGE_ID).unsqueeze(-1)}
    accelerated = tg.optimize(m.spec(model, inputs, begun), "none", verify=False)
    for now in (inputs, other):
        assert m.worst(accelerated[m.TASK](**now), begun(model, **now), model) < 1e-10
    found = accelerated.captured[m.TASK].graph.find_nodes(op="call_function", target=routed)
    assert bool(found) is (change == "root mean square")


@SLOW
def test_the_users_choice_of_values_stays() -> None:
    def chosen(x: Tensor, at: list[Tensor], text: Expert, image: Expert, width: int) -> Tensor:
        return torch.where(at[0].unsqueeze(-1), image(x), text(x))

    model = mixture(chosen)
    accelerated = tg.apply(facts_of(model, chosen), SITE)
    assert not accelerated.program[m.TASK].graph.find_nodes(op="call_function", target=torch.ops.aten.nonzero.default)


@SLOW
def test_everything_behind_a_plan(tmp_path: Any) -> None:
    """Blocks as modules, compiled, saved and loaded, in ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    model = mixture(by_mask).float()
    inputs = {k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in batch(by_mask).items()}
    accelerated = tg.apply(tg.analyze(tg.capture(m.spec(model, inputs, loss))), SITE)
    expected = accelerated[m.TASK](**inputs)
    assert torch.allclose(accelerated.module()(m.TASK, **inputs), expected)
    accelerated.export_onnx(tmp_path / "onnx", ("forward",))
    accelerated.save(tmp_path / "saved")
    loaded = tg.load_accelerated(tmp_path / "saved")
    assert torch.equal(loaded[m.TASK](**inputs), expected)
    assert loaded.facts[m.TASK].cost.at().total().flops == accelerated.facts[m.TASK].cost.at().total().flops
    accelerated.compile(backend="aot_eager")
    assert torch.allclose(accelerated[m.TASK](**inputs), expected)

"""Which axis indexes samples is followed, not assumed; and what mixes samples inside a span is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field import structures as s
from tests.field.decoder import HEADS, TASK, Block, Hidden, heads

SITE = tg.DropSite(TASK, 1, 2, 0.5)


def heads_first(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    q, k, v = (heads(x).permute(2, 0, 1, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, m.causal(q.shape[2], hidden)[None]).permute(1, 2, 0, 3).flatten(2)


def heads_first_eager(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    q, k, v = (heads(x).permute(2, 0, 1, 3) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).masked_fill(~m.causal(q.shape[2], hidden), -torch.inf)
    return (scores.softmax(-1) @ v).permute(1, 2, 0, 3).flatten(2)


def without_heads(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, m.causal(q.shape[1], hidden))


def merged(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    q, k, v = (heads(x).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    mask = m.causal(q.shape[1], hidden)
    mask = mask if len(mask) == 1 else mask.repeat_interleave(HEADS, 0)
    rows = F.scaled_dot_product_attention(q, k, v, mask)
    return rows.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


def grouped(q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    q, k, v = (x.unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4) for x in (q, k, v))
    rows = F.scaled_dot_product_attention(q, k, v, m.causal(q.shape[3], hidden)[None, :, None])
    return rows.permute(1, 3, 0, 2, 4).flatten(2)


def scores_as(letters: str, q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
    """Scores in whatever order an einsum writes them: samples, heads, queries and keys are b, h, i and j."""
    weights = torch.einsum(f"bihd,bjhd->{letters}", heads(q), heads(k)) / 2
    mask = m.causal(q.shape[1], hidden).unsqueeze(1).permute(["bhij".index(x) for x in letters])
    weights = weights.masked_fill(~mask, -torch.inf).softmax(letters.index("j"))
    return torch.einsum(f"{letters},bjhd->bihd", weights, heads(v)).flatten(2)


scores_by_heads, keys_first, heads_between = (partial(scores_as, letters) for letters in ("bijh", "bjih", "bihj"))
LAYOUTS = [heads_first, heads_first_eager, without_heads, merged, grouped, scores_by_heads, keys_first, heads_between]


@pytest.mark.parametrize(
    ("dynamic", "samples"),
    [
        (False, HEADS),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((False, 1), (True, HEADS))),
    ],
)
@pytest.mark.parametrize(
    "attend", [a if a in (heads_first, keys_first) else pytest.param(a, marks=pytest.mark.slow) for a in LAYOUTS]
)
def test_attention_in_every_layout(attend: Callable[..., Tensor], dynamic: bool, samples: int) -> None:
    """Also where there are as many heads as samples."""
    model, at = m.model(partial(Block, attend)), (2, 3, 5, 1)[:samples]
    accelerated = tg.optimize(m.spec(model, m.batch(at), dynamic=dynamic), tg.Plan((SITE,)))
    other = m.batch(at[::-1], seed=4)
    by_hand = m.loss(model, **other, span=range(1, 2), hidden=m.dropped(other["ids"]))
    assert m.worst(accelerated[TASK](**other), by_hand, model) < 1e-8


class Joined(s.Looped):
    """Image rows are joined to those of text, so that no input holds all tokens and shows the axis of samples beside them."""

    def enter(self, ids: Tensor, patches: Tensor) -> Tensor:
        x = self.embed(ids)
        return torch.cat([x[:, :3], self.patch(patches), x[:, 7:]], 1)


@pytest.mark.parametrize("attend", [heads_first, pytest.param(heads_first_eager, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), HEADS])
def test_layers_that_are_cut_apart_follow_samples_from_their_stream(attend: Callable[..., Tensor], count: int) -> None:
    """The value that showed the axis of tokens, an attention's, has its heads where the stream has its samples."""
    model, at = m.model(partial(s.PostNorm, attend), cls=Joined), (3,) * count
    where = tg.VisualTokens.positions(slice(3, 7))
    accelerated = tg.optimize(m.spec(model, m.batch(at), s.loss, visual=where), tg.Plan((SITE,)))
    other = m.batch(at, seed=4)
    by_hand = model.loss(**other, span=range(1, 2), dropped=m.dropped(other["ids"]))
    assert m.worst(accelerated[TASK](**other), by_hand, model) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("attend", [heads_first_eager, grouped])
def test_ragged_samples_in_every_layout(attend: Callable[..., Tensor]) -> None:
    """Padding is hidden, and frozen rows are found, on the axes that the attention has."""
    model, inputs = m.model(partial(Block, attend), layers=4), m.batch((2, 3, 5))
    inputs["ids"][0, 5] = 7
    for site in (
        tg.DropSite(TASK, 1, 3, 0.5, ragged="pad"),
        tg.DropSite(TASK, 1, 3, 0.5, mode="freeze", ragged="pad"),
        tg.DropSite(TASK, 1, None, 0.5, restore=False, ragged="pad"),
    ):
        assert tg.optimize(m.spec(model, inputs), tg.Plan((site,), exact=True)).verification.passed  # type: ignore[union-attr]


def test_the_attention_selector_wants_the_batch_first() -> None:
    with pytest.raises(tg.PlanError, match="its samples on axis 1"):
        tg.optimize(m.spec(m.model(partial(Block, heads_first)), m.batch()), "fastv", k=1)


def stacked(model: m.Model, ids: Tensor, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(ids, patches)
    return m.cross_entropy(logits, labels), torch.stack([logits, 2 * logits])


@pytest.mark.parametrize("samples", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stacked_outputs_stay_whole(samples: int) -> None:
    """Two outputs stacked look like a batch of two."""
    inputs, model = m.batch((2, 3, 5)[:samples]), m.model()
    accelerated = tg.optimize(m.spec(model, inputs, stacked), "exact")
    other = m.batch((4, 1, 2)[:samples], seed=3)
    _, found = accelerated[TASK](**other)
    assert found.shape == (2, samples, 12, m.VOCABULARY)
    torch.testing.assert_close(found, stacked(model, **other)[1])


MIXING = {
    "mean": (lambda b, h: h - h.mean(0, keepdim=True), "reduces over the batch axis"),
    "norm": (lambda b, h: h / h.norm(dim=0, keepdim=True), "reduces over the batch axis"),
    "roll": (lambda b, h: h.roll(1, 0), "runs along the batch axis"),
    "cumsum": (lambda b, h: h.cumsum(0), "runs along the batch axis"),
    "sort": (lambda b, h: h.sort(0).values, "reads or writes samples by order or index"),
    "first": (lambda b, h: h - h[:1], "splits, merges, cuts or joins the batch axis"),
    "halves": (lambda b, h: torch.cat(h.chunk(2)[::-1]), "the batch axis"),
    "order": (lambda b, h: h[torch.arange(h.shape[0] - 1, -1, -1)], "reads or writes samples by order or index"),
    "softmax": (lambda b, h: h.softmax(0), "normalises over the batch axis"),
    "linear attention": (
        lambda b, h: (h.permute(1, 0, 2) @ h.permute(1, 2, 0) @ h.permute(1, 0, 2)).transpose(0, 1),
        "sums over the batch axis",
    ),
    "einsum": (lambda b, h: torch.einsum("btd,be->ted", h, h[:, 0]).transpose(0, 1)[:1] + h, "block 1: aten"),
    "weights": (lambda b, h: F.linear(h.transpose(0, 2), b.mix).transpose(0, 2), "sums over the batch axis"),
    "attention": (
        lambda b, h: F.scaled_dot_product_attention(*(h.transpose(0, 1),) * 3).transpose(0, 1),
        "lets samples attend to one another",
    ),
    "batch norm": (
        lambda b, h: F.batch_norm(h.transpose(1, 2), None, None, training=True).transpose(1, 2),
        "tokens cannot be dropped in block",
    ),
}


QUICK = ("mean", "linear attention", "attention")


def mixing(step: Callable[[nn.Module, Tensor], Tensor]) -> Block:
    block = Block(step=step)
    block.mix = nn.Parameter(torch.eye(2))
    return block


@pytest.mark.parametrize("how", [h if h in QUICK else pytest.param(h, marks=pytest.mark.slow) for h in MIXING])
def test_what_mixes_samples_in_a_span_is_refused(how: str) -> None:
    """With images at the same places the oracle would agree, and the next batch would be wrong."""
    step, why = MIXING[how]
    program = tg.capture(m.spec(m.model(partial(mixing, step), layers=2), m.batch((3, 3))))
    for mode in ("hide", "freeze"):
        with pytest.raises(tg.IllegalRewriteError, match=why) as caught:
            tg.apply(program, tg.Plan((tg.DropSite(TASK, 1, 2, 0.5, mode=mode),)))  # type: ignore[arg-type]
        where = caught.value.where
        assert where is not None
        assert where.node
        assert where.module == "layers.1"
        assert caught.value.help


@pytest.mark.slow
def test_what_mixes_samples_outside_of_the_span_stays() -> None:
    step = MIXING["mean"][0]
    torch.manual_seed(0)
    model = m.Model([mixing(step), Block(), mixing(step)]).double()
    inputs, other = m.batch((3, 3)), m.batch((2, 5), seed=2)
    accelerated = tg.optimize(m.spec(model, inputs), tg.Plan((SITE,)))
    by_hand = m.loss(model, **other, span=range(1, 2), hidden=m.dropped(other["ids"]))
    assert m.worst(accelerated[TASK](**other), by_hand, model) < 1e-8


def test_a_rule_that_forgets_an_axis_is_no_licence() -> None:
    """A rule of the user's own that neither follows nor mixes the token axis."""

    @torch.library.custom_op("field::blend", mutates_args=())
    def blend(x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)

    blend.register_fake(torch.empty_like)
    from tokgraph.passes.rules import AxisMap, rule

    rule(torch.ops.field.blend.default)(lambda node: AxisMap((None,) * 3))
    spec = m.spec(m.model(partial(Block, m.plain, lambda b, h: torch.ops.field.blend(h.detach())), 2), m.batch())
    with pytest.raises(tg.IllegalRewriteError, match="does not say what it does to the token or the batch axis"):
        tg.apply(tg.capture(spec), tg.Plan((SITE,)))


FUSED = {
    "addcmul": lambda b, h: torch.addcmul(b.norm2.bias, b.norm2.weight, h, value=0.5),
    "addcdiv": lambda b, h: torch.addcdiv(h, b.norm2.bias + 1, h.abs() + 1),
    "lerp": lambda b, h: torch.lerp(h, b.norm2.bias + 1, 0.3),
    "lerp by weights": lambda b, h: torch.lerp(b.norm2.bias + 1, h, b.norm2.weight.sigmoid()),
}


@pytest.mark.parametrize("how", ["addcmul", *(pytest.param(h, marks=pytest.mark.slow) for h in list(FUSED)[1:])])
def test_fused_arithmetic_over_symbols(how: str) -> None:
    """torch computes no shapes of these where they broadcast over symbolic sizes."""
    model = m.model(partial(Block, m.plain, FUSED[how]), layers=2)
    accelerated = tg.apply(tg.capture(m.spec(model, m.batch(), dynamic=True)), tg.Plan((SITE,), exact=True))
    other = m.batch((1, 4, 2), tokens=14, seed=3)
    by_hand = m.loss(model, **other, span=range(1, 2), hidden=m.dropped(other["ids"]))
    assert m.worst(accelerated[TASK](**other), by_hand, model) < 1e-8

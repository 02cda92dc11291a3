"""Where visual tokens are: as declared, or found by following the visual inputs into the stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import tokgraph as tg
from tests.passes import models
from tests.passes.models import IMAGE, IMAGE_ID, TOKENS, Decoder
from tokgraph.errors import AnalysisError, SpecError
from tokgraph.ir.facts import TaskFacts, VisualFlow
from tokgraph.passes.analysis.visual import range_bounds, visual_mask

IDS = models.image_ids()
IMAGES = torch.rand(2, IMAGE, 2, dtype=torch.float64)
WHERE = IDS == IMAGE_ID


def scattered(model: Decoder, ids: Tensor, images: Tensor) -> Tensor:
    mask = (ids == IMAGE_ID).unsqueeze(-1)
    return model.loss(model.tokens(ids).masked_scatter(mask, model.image(images).flatten(0, 1)), ids)


def scattered_expanded(model: Decoder, ids: Tensor, images: Tensor) -> Tensor:
    x = model.tokens(ids)
    mask = (ids == IMAGE_ID).unsqueeze(-1).expand_as(x)
    return model.loss(x.masked_scatter(mask, model.image(images)), ids)


def joined(model: Decoder, ids: Tensor, images: Tensor) -> Tensor:
    """One text token, the image, the rest of the text."""
    x = model.tokens(ids)
    return model.loss(torch.cat([x[:, :1], model.image(images), x[:, 1 : TOKENS - IMAGE]], 1), ids)


def joined_last(model: Decoder, ids: Tensor, images: Tensor) -> Tensor:
    return model.loss(torch.cat([model.tokens(ids[:, IMAGE:]), model.image(images)], 1), ids)


def chosen(model: Decoder, ids: Tensor, images: Tensor) -> Tensor:
    """Image rows put where they belong by ``where``."""
    padded = torch.nn.functional.pad(model.image(images), (0, 0, 1, TOKENS - IMAGE - 1))
    return model.loss(torch.where((ids == IMAGE_ID).unsqueeze(-1), padded, model.tokens(ids)), ids)


def put(model: Decoder, ids: Tensor, images: Tensor) -> Tensor:
    x = model.tokens(ids)
    return model.loss(x.index_put((ids == IMAGE_ID,), model.image(images).flatten(0, 1)), ids)


def codes(model: Decoder, ids: Tensor) -> Tensor:
    """Every token is an image code."""
    return model.loss(model.tokens(ids), ids)


def averaged(model: Decoder, ids: Tensor, images: Tensor) -> Tensor:
    """Image content spread over all rows."""
    return model.loss(model.tokens(ids) + model.image(images).mean(1, keepdim=True), ids)


def flow_of(
    forward: Callable[..., object], *, images: bool = True, ids: Tensor = IDS, **task: object
) -> tuple[VisualFlow, Tensor, TaskFacts]:
    inputs = {"ids": ids} | ({"images": IMAGES} if images else {})
    inputs |= task.pop("more", {})  # type: ignore[arg-type]
    spec = tg.ModelSpec(models.decoder(models.PreNorm, depth=1), {"t": tg.Task(forward, inputs, **task)})  # type: ignore[arg-type]
    program = tg.capture(spec)
    facts = tg.analyze(program)["t"]
    entry = next(n for n in program["t"].graph.nodes if n.name == facts.entry)
    return facts.visual, visual_mask(program["t"], facts.visual, entry), facts


FOUND = [
    (scattered, "mask", "aten.masked_scatter.default", IDS == IMAGE_ID),
    (scattered_expanded, "mask", "aten.masked_scatter.default", IDS == IMAGE_ID),
    (put, "mask", "aten.index_put.default", IDS == IMAGE_ID),
    (chosen, "mask", "aten.where.self", IDS == IMAGE_ID),
    (joined, "range", "aten.cat.default", (torch.arange(TOKENS) >= 1) & (torch.arange(TOKENS) < 1 + IMAGE)),
    (joined_last, "range", "aten.cat.default", torch.arange(TOKENS) >= TOKENS - IMAGE),
]


@pytest.mark.parametrize(("forward", "kind", "entry", "expected"), FOUND, ids=[f[0].__name__ for f in FOUND])
def test_found_from_the_visual_inputs(forward: object, kind: str, entry: str, expected: Tensor) -> None:
    flow, mask, _ = flow_of(forward, visual_inputs=("images",))  # type: ignore[arg-type]
    assert flow.kind == kind
    assert flow.count == IMAGE
    assert flow.runs == 1
    assert torch.equal(mask, expected.expand(2, -1))
    assert flow.entry.startswith(entry.split(".")[1])
    assert any(name.startswith("linear") for name in flow.branch), "the projection of the image is on the visual branch"


def test_an_embedding_of_visual_inputs_is_image_content_throughout() -> None:
    flow, mask, _ = flow_of(codes, images=False, visual_inputs=("ids",))
    assert (flow.kind, flow.start, flow.stop, flow.before) == ("range", 0, None, ())
    assert mask.all()
    assert flow.count == TOKENS


def test_what_is_joined_before_the_image_moves_the_range() -> None:
    flow, _, _ = flow_of(joined, visual_inputs=("images",))
    assert len(flow.before) == 1
    assert (flow.start, flow.stop) == (0, IMAGE)
    flow, _, _ = flow_of(joined_last, visual_inputs=("images",))
    assert len(flow.before) == 1
    assert (flow.start, flow.stop) == (0, None)


def test_content_that_reaches_every_row_cannot_be_followed() -> None:
    with pytest.raises(AnalysisError, match="cannot follow the visual inputs") as caught:
        flow_of(averaged, visual_inputs=("images",))
    assert "VisualTokens.ids" in str(caught.value.help)


def test_inputs_that_do_not_reach_the_stream() -> None:
    def unused(model: Decoder, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        return model.loss(model.tokens(ids), ids), model.image(images)

    with pytest.raises(AnalysisError, match=r"does not depend on the visual inputs \['images'\]"):
        flow_of(unused, visual_inputs=("images",))


# ------------------------------------------------------------------ declared


def masked(model: Decoder, ids: Tensor, images: Tensor, where: Tensor) -> Tensor:
    x = model.tokens(ids)
    return model.loss(x.masked_scatter(where.unsqueeze(-1), model.image(images).flatten(0, 1)), ids)


def test_a_declared_mask() -> None:
    flow, mask, _ = flow_of(masked, more={"where": WHERE}, visual=tg.VisualTokens.mask(input="where"))
    assert (flow.kind, flow.source) == ("mask", "where")
    assert torch.equal(mask, WHERE)


def test_a_mask_that_the_model_does_not_read() -> None:
    """An input that nothing reads says nothing about axes: it is taken at its word."""

    def ignoring(model: Decoder, ids: Tensor, images: Tensor, where: Tensor) -> Tensor:
        return scattered(model, ids, images)

    _, mask, _ = flow_of(ignoring, more={"where": WHERE}, visual=tg.VisualTokens.mask(input="where"))
    assert torch.equal(mask, WHERE)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (slice(2, 5), [2, 3, 4]),
        (slice(None, 2), [0, 1]),
        (slice(6, None), [6, 7]),
        (slice(-3, -1), [5, 6]),
        (slice(-2, None), [6, 7]),
        (slice(None), list(range(8))),
        (slice(1, 100), list(range(1, 8))),
    ],
)
def test_declared_positions(where: slice, expected: list[int]) -> None:
    flow = tg.VisualTokens.positions(where)
    start, stop = flow.span or (None, None)
    declared = VisualFlow("range", "", 0, 0, start=start or 0, stop=stop)
    assert list(range(*range_bounds(declared, TOKENS, 0))) == expected


@pytest.mark.parametrize("where", [slice(2, 5), slice(-3, -1), slice(4, None)])
def test_declared_positions_of_a_model(where: slice) -> None:
    flow, mask, _ = flow_of(codes, images=False, visual=tg.VisualTokens.positions(where), reads="all")
    assert torch.arange(TOKENS)[where].tolist() == mask[0].nonzero().flatten().tolist()
    assert flow.count == len(range(TOKENS)[where])


@pytest.mark.parametrize("where", [slice(0, 100), slice(-9, None), slice(20, None)])
def test_positions_that_the_stream_does_not_have_are_refused(where: slice) -> None:
    """An encoder-decoder has two streams, and the wrong one would have lost its answer."""
    with pytest.raises(tg.AnalysisError, match=rf"positions up to .* has {TOKENS} tokens"):
        flow_of(codes, images=False, visual=tg.VisualTokens.positions(where), reads="all")


def test_declared_id_ranges() -> None:
    ids = torch.tensor([[1, 7, 8, 9, 2, 3], [7, 9, 9, 1, 2, 3]])
    _, mask, _ = flow_of(codes, images=False, ids=ids, visual=tg.VisualTokens.ids(input="ids", low=7, high=9))
    assert torch.equal(mask, (ids >= 7) & (ids <= 9))


def test_runs_are_counted_per_sample() -> None:
    ids = torch.tensor([[1, 9, 9, 2, 9, 9, 3, 4], [1, 9, 9, 9, 9, 2, 3, 4]])
    flow, _, _ = flow_of(codes, images=False, ids=ids, visual=tg.VisualTokens.ids(input="ids", equal=9))
    assert (flow.count, flow.runs) == (4, 2)


def test_samples_may_hold_different_numbers_of_visual_tokens() -> None:
    ids = IDS.clone()
    ids[0, 1] = 2
    flow, _, _ = flow_of(codes, images=False, ids=ids, visual=tg.VisualTokens.ids(input="ids", equal=IMAGE_ID))
    assert (flow.count, flow.most, flow.mean, flow.ragged) == (2, 3, 2.5, True)


def test_samples_without_visual_tokens_are_refused() -> None:
    ids = IDS.clone()
    ids[1] = 2
    with pytest.raises(AnalysisError, match="sample 1 of the example batch holds no visual token"):
        flow_of(codes, images=False, ids=ids, visual=tg.VisualTokens.ids(input="ids", equal=IMAGE_ID))


def test_a_batch_without_visual_tokens_is_refused() -> None:
    with pytest.raises(AnalysisError, match="holds no visual token"):
        flow_of(codes, images=False, visual=tg.VisualTokens.ids(input="ids", equal=11))


def test_an_input_along_another_axis_is_refused() -> None:
    """The ids of the text alone do not say where the image is in the whole sequence."""
    text = IDS[:, IMAGE:].contiguous()

    def forward(model: Decoder, ids: Tensor, images: Tensor) -> Tensor:
        x = torch.cat([model.image(images), model.tokens(ids)], 1)
        return model.loss(x, torch.nn.functional.pad(ids, (IMAGE, 0)))

    with pytest.raises(AnalysisError, match="does not lie along the token axis of the residual stream"):
        flow_of(forward, ids=text, visual=tg.VisualTokens.ids(input="ids", equal=IMAGE_ID))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(tg.VisualTokens.ids, input="ids"), "needs equal=, or both"),
        (partial(tg.VisualTokens.ids, input="ids", low=3), "needs equal=, or both"),
        (partial(tg.VisualTokens.ids, input="ids", equal=3, low=2, high=4), "needs equal=, or both"),
        (partial(tg.VisualTokens.ids, input="ids", low=4, high=3), "low=4 is larger than high=3"),
        (partial(tg.VisualTokens.positions, slice(0, 4, 2)), "contiguous slice, got step 2"),
    ],
)
def test_declarations_that_say_nothing(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize(("forward", "kind", "entry", "expected"), FOUND, ids=[f[0].__name__ for f in FOUND])
def test_what_is_found_can_be_dropped_and_verified(forward: object, kind: str, entry: str, expected: Tensor) -> None:
    inputs = {"ids": IDS, "images": IMAGES}
    task = tg.Task(forward, inputs, visual_inputs=("images",), reads="all")  # type: ignore[arg-type]
    program = tg.capture(tg.ModelSpec(models.decoder(models.PreNorm, depth=2), {"t": task}))
    accelerated = tg.apply(program, tg.Plan((tg.DropSite("t", 0, 1, 0.34),)))
    assert tg.verify(program, accelerated).passed

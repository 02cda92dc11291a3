"""``visual_inputs=`` takes what comes from the image for visual, and neither text nor learned rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import TASK, Model

Join = Callable[["Joined", Tensor, Tensor, Tensor], Tensor]
IMAGE, QUERIES = 4, 3


class Joined(Model):
    """``join`` makes the stream of image features, embedded text and learned queries, each ``[batch, rows, hidden]``."""

    join: Join

    def stream(self, ids: Tensor, patches: Tensor, times: Tensor | None) -> Tensor:
        queries = self.queries.expand(len(ids), -1, -1)
        x = type(self).join(self, self.patch(patches), self.embed(ids), queries)
        if times is not None:
            x = torch.cat([self.times(times.view(-1, 1, 1)), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.read(x)[:, -ids.shape[1] :]


def joined(join: Join) -> Joined:
    model = m.model(cls=type("Joined", (Joined,), {"join": join}), layers=1)
    model.queries, model.times = nn.Parameter(torch.randn(1, QUERIES, m.HIDDEN)), nn.Linear(1, m.HIDDEN)
    return model.double()


def forward(model: Joined, ids: Tensor, patches: Tensor, labels: Tensor, times: Tensor | None = None) -> Tensor:
    return m.cross_entropy(model.stream(ids, patches, times), labels)


def facts(join: Join, timed: bool = False) -> tg.TaskFacts:
    inputs = m.batch() | ({"times": torch.rand(2, dtype=torch.float64)} if timed else {})
    spec = m.spec(joined(join), inputs, forward, visual=None, visual_inputs=("patches",), reads="all")
    return tg.analyze(tg.capture(spec))[TASK]


def look(rows: Tensor, image: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(rows, image, image)


def looked(rows: Tensor) -> Tensor:
    return rows + look(rows, rows)


RIGHT = {
    "image before text": (lambda s, image, text, queries: torch.cat([image, text], 1), IMAGE),
    "queries beside": (lambda s, image, text, queries: torch.cat([queries, image, text], 1), IMAGE),
    "queries that looked": (
        lambda s, image, text, queries: torch.cat([looked(torch.cat([queries, image], 1)), text], 1),
        QUERIES + IMAGE,
    ),
    "learned rows of which some are the image's": (
        lambda s, image, text, queries: torch.cat(
            [queries.masked_scatter((torch.arange(QUERIES) > 0).view(1, -1, 1), image[:, : QUERIES - 1]), text], 1
        ),
        QUERIES - 1,
    ),
    "a resampler": (lambda s, image, text, queries: torch.cat([look(queries, image), text], 1), QUERIES),
    "queries before a projection": (
        lambda s, image, text, queries: torch.cat([s.norm(torch.cat([queries, image], 1)), text], 1),
        IMAGE,
    ),
}


@pytest.mark.parametrize(
    "how", [h if h == "queries that looked" else pytest.param(h, marks=pytest.mark.slow) for h in RIGHT]
)
def test_image_rows(how: str) -> None:
    join, count = RIGHT[how]
    assert facts(join).visual.count == count


WRONG = {
    "text that looked": (
        lambda s, image, text, queries: torch.cat([image, text + look(text, image)], 1),
        "another input",
    ),
    "text with the mean": (
        lambda s, image, text, queries: torch.cat([image, text + image.mean(1, keepdim=True)], 1),
        "another input",
    ),
    "image and text turned round": (
        lambda s, image, text, queries: torch.cat([torch.cat([text[:, :2], image], 1).flip(1), text], 1),
        "another input",
    ),
    "image and queries turned round": (
        lambda s, image, text, queries: torch.cat([torch.cat([queries, image], 1).flip(1), text], 1),
        "never look at the image",
    ),
    "text joined before": (
        lambda s, image, text, queries: torch.cat([looked(torch.cat([image, text[:, :2]], 1)), text], 1),
        "another input",
    ),
}


@pytest.mark.parametrize(
    "how", [h if h == "text joined before" else pytest.param(h, marks=pytest.mark.slow) for h in WRONG]
)
def test_other_rows_are_refused(how: str) -> None:
    join, why = WRONG[how]
    with pytest.raises(tg.AnalysisError, match=why) as caught:
        facts(join)
    assert caught.value.where is not None
    assert "visual=" in str(caught.value.help)


def scattered(model: Joined, image: Tensor, text: Tensor, queries: Tensor) -> Tensor:
    return text.masked_scatter((torch.arange(text.shape[1]) < IMAGE).view(1, -1, 1), image)


def chosen(model: Joined, image: Tensor, text: Tensor, queries: Tensor) -> Tensor:
    """``where`` the other way round: text where the mask is true."""
    padded = F.pad(image, (0, 0, 0, text.shape[1] - image.shape[1]))
    return torch.where(torch.arange(text.shape[1]).view(1, -1, 1) > IMAGE, text, padded)


@pytest.mark.slow
@pytest.mark.parametrize("join", [RIGHT["image before text"][0], scattered])
def test_an_embedded_time_step_before_text_and_image(join: Join) -> None:
    """What is joined with the time step is no image as a whole."""
    assert facts(join, timed=True).visual.count == IMAGE


@pytest.mark.slow
def test_text_is_chosen_by_a_mask_of_text() -> None:
    with pytest.raises(tg.AnalysisError, match="another input"):
        facts(chosen, timed=True)


# ------------------------------------------------------------------ rows that are joined to those with the image


class Later(m.Model):
    """More rows are joined to the tokens, among which the image's rows are already; the loss reads the tokens."""

    scatter: Callable[[Tensor, Tensor, Tensor], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    front: int

    def loss(
        self, ids: Tensor, patches: Tensor, labels: Tensor, span: range = range(0), dropped: Tensor | None = None
    ) -> Tensor:
        x = type(self).scatter(self.embed(ids), ids == m.IMAGE_ID, self.patch(patches))
        x = type(self).join(x, self.queries.expand(len(ids), -1, -1))
        front, tokens = self.front, ids.shape[1]
        hidden = None if dropped is None else F.pad(dropped, (front, x.shape[1] - front - tokens))
        for number, layer in enumerate(self.layers):
            here = hidden if number in span else None
            x = layer(x) if here is None else torch.where(here[..., None], x, layer(x, here))
        return m.cross_entropy(self.read(x)[:, front : front + tokens], labels)


def by_choice(text: Tensor, at: Tensor, image: Tensor) -> Tensor:
    places = (at.cumsum(1) - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, image.shape[-1])
    return torch.where(at.unsqueeze(-1), image.gather(1, places), text)


def into(text: Tensor, at: Tensor, image: Tensor) -> Tensor:
    return text.masked_scatter(at.unsqueeze(-1), image)


LATER = {
    "queries behind": (into, lambda x, q: torch.cat([x, q], 1), 0),
    "queries before, by choice": (by_choice, lambda x, q: torch.cat([q, x], 1), QUERIES),
    "queries around, and zeros": (into, lambda x, q: torch.cat([q, F.pad(x, (0, 0, 1, 2)), q], 1), QUERIES + 1),
    "queries behind what is behind": (into, lambda x, q: torch.cat([torch.cat([x, q], 1), q], 1), 0),
}


@pytest.mark.parametrize(
    "how", [h if h == "queries behind" else pytest.param(h, marks=pytest.mark.slow) for h in LATER]
)
def test_rows_that_are_joined_later_are_not_visual(how: str) -> None:
    """Text and queries were dropped, or all was refused."""
    scatter, join, front = LATER[how]
    model = m.model(layers=3, cls=type("Later", (Later,), {"scatter": scatter, "join": join, "front": front}))
    model.queries = nn.Parameter(torch.randn(1, QUERIES, m.HIDDEN))
    spec = m.spec(model.double(), m.batch(), Later.loss, visual=None, visual_inputs=("patches",), reads="text")
    found = tg.analyze(tg.capture(spec))
    assert found[TASK].visual.count == IMAGE
    accelerated = tg.apply(found, tg.Plan((tg.DropSite(TASK, 1, 3, 0.5),)))
    for inputs in (m.batch(), m.batch((5, 1), seed=3)):
        by_hand = model.loss(**inputs, span=range(1, 3), dropped=m.dropped(inputs["ids"]))
        assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-10

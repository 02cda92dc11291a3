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
    "a resampler": (lambda s, image, text, queries: torch.cat([look(queries, image), text], 1), QUERIES),
}


@pytest.mark.parametrize(
    "how", [h if h == "queries that looked" else pytest.param(h, marks=pytest.mark.slow) for h in RIGHT]
)
def test_image_rows(how: str) -> None:
    join, count = RIGHT[how]
    assert facts(join).visual.count == count


WRONG = {
    "queries before a projection": (
        lambda s, image, text, queries: torch.cat([s.norm(torch.cat([queries, image], 1)), text], 1),
        "learned queries",
    ),
    "text that looked": (
        lambda s, image, text, queries: torch.cat([image, text + look(text, image)], 1),
        "another input",
    ),
    "text with the mean": (
        lambda s, image, text, queries: torch.cat([image, text + image.mean(1, keepdim=True)], 1),
        "another input",
    ),
    "text joined before": (
        lambda s, image, text, queries: torch.cat([looked(torch.cat([image, text[:, :2]], 1)), text], 1),
        "another input",
    ),
}


@pytest.mark.parametrize(
    "how", [h if "learned" in WRONG[h][1] else pytest.param(h, marks=pytest.mark.slow) for h in WRONG]
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


@pytest.mark.parametrize(
    "join", [RIGHT["image before text"][0], *(pytest.param(j, marks=pytest.mark.slow) for j in (scattered, chosen))]
)
def test_an_embedded_time_step_before_text_and_image(join: Join) -> None:
    """What is joined with the time step is text, too."""
    with pytest.raises(tg.AnalysisError, match="another input"):
        facts(join, timed=True)

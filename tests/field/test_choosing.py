"""Which tokens go: scores from a row that sees them, and as many as planned from batches of every length."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests.field import decoder as m
from tests.field.decoder import TASK, Model
from tokgraph import ops


class Masked(Model):
    def forward(self, ids: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
        x = self.enter(ids, patches)
        for layer in self.layers:
            q, k, v = (m.heads(y).transpose(1, 2) for y in layer.qkv(layer.norm1(x)).chunk(3, -1))
            if self.eager:
                scores = (q @ k.transpose(-1, -2)).masked_fill(~mask.unsqueeze(1), torch.finfo(q.dtype).min)
                rows = scores.softmax(-1) @ v
            else:
                rows = F.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1))
            x = x + layer.out(rows.transpose(1, 2).flatten(2))
            x = x + layer.feed(layer.norm2(x))
        return self.read(x)


def masked(eager: bool) -> Masked:
    model = m.model(cls=Masked)
    model.eager = eager
    return model


def masked_loss(model: Model, ids: Tensor, patches: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return m.cross_entropy(model(ids, patches, mask), labels)


def seeing(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "mask": m.causal(inputs["ids"].shape[1]).expand(len(inputs["ids"]), -1, -1).clone()}


def unseen(how: str) -> dict[str, Tensor]:
    """Batches in which the row that predicts the first label sees not every image row."""
    inputs = seeing(m.batch())
    if how == "labels before the image":
        inputs["labels"] = inputs["ids"].masked_fill(inputs["ids"] == m.IMAGE_ID, m.IGNORED)
    elif how == "another document":
        inputs["mask"][:, 5:, :4] = False  # begins within the image
    elif how == "window":
        inputs["mask"] &= torch.ones(12, 12, dtype=torch.bool).triu(-2)
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_scoring_row_sees_what_it_ranks(eager: bool) -> None:
    accelerated = tg.optimize(m.spec(masked(eager), seeing(m.batch()), masked_loss), "fastv", k=1)
    accelerated[TASK](**seeing(m.batch((4, 1), seed=3)))
    for how in ("labels before the image", "another document", "window"):
        with pytest.raises(tg.BatchError, match="does not see all visual tokens"):
            accelerated[TASK](**unseen(how))
    with pytest.raises(tg.BatchError, match="does not see all visual tokens"):
        tg.optimize(m.spec(masked(eager), unseen("another document"), masked_loss), "pyramiddrop", stages=2)


def several(counts: tuple[int, ...], tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Samples with different numbers of visual tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, m.VOCABULARY, (len(counts), tokens), generator=generator)
    for row, count in zip(ids, counts, strict=True):
        row[tokens - 2 - count : tokens - 2] = m.IMAGE_ID
    labels = ids.clone()
    labels[:, : tokens - 2] = m.IGNORED
    patches = torch.randn(sum(counts), m.FEATURES, generator=generator, dtype=torch.float64)
    return {"ids": ids, "patches": patches, "labels": labels}


SELECTORS = ("uniform", "random", "norm", "similarity", "attention")


@pytest.mark.slow
@pytest.mark.parametrize(("selector", "ragged"), list(zip(SELECTORS, cycle(("min", "pad")), strict=False)))
def test_a_batch_shorter_than_the_most_visual_tokens(selector: str, ragged: str) -> None:
    """The example has up to 12 visual tokens in a sample; all later samples of 10 lose what is planned."""
    model = m.model(layers=3)
    spec = m.spec(model, several((4, 12), 16), dynamic={**m.DYNAMIC, "patches": {0: "features"}})
    site = tg.DropSite(TASK, 1, 2, 0.5, selector, ragged=ragged)  # type: ignore[arg-type]
    accelerated = tg.optimize(spec, tg.Plan((site,)))
    for tokens in (10, 11, 12, 13, 20):
        widths = []

        class Widths(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node):
                found = super().run_node(n)
                if n.target is torch.ops.tokgraph.keep_rows.default:
                    widths.append(tokens - found.shape[1])  # noqa: B023
                return found

        graph = accelerated.program[TASK]
        inputs = several((8, 6), tokens, seed=tokens)
        Widths(graph.graph_module).run(*graph.flatten(inputs))
        assert widths == [2]
        if (selector, ragged) == ("uniform", "min"):
            hidden = torch.zeros_like(inputs["ids"], dtype=torch.bool)
            for row, ids in zip(hidden, inputs["ids"], strict=True):
                (at,) = (ids == m.IMAGE_ID).nonzero(as_tuple=True)
                stay = {j * len(at) // (len(at) - 2) for j in range(len(at) - 2)}
                row[[int(i) for j, i in enumerate(at) if j not in stay]] = True
            by_hand = m.loss(model, **inputs, span=range(1, 2), hidden=hidden)
            assert m.worst(accelerated[TASK](**inputs), by_hand, model) < 1e-8


def test_rows_of_a_short_batch() -> None:
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    assert ops.ragged_rows(mask, 6, 1).tolist() == [[0, 1, 2, 3]] * 2
    assert ops.ragged_rows(mask, 3, 1).tolist() == [[0, 1, 3], [1, 2, 3]]


def test_what_no_head_sees_is_refused() -> None:
    weights = torch.tensor([[[[0.0, 1.0, 0.0]], [[0.5, 0.5, 0.0]]]])
    visual = torch.tensor([[True, True, False]])
    assert ops.prompt_mass(weights, visual).tolist() == [[0.25, 0.75, 0.0]]
    with pytest.raises(tg.BatchError):
        ops.prompt_mass(weights, torch.tensor([[True, True, True]]))

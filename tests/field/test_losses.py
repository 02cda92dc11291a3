"""What people compute their loss from, and what it reads: wrong reads=, shared views, several codes, values beside the stream."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import assert_close, assert_same_gradients, gradients
from tests.tiny import IMAGE_ID, VOCABULARY, Unified

IGNORED = -100
GONE = tg.DropSite("understanding", 1, 2, keep=0.25, restore=False)
Forward = Callable[..., Any]


def embedded(model: Unified, ids: Tensor, patches: Tensor) -> Tensor:
    return model.embed(ids).masked_scatter((ids == IMAGE_ID).unsqueeze(-1), model.patches(patches).flatten(0, 1))


def scores(model: Unified, ids: Tensor, patches: Tensor) -> Tensor:
    return model.head(model.backbone(embedded(model, ids, patches)))


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def flat(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return z.reshape(-1, VOCABULARY), shifted(labels).reshape(-1)


# ------------------------------------------------------------------ losses that leave out rows without a label


def log_likelihood(model, ids, patches, labels):
    logs, labels = scores(model, ids, patches).log_softmax(-1), shifted(labels)
    counts = labels != IGNORED
    return -(logs.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * counts).sum() / counts.sum()


def chosen_by_where(model, ids, patches, labels):
    logs, labels = scores(model, ids, patches).log_softmax(-1), shifted(labels)
    picked = logs.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return -torch.where(labels != IGNORED, picked, 0.0).sum() / 5


def filled(model, ids, patches, labels):
    logs, labels = scores(model, ids, patches).log_softmax(-1), shifted(labels)
    picked = logs.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return -picked.masked_fill(labels == IGNORED, 0.0).mean()


def every_row(model, ids, patches, labels):
    labels = shifted(labels)
    rows = F.cross_entropy(scores(model, ids, patches).transpose(1, 2), labels, reduction="none")
    return rows.sum() / (labels != IGNORED).sum()


def every_sample(model, ids, patches, labels):
    z = scores(model, ids, patches)
    rows = F.cross_entropy(
        z[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), reduction="none", label_smoothing=0.1
    )
    return rows.view(z.shape[0], -1).sum(1).mean()


def likelihood_loss(model, ids, patches, labels):
    z, labels = flat(scores(model, ids, patches), labels)
    return F.nll_loss(z.log_softmax(-1), labels)


def sliced(model, ids, patches, labels):
    z = scores(model, ids, patches)
    return F.cross_entropy(z[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def in_parts(model, ids, patches, labels):
    z, labels = scores(model, ids, patches), shifted(labels)
    return sum(F.cross_entropy(z[:, at].mT, labels[:, at], reduction="sum") for at in (slice(0, 4), slice(4, None)))


def masked_entropy(model, ids, patches, labels):
    z, labels = flat(scores(model, ids, patches), labels)
    logs = z.log_softmax(-1)
    weight = (labels != IGNORED).to(z)
    return F.cross_entropy(z, labels) - 0.1 * ((logs.exp() * logs).sum(-1) * weight).sum() / weight.sum()


def soft_labels(model, ids, patches, labels):
    z, labels = scores(model, ids, patches), shifted(labels)
    counts, soft = labels != IGNORED, F.one_hot(labels.clamp_min(0), VOCABULARY).to(z) * 0.9 + 0.1 / VOCABULARY
    weight = torch.linspace(0.5, 2.0, VOCABULARY, dtype=z.dtype)
    rows = F.cross_entropy(z.mT, soft.mT, weight=weight, reduction="none", label_smoothing=0.2)
    return (rows * counts).sum() / counts.sum()


LABELLED = [
    soft_labels, log_likelihood, chosen_by_where, filled, every_row, every_sample, likelihood_loss, sliced, in_parts, masked_entropy,
]  # fmt: skip


# ------------------------------------------------------------------ losses that read every row


def pooled(model, ids, patches, labels):
    return scores(model, ids, patches).mean(1).pow(2).mean() + 0 * labels.sum()


def z_loss(model, ids, patches, labels):
    z, labels = flat(scores(model, ids, patches), labels)
    return F.cross_entropy(z, labels) + 0.1 * z.logsumexp(-1).pow(2).mean()


def entropy(model, ids, patches, labels):
    z, labels = flat(scores(model, ids, patches), labels)
    logs = z.log_softmax(-1)
    return F.cross_entropy(z, labels) - 0.1 * (logs.exp() * logs).sum(-1).mean()


def soft_labels(model, ids, patches, labels):
    wanted = F.one_hot(labels.clamp_min(0), VOCABULARY).to(model.head.weight)
    return F.cross_entropy(scores(model, ids, patches).flatten(0, 1), wanted.flatten(0, 1))


def aligned(model, ids, patches, labels):
    """The mean of the image's rows of the stream, which ``reads="text"`` rules out by a mask that is no label."""
    h = model.backbone(embedded(model, ids, patches))
    image = (ids == IMAGE_ID).unsqueeze(-1)
    align = ((h * image).sum(1) / image.sum(1) - h[:, -1]).pow(2).mean()
    return F.cross_entropy(*flat(model.head(h), labels)) + align


def flat_choices(model, ids, patches, labels):
    z, labels = flat(scores(model, ids, patches), labels)
    return {"loss": F.cross_entropy(z, labels), "choice": z.argmax(-1)}


READS_ALL = [pooled, z_loss, entropy, soft_labels, flat_choices]


# ------------------------------------------------------------------ tests


def task(forward: Forward, seed: int = 0, dynamic: bool = False, reads: str = "text", **more: Tensor) -> tg.ModelSpec:
    spec = tiny.build(layers=2, dtype="float64", dynamic=dynamic)
    inputs = {**batch(seed), **more}
    kinds = {"ids": {0: "batch", 1: "tokens"}, "labels": {0: "batch", 1: "tokens"}, "patches": {0: "batch"}}
    kinds = {name: {0: "batch", 1: "tokens"} for name in more} | kinds
    visual = tg.VisualTokens.ids(input="ids", equal=IMAGE_ID)
    made = tg.Task(forward, inputs, kinds if dynamic else None, visual, reads=reads)
    return tg.ModelSpec(spec.model, {"understanding": made})


def batch(seed: int = 0, labelled: bool = False) -> dict[str, Tensor]:
    """A batch; ``labelled``: image tokens have labels as well."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCABULARY, (2, 11), generator=draw)
    ids[0, 1:7] = ids[1, 2:8] = IMAGE_ID
    labels = torch.randint(10, VOCABULARY, (2, 11), generator=draw)
    labels = labels if labelled else labels.masked_fill(ids == IMAGE_ID, IGNORED)
    return {"ids": ids, "patches": torch.rand(2, 6, 4, generator=draw, dtype=torch.float64), "labels": labels}


def loss_of(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, dict) else result


def assert_as_eager(spec: tg.ModelSpec, accelerated: tg.Accelerated, given: dict[str, Tensor]) -> None:
    found = accelerated["understanding"](**given)
    wanted = spec.tasks["understanding"].forward(spec.model, **given)
    assert_close(loss_of(found), loss_of(wanted), "loss", 1e-12)
    assert_same_gradients(gradients(spec.model, loss_of(found)), gradients(spec.model, loss_of(wanted)), 1e-9)
    for key in found if isinstance(found, dict) else ():
        assert found[key].shape == wanted[key].shape
        assert torch.equal(found[key], wanted[key]) or found[key].is_floating_point()


QUICK = {log_likelihood, every_sample, sliced}
"""Losses that the default run looks at; the others take longer than they tell."""


def slow_but(quick: set[Forward], forwards: list[Forward]) -> list[Any]:
    return [f if f in quick else pytest.param(f, marks=pytest.mark.slow) for f in forwards]


@pytest.mark.parametrize("forward", slow_but(QUICK, LABELLED))
def test_a_label_on_an_image_row_that_may_be_gone_stops_the_batch(forward: Forward) -> None:
    """The labels are checked on each batch, whatever the loss is made of."""
    program = tg.capture(task(forward))
    for exact in (False, True):
        accelerated = tg.apply(program, tg.Plan((GONE,), exact=exact))
        accelerated["understanding"](**batch(1))
        with pytest.raises(tg.BatchError, match=r"reads= rules out"):
            accelerated["understanding"](**batch(1, labelled=True))


@pytest.mark.slow
@pytest.mark.parametrize(("forward", "exact"), list(zip(LABELLED[::2], cycle((False, True)), strict=False)))
def test_labels_are_checked_where_sizes_are_symbols(forward: Forward, exact: bool) -> None:
    spec = task(forward, dynamic=True)
    accelerated = tg.optimize(spec, tg.Plan((GONE,), exact=exact))
    accelerated["understanding"](**batch(1))
    with pytest.raises(tg.BatchError, match=r"reads= rules out"):
        accelerated["understanding"](**batch(1, labelled=True))
    assert_as_eager(spec, tg.optimize(spec, "exact"), batch(2))


def test_a_label_on_an_image_row_of_the_example_is_told_with_its_reader() -> None:
    spec = task(log_likelihood, labels=batch(0, labelled=True)["labels"])
    with pytest.raises(tg.BatchError, match=r"reads= rules out") as raised:
        tg.optimize(spec, tg.Plan((GONE,)))
    assert raised.value.where is not None
    assert raised.value.where.op == "aten.sum.default"
    assert "correct reads=" in str(raised.value)


@pytest.mark.parametrize("forward", slow_but({pooled, flat_choices}, READS_ALL))
def test_a_loss_that_reads_every_row_rules_out_that_rows_are_gone(forward: Forward) -> None:
    """It is refused before any batch runs; where no row is gone for good the values are those of eager."""
    spec = task(forward)
    program = tg.capture(spec)
    with pytest.raises(tg.IllegalRewriteError, match="without restore") as raised:
        tg.apply(program, tg.Plan((GONE,)))
    assert raised.value.where is not None
    assert_as_eager(spec, tg.apply(program, tg.Plan(exact=True)), batch(1))
    tg.apply(program, tg.Plan((tg.DropSite("understanding", 1, 2, keep=1.0, restore=False),)))  # nothing is dropped


def test_rows_that_a_mask_of_image_tokens_picks_are_gone() -> None:
    spec = task(aligned)
    program = tg.capture(spec)
    with pytest.raises(tg.BatchError, match=r"reads= rules out"):
        tg.apply(program, tg.Plan((GONE,)))["understanding"](**batch())
    assert_as_eager(spec, tg.apply(program, tg.Plan(exact=True)), batch(1))


def test_the_row_of_each_sample_that_is_looked_up_is_checked() -> None:
    def at(model, ids, patches, labels):
        z = scores(model, ids, patches)
        return F.cross_entropy(z[torch.arange(2), labels[:, 0]], labels[:, -1])

    inputs = batch()
    inputs["labels"][:, 0] = 10
    accelerated = tg.apply(tg.capture(task(at, labels=inputs["labels"])), tg.Plan((GONE,)))
    accelerated["understanding"](**inputs)
    inputs["labels"][1, 0] = 3  # an image row
    with pytest.raises(tg.BatchError, match=r"reads= rules out"):
        accelerated["understanding"](**inputs)


def test_what_leaves_the_task_beside_the_loss_is_looked_at_as_well() -> None:
    def right(model, ids, patches, labels):
        z, labels = scores(model, ids, patches), shifted(labels)
        hits = z.argmax(-1) == labels
        return {"loss": F.cross_entropy(z.mT, labels), "hits": hits.sum(), "read": (hits & (labels != IGNORED)).sum()}

    def wrong(model, ids, patches, labels):
        z, labels = scores(model, ids, patches), shifted(labels)
        return {"loss": F.cross_entropy(z.mT, labels), "largest": z.amax()}

    tg.apply(tg.capture(task(right)), tg.Plan((GONE,)))["understanding"](**batch(1))
    with pytest.raises(tg.IllegalRewriteError, match=r"aten\.amax\.default reads rows"):
        tg.apply(tg.capture(task(wrong)), tg.Plan((GONE,)))


def test_others_that_read_the_view_of_a_loss_read_all_of_it() -> None:
    """A second cross entropy, a count of labels and the choices, over one flat view of logits and of labels."""

    def forward(model, ids, patches, labels):
        z, labels = flat(scores(model, ids, patches), labels)
        second = F.cross_entropy(z, labels.masked_fill(labels < 12, IGNORED), reduction="sum")
        return {"loss": F.cross_entropy(z, labels) + second, "choice": z.argmax(-1), "out": (labels == IGNORED).sum()}

    spec = task(forward)
    assert_as_eager(spec, tg.apply(tg.capture(spec), tg.Plan(exact=True)), batch(1))


@pytest.mark.parametrize("width", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_several_codes_a_row_are_read_whole(width: int) -> None:
    def forward(model, ids, patches, labels, codes):
        z = scores(model, ids, patches).reshape(-1, VOCABULARY // 2)
        return F.cross_entropy(z, codes.reshape(-1)) + 0 * labels.sum()

    codes = torch.randint(0, VOCABULARY // 2, (2, 11, 2) if width == 2 else (2, 22))
    spec = task(forward, codes=codes)
    assert_as_eager(spec, tg.apply(tg.capture(spec), tg.Plan(exact=True)), {**batch(1), "codes": codes.flip(0)})


def distilled(model, ids, patches, labels, beside):
    z, labels = flat(scores(model, ids, patches), labels)
    rows = F.kl_div(z.log_softmax(-1), beside.flatten(0, 1).softmax(-1), reduction="none").sum(-1)
    counts = (labels != IGNORED).to(z)
    return F.cross_entropy(z, labels) + (rows * counts).sum() / counts.sum()


def weighted(model, ids, patches, labels, beside):
    z, labels = flat(scores(model, ids, patches), labels)
    return (F.cross_entropy(z, labels, reduction="none") * beside[..., 0].abs().flatten()).sum() / beside.abs().sum()


def regressed(model, ids, patches, labels, beside):
    z = scores(model, ids, patches)
    return F.cross_entropy(*flat(z, labels)) + (z - beside).pow(2).mean()


def modulated(model, ids, patches, labels, beside):
    """Every block reads a float input, as one of diffusion does its time step."""
    x = embedded(model, ids, patches)
    for layer in model.layers:
        x = x + layer(x * (1 + beside[..., :16].mean(1, keepdim=True)))
    return F.cross_entropy(*flat(model.head(model.norm(x)), labels))


def timed(model, ids, patches, labels, beside):
    """Every block reads an embedding that is none of tokens."""
    x, time = embedded(model, ids, patches), model.codes(labels.clamp(0, 7)[:, :1])
    for layer in model.layers:
        x = x + layer(x * (1 + time))
    return F.cross_entropy(*flat(model.head(model.norm(x)), labels)) + 0 * beside.sum()


@pytest.mark.parametrize(
    "forward", slow_but({distilled, modulated}, [distilled, weighted, regressed, modulated, timed])
)
def test_float_inputs_beside_the_stream_are_ordinary(forward: Forward) -> None:
    draw = torch.Generator().manual_seed(0)
    beside = [torch.randn(2, 11, VOCABULARY, generator=draw, dtype=torch.float64) for _ in range(2)]
    spec = task(forward, beside=beside[0])
    program = tg.capture(spec)
    facts = tg.analyze(program)
    assert len(facts["understanding"].blocks) == 2
    accelerated = tg.apply(program, tg.Plan(exact=True), facts=facts)
    assert_as_eager(spec, accelerated, {**batch(1), "beside": beside[1]})


def test_what_a_graph_makes_of_numbers_has_the_type_of_the_rest() -> None:
    """Class weights made in the forward, verified in float64."""

    def forward(model, ids, patches, labels):
        return F.cross_entropy(*flat(scores(model, ids, patches), labels), weight=torch.linspace(0.1, 2, VOCABULARY))

    spec = task(forward, patches=batch()["patches"].float())
    spec.model.float()
    assert tg.optimize(spec, "exact").verification.passed


def test_an_example_without_labels_is_refused_as_such() -> None:
    def forward(model, ids, patches, labels):
        return F.cross_entropy(*flat(scores(model, ids, patches), labels))

    with pytest.raises(tg.TokgraphError, match="loss of the example batch is nan") as raised:
        tg.optimize(task(forward, labels=torch.full((2, 11), IGNORED)), "exact")
    assert "report" not in str(raised.value)


@pytest.mark.slow
def test_label_smoothing_reaches_onnx(tmp_path) -> None:
    def forward(model, ids, patches, labels):
        z, labels = flat(scores(model, ids, patches), labels)
        weight = torch.linspace(0.1, 2, VOCABULARY)
        return F.cross_entropy(z, labels, weight=weight, label_smoothing=0.1)

    spec = task(forward, dynamic=True, patches=batch()["patches"].float())
    spec.model.float()
    tg.optimize(spec, tg.Plan((GONE,))).export_onnx(tmp_path, ("forward", "train-step"))

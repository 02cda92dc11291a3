"""Segments: every position in exactly one, from the visual tokens and the labels, or as the user declares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import Captured
from tests.measurement.models import Decoder, batch, captured, causal, declaring, shifted_loss, spec
from tokgraph.errors import AnalysisError, BatchError, SpecError
from tokgraph.measurement import find_segments

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

LETTERS = {"system": "s", "image": "i", "instruction": "n", "output": "o", "other": "."}


def letters(segments: dict[str, Tensor]) -> list[str]:
    """A string a sample, a letter a token; fails where a position is in none or in two segments."""
    assert torch.stack(list(segments.values())).sum(0).eq(1).all()
    batch, tokens = next(iter(segments.values())).shape
    return [
        "".join(LETTERS.get(name, name[0]) for t in range(tokens) for name in segments if segments[name][b, t])
        for b in range(batch)
    ]


def of(found: Captured, task: str, batch: dict[str, Any] | None = None) -> list[str]:
    return letters(find_segments(found.program[task], found.facts[task], batch))


def test_digits(digits_example: Captured) -> None:
    assert of(digits_example, "understanding") == ["ss" + 16 * "i" + "nnn" + "oooo"] * 4
    assert of(digits_example, "generation") == ["nnnn" + 16 * "i"] * 4


def test_janus(janus_example: Captured) -> None:
    """Every second row of the example is padded on the right."""
    assert of(janus_example, "understanding") == [
        "ss" + 16 * "i" + "nnnnnn" + "oooo",
        "sss" + 16 * "i" + "nnn" + "oooo" + "..",
    ]
    assert of(janus_example, "generation") == [12 * "n" + 16 * "i"] * 2


@pytest.mark.slow
def test_another_batch_than_the_example(dynamic_janus: Captured) -> None:
    """Visual tokens that are a range of positions move with the sizes of the batch."""
    ids, codes = torch.randint(1, 200, (5, 7)), torch.randint(0, 64, (5, 16))
    assert of(dynamic_janus, "generation", {"image_codes": codes, "input_ids": ids}) == [7 * "n" + 16 * "i"] * 5
    given = dynamic_janus.spec.tasks["understanding"].inputs
    one = {key: value[1:] for key, value in given.items()}
    assert of(dynamic_janus, "understanding", one) == of(dynamic_janus, "understanding")[1:]


def test_labelled_text_before_the_image_is_output() -> None:
    """A loss on all text, as in pretraining: nothing is left for system or instruction but the first token, unpredicted."""
    model = tiny.build(layers=1)
    task = model.tasks["understanding"]
    labels = task.inputs["ids"].masked_fill(task.inputs["ids"] == tiny.IMAGE_ID, -100)
    task = replace(task, inputs={**task.inputs, "labels": labels})
    found = Captured.of(tg.ModelSpec(model.model, {"t": task}))
    assert of(found, "t") == ["siiiiiioooo", "soiiiiiiooo"]


# ------------------------------------------------------------------ where the labels are


def shifted_logits(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model.head(model.hidden(ids))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def classes_second(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(model.hidden(ids)[:, :-1]).transpose(1, 2), labels[:, 1:])


def from_the_sixth_row(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(model.hidden(ids)[:, 5:-1]).flatten(0, 1), labels[:, 6:].flatten())


def counted_from_the_end(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(model.hidden(ids)[:, -7:-1]).flatten(0, 1), labels[:, -6:].flatten())


def counted_by_a_size(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    half = ids.shape[1] // 2
    return F.cross_entropy(model.head(model.hidden(ids)[:, half - 1 : -1]).flatten(0, 1), labels[:, half:].flatten())


def other_ignored_label(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    targets = F.pad(labels.masked_fill(labels == -100, 0), (0, 1), value=0)[:, 1:]
    return F.cross_entropy(model.head(model.hidden(ids)).flatten(0, 1), targets.flatten(), ignore_index=0)


def by_hand(model: Decoder, ids: Tensor, labels: Tensor) -> Tensor:
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    log = model.head(model.hidden(ids)).log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return -(log * (targets != -100)).sum() / (targets != -100).sum()


@pytest.mark.parametrize(
    "forward",
    [
        shifted_loss,
        pytest.param(shifted_logits, marks=pytest.mark.slow),
        pytest.param(classes_second, marks=pytest.mark.slow),
        from_the_sixth_row,
        pytest.param(counted_from_the_end, marks=pytest.mark.slow),
        pytest.param(counted_by_a_size, marks=pytest.mark.slow),
        pytest.param(other_ignored_label, marks=pytest.mark.slow),
    ],
)
def test_ways_to_write_a_loss(forward: Callable[..., Tensor]) -> None:
    found = captured(causal, forward)
    assert of(found, "t") == ["siiiiinnnooo", "ssiiiiiooo.."]
    assert of(found, "t", batch(3, tokens=14))[::2] == ["siiiiinnnnnooo"] * 2


def test_a_loss_that_is_not_understood_leaves_the_answer_in_the_instruction() -> None:
    assert of(captured(causal, by_hand), "t") == ["siiiiinnnnnn", "ssiiiiinnnnn"]


# ------------------------------------------------------------------ declared segments


def halves(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, : ids.shape[1] // 2] = True
    return {"first": first, "last": ~first}


def first_half(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"first": halves(ids, labels)["first"]}


def with_other(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    image, other = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    image[:, 2:4] = True
    other[:, :1] = True
    return {"other": other, "image": image}


@pytest.mark.parametrize(
    ("segments", "expected"),
    [(halves, "ffffffllllll"), (first_half, "ffffff......"), (with_other, "..ii........")],
)
def test_declared_segments_win_and_the_rest_is_other(segments: Callable[..., Any], expected: str) -> None:
    found = captured()
    assert letters(find_segments(declaring(found, segments), found.facts["t"])) == [expected] * 2


def test_declared_segments_of_another_batch() -> None:
    found = captured()
    segments = find_segments(declaring(found, halves), found.facts["t"], batch(3, tokens=14))
    assert letters(segments) == ["fffffff" + 7 * "l"] * 3


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (lambda ids, labels: {"a": ids == ids, "b": ids == 9}, "'a' and 'b' overlap .sample 0, position 1"),
        (lambda ids, labels: {"a": ids}, "segment 'a' is torch.int64"),
        (lambda ids, labels: {"a": ids[:, 1:] == 9}, r"torch.bool \(2, 11\), not torch.bool \(2, 12\)"),
        (lambda ids, labels: {"a": 1}, "segment 'a' is int"),
        (lambda ids, labels: [ids == 9], "segments must return a mapping, got list"),
    ],
)
def test_declared_segments_that_are_none(segments: Callable[..., Any], message: str) -> None:
    found = captured()
    with pytest.raises(SpecError, match=message):
        find_segments(declaring(found, segments), found.facts["t"])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (3, "segments must be callable"),
        (lambda ids: {}, "the example inputs do not fit its segments"),
    ],
)
def test_segments_that_cannot_be_called(segments: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec(causal, segments=segments)


# ------------------------------------------------------------------ batches that do not fit


def test_batches_that_do_not_fit(digits_example: Captured) -> None:
    given = digits_example.spec.tasks["generation"].inputs
    with pytest.raises(BatchError, match="takes the inputs"):
        of(digits_example, "generation", {"labels": given["labels"]})
    with pytest.raises(BatchError, match=r"input 'labels' is \(3, 20\), and the captured graph takes \(4, 20\)"):
        of(digits_example, "generation", {**given, "labels": given["labels"][:3]})
    with pytest.raises(BatchError, match=r"input 'labels' is \(4,\)"):
        of(digits_example, "generation", {**given, "labels": given["labels"][:, 0]})


def test_a_static_capture_takes_its_own_sizes_only() -> None:
    found = captured(causal, dynamic=False)
    with pytest.raises(BatchError, match=r"input 'ids' is \(3, 12\), and the captured graph takes \(2, 12\)"):
        of(found, "t", batch(3))


def test_a_model_without_storage() -> None:
    given = spec(causal)
    found = Captured.of(tg.ModelSpec(given.model.to("meta"), given.tasks))
    with pytest.raises(AnalysisError, match="on the meta device"):
        of(found, "t")

"""The cost of a task at other sizes than it was captured with, by block, region, module and kind of token."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import sympy
import torch

import tokgraph as tg
from examples import digits, janus
from tests import tiny
from tests.harness import Captured
from tokgraph.ir.cost import TaskCost, Work
from tokgraph.ir.sizes import Sizes

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

AMOUNTS = [f.name for f in fields(Work)]


@pytest.fixture(scope="module")
def tiny_example() -> Captured:
    return Captured.of(tiny.build(dynamic=True))


def recaptured(example: Captured, task: str, inputs: dict[str, Any]) -> TaskCost:
    """The cost of a task captured again, with another example batch and every size fixed."""
    fixed = replace(example.spec.tasks[task], inputs=inputs, dynamic=None)
    return tg.analyze(tg.capture(tg.ModelSpec(example.model, {task: fixed})))[task].cost.at()


def assert_same(found: TaskCost, expected: TaskCost) -> None:
    assert found.total() == expected.total()
    assert found.by_region() == expected.by_region()
    assert found.by_kind() == expected.by_kind()
    assert found.by_module() == expected.by_module()


def cost_of(example: Captured, task: str) -> TaskCost:
    return example.facts[task].cost


# ------------------------------------------------------------------ other sizes, against a capture at those sizes


def digits_understanding(batch: int, more: int) -> dict[str, Any]:
    """A batch with some words more behind the answer."""
    images, numbers = (part[:batch] for part in digits.load())
    inputs = digits.understanding_batch(images, numbers)
    tail = torch.full((batch, more), digits.IGNORE)
    return inputs | {
        "input_ids": torch.cat([inputs["input_ids"], tail.clamp(min=1)], 1),
        "visual_mask": torch.cat([inputs["visual_mask"], tail > 0], 1),
        "labels": torch.cat([inputs["labels"], tail], 1),
    }


def digits_generation(batch: int) -> dict[str, Any]:
    images, numbers = (part[:batch] for part in digits.load())
    return dict(digits.generation_batch(digits.quantise(images), numbers))


@pytest.mark.slow
def test_digits_at_another_batch_and_length(dynamic_digits: Captured) -> None:
    found = cost_of(dynamic_digits, "understanding").at(batch=7, tokens=25 + 4)
    assert_same(found, recaptured(dynamic_digits, "understanding", digits_understanding(7, 4)))
    assert found.total() != cost_of(dynamic_digits, "understanding").at().total()


@pytest.mark.slow
def test_digits_generation_at_another_batch(dynamic_digits: Captured) -> None:
    found = cost_of(dynamic_digits, "generation").at(batch=3)
    assert_same(found, recaptured(dynamic_digits, "generation", digits_generation(3)))


@pytest.mark.slow
def test_janus_understanding_at_another_batch_and_length(dynamic_janus: Captured) -> None:
    longer = replace(janus.SIZES["tiny"], text_tokens=17)
    inputs = janus.understanding_batch(longer, 5, torch.float64, seed=1, padded=True)
    found = cost_of(dynamic_janus, "understanding").at(batch=5, tokens=17 + 16)
    assert_same(found, recaptured(dynamic_janus, "understanding", inputs))


@pytest.mark.slow
def test_janus_generation_with_twice_the_image_codes(dynamic_janus: Captured) -> None:
    """32 codes: the head computes 32 rows, the first of them the last text row."""
    inputs = {"input_ids": torch.randint(1, 255, (3, 9)), "image_codes": torch.randint(0, 64, (3, 32))}
    found = cost_of(dynamic_janus, "generation").at(batch=3, visual=32, tokens=9 + 32)
    assert_same(found, recaptured(dynamic_janus, "generation", inputs))


def several_images(images: int, batch: int, text: int, dimension: str) -> tuple[tg.Task, dict[str, Any]]:
    """The tiny understanding task with some images a sample; the patches' first dimension has a name of its own."""
    ids = torch.randint(10, tiny.VOCABULARY, (batch, text + images * tiny.IMAGE))
    for i in range(images):
        ids[:, 1 + i * tiny.IMAGE : 1 + (i + 1) * tiny.IMAGE] = tiny.IMAGE_ID
    patches = torch.rand(images * batch, tiny.IMAGE, 4)
    inputs = {"ids": ids, "patches": patches, "labels": ids.masked_fill(ids == tiny.IMAGE_ID, -100)}
    sequence = {0: "batch", 1: "tokens"}
    dynamic = {"ids": sequence, "labels": sequence, "patches": {0: dimension}}
    visual = tg.VisualTokens.ids(input="ids", equal=tiny.IMAGE_ID)
    return tg.Task(tiny.understand, inputs, dynamic, visual, reads="text"), inputs


@pytest.mark.parametrize("dimension", [pytest.param("images", marks=pytest.mark.slow), "batch"])
@pytest.mark.slow
def test_two_images_a_sample(dimension: str) -> None:
    """Whether the images have an axis of their own or share the batch's, the encoder does twice the work."""
    task, _ = several_images(1, 2, 5, dimension)
    model = tiny.build().model
    one = Captured.of(tg.ModelSpec(model, {"understanding": task}))
    two = recaptured(one, "understanding", several_images(2, 3, 8, dimension)[1])
    cost = cost_of(one, "understanding")
    assert cost.sizes is not None
    assert cost.sizes.assumed == (
        ()  # the shapes show how many images there are
        if dimension == "images"
        else ("the encoder grows with the number of visual tokens: an image for every 6 visual tokens of a sample",)
    )
    assert_same(cost.at(batch=3, visual=12, tokens=20), two)
    if dimension == "images":
        assert_same(cost.at(batch=3, images=6, tokens=20), two)
        assert cost.at(images=4).total() == cost.at(visual=12).total()
    assert cost.at(visual=12).by_region()["encoder"].flops == 2 * cost.at().by_region()["encoder"].flops


@pytest.mark.slow
def test_text_keeps_its_length_when_visual_tokens_change(dynamic_janus: Captured) -> None:
    for task in dynamic_janus.facts:
        cost = cost_of(dynamic_janus, task)
        assert cost.at(visual=32).total() == cost.at(visual=32, tokens=12 + 32).total() != cost.at(visual=32, tokens=50)
        assert cost.at(tokens=40).total() == cost.at(tokens=40, visual=16).total()


@pytest.mark.slow
def test_no_sizes_are_those_of_the_example(dynamic_janus: Captured) -> None:
    cost = cost_of(dynamic_janus, "generation")
    assert cost.at().total() == cost.at(batch=2, tokens=28, visual=16).total()


# ------------------------------------------------------------------ what adds up


EXAMPLES = [
    pytest.param(model, task, marks=pytest.mark.slow if model == "dynamic_janus" else ())
    for model in ("dynamic_digits", "dynamic_janus")
    for task in ("understanding", "generation")
]


@pytest.mark.parametrize(("model", "task"), EXAMPLES)
def test_parts_sum_to_the_whole(model: str, task: str, request: pytest.FixtureRequest) -> None:
    """Also where shares round: 3 visual tokens of 28."""
    example = request.getfixturevalue(model)
    for cost in (cost_of(example, task).at(), cost_of(example, task).at(batch=3, visual=3, tokens=28)):
        whole = cost.total()
        for parts in (cost.by_region(), cost.by_kind(), cost.by_module()):
            assert Work.sum(parts.values()) == whole
            assert all(amount >= 0 for work in parts.values() for amount in work.amounts())
        assert cost.by_block() == tuple(work for name, work in cost.by_region().items() if name.startswith("block"))
        assert len(cost.by_block()) == len(example.facts[task].blocks)
        assert all(n.visual + n.text in (0, pytest.approx(1)) for n in cost.nodes)


def test_the_whole_is_symbolic_before_sizes_are_given(dynamic_digits: Captured) -> None:
    cost = cost_of(dynamic_digits, "understanding")
    assert cost.sizes is not None
    values = cost.sizes.values(batch=7)
    symbolic = cost.total()
    assert [int(getattr(symbolic, a).xreplace(values)) for a in AMOUNTS] == list(cost.at(batch=7).total().amounts())


@pytest.mark.parametrize(("model", "task", "visual", "tokens"), [
    ("dynamic_digits", "understanding", 16, 25), ("dynamic_digits", "generation", 16, 20),
    pytest.param("dynamic_janus", "understanding", 16, 28, marks=pytest.mark.slow),
    pytest.param("dynamic_janus", "generation", 16, 28, marks=pytest.mark.slow),
])  # fmt: skip
def test_visual_share_of_a_block(model: str, task: str, visual: int, tokens: int, request) -> None:
    """All FLOPs of a block are rows of the stream: their visual share is that of its tokens."""
    cost = cost_of(request.getfixturevalue(model), task).at()
    for number, work in enumerate(cost.by_block()):
        mine = [n for n in cost.nodes if n.block == number]
        found = sum(n.visual * n.work.flops for n in mine)
        assert found == pytest.approx(work.flops * visual / tokens)
        assert sum(n.text * n.work.flops for n in mine) == pytest.approx(work.flops * (1 - visual / tokens))


@pytest.mark.slow
@pytest.mark.parametrize(("visual", "share"), [(16, 15 / 16), (32, 31 / 32)])
def test_visual_share_of_a_head_that_reads_a_slice(dynamic_janus: Captured, visual: int, share: float) -> None:
    """The head reads the rows before the image tokens: the last text row, and all image rows but the last."""
    cost = cost_of(dynamic_janus, "generation").at(visual=visual)
    head = [n for n in cost.nodes if n.region == "head" and n.work.flops]
    assert head
    assert [n.visual for n in head] == pytest.approx([share] * len(head))


@pytest.mark.parametrize(("task", "share"), [("understanding", 16 / 25), ("generation", 16 / 20)])
def test_visual_share_of_samples_and_rows_in_one_axis(dynamic_digits: Captured, task: str, share: float) -> None:
    """The loss sees ``[batch * tokens, classes]``."""
    for sizes in ({}, {"batch": 9}):
        found = [n for n in cost_of(dynamic_digits, task).at(**sizes).nodes if "cross_entropy" in n.op]
        assert [n.visual for n in found] == pytest.approx([share])


@pytest.mark.slow
def test_everything_in_the_encoder_is_visual(dynamic_janus: Captured) -> None:
    cost = cost_of(dynamic_janus, "understanding").at()
    encoder = [n for n in cost.nodes if n.region == "encoder"]
    assert cost.by_region()["encoder"].flops > 0
    assert all((n.visual, n.text) == (1, 0) for n in encoder)
    assert {n.module.split(".")[1] for n in encoder if n.work.flops} == {"vision_model", "aligner"}


@pytest.mark.slow
def test_modules_hold_what_lies_below_them(dynamic_janus: Captured) -> None:
    cost = cost_of(dynamic_janus, "generation").at()
    one = cost.by_module(depth=2)
    language = [work for path, work in cost.by_module().items() if path.startswith("model.language_model")]
    assert one["model.language_model"] == Work.sum(language)


# ------------------------------------------------------------------ what cannot be told


def test_unknown_sizes_are_refused(tiny_example: Captured) -> None:
    with pytest.raises(tg.AnalysisError, match="has no size 'pixels'") as refused:
        cost_of(tiny_example, "understanding").at(pixels=3)
    assert "batch, tokens, visual" in str(refused.value.help)


def test_fixed_sizes_are_refused(tiny_example: Captured) -> None:
    """The image codes' length was not asked to be dynamic."""
    cost = cost_of(tiny_example, "generation")
    with pytest.raises(tg.AnalysisError, match="fixes visual to 6, so its cost at 12"):
        cost.at(visual=12)
    assert cost.at(visual=6).total() == cost.at().total()


@pytest.mark.parametrize(("sizes", "message"), [
    ({"visual": 9, "tokens": 8}, "no sample has 9 visual tokens among 8"),
    ({"tokens": 5}, "no sample has 6 visual tokens among 5"),
    ({"batch": 0}, "batch cannot be 0"),
    ({"visual": -1}, "visual cannot be -1"),
])  # fmt: skip
def test_sizes_that_no_batch_has_are_refused(tiny_example: Captured, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(tg.AnalysisError, match=message):
        cost_of(tiny_example, "understanding").at(**sizes)


def test_generation_needs_room_for_its_image(tiny_example: Captured) -> None:
    with pytest.raises(tg.AnalysisError, match="fixes tokens to 11, so its cost at 5"):
        cost_of(tiny_example, "generation").at(tokens=5)


def test_numbers_have_no_other_sizes(tiny_example: Captured) -> None:
    with pytest.raises(tg.AnalysisError, match="numbers already"):
        cost_of(tiny_example, "generation").at().at(batch=3)


def test_numbers_are_plain(tiny_example: Captured) -> None:
    """Integers, which JSON takes as they are."""
    work = cost_of(tiny_example, "generation").at().total()
    assert all(type(amount) is int for amount in work.amounts())
    assert json.loads(json.dumps(work.amounts())) == list(work.amounts())


def test_work_adds_and_scales() -> None:
    one, two = Work(1, 2, 3, 4, 5, 6, 7), Work(10, 20, 30, 40, 50, 60, 70)
    assert one + two == Work(11, 22, 33, 44, 55, 66, 77)
    assert one.scaled(10) == two
    assert (one.flops, one.moved) == (3, 18)
    assert Work(0.4, 1.6).rounded() == Work(0, 2)


def test_sizes_that_cannot_be_solved_for_are_those_of_the_example() -> None:
    """An image's patches in halves rounded down: sympy has no way to say which grid gives a number of them."""
    a, b, c, d = sympy.symbols("u6 u7 u10 u11", integer=True)
    visual = (a // 2) * (b // 2) / 2 + (c // 2) * (d // 2) / 2
    names = {"batch": sympy.Integer(2), "tokens": sympy.Integer(9), "visual": visual}
    sizes = Sizes("u", names, dict.fromkeys((a, b, c, d), 4))
    assert sizes.values() == dict.fromkeys((a, b, c, d), 4)
    with pytest.raises(tg.AnalysisError, match="fixes visual to 4"):
        sizes.values(visual=6)

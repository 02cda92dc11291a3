"""The digits example on its own, before tokgraph touches it: its data, its model, and that it learns both tasks."""

import importlib.util
import math
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.export import Dim, export

TASKS = ("understanding", "generation")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch_of(digits: ModuleType, task: str, rows: int) -> dict[str, torch.Tensor]:
    images, shown = (part[:rows] for part in digits.load("held-out"))
    if task == "understanding":
        return digits.understanding_batch(images, shown)
    return digits.generation_batch(digits.quantise(images), shown)


def plain(spec) -> dict[str, partial]:
    return {name: partial(task.forward, spec.model) for name, task in spec.tasks.items()}


def test_patches_are_cut_in_reading_order_and_put_back(digits):
    image = torch.arange(64.0).view(1, 8, 8)
    patches = digits.patchify(image)
    assert patches[0, 0].tolist() == [0, 1, 8, 9]
    assert patches[0, 1].tolist() == [2, 3, 10, 11]
    assert patches[0, 4].tolist() == [16, 17, 24, 25]
    assert torch.equal(digits.unpatchify(patches), image)


def test_codes_stand_for_the_patches(digits):
    images, _ = digits.load("held-out")
    codes = digits.quantise(images)
    assert codes.shape == (360, 16)
    assert len(codes.unique()) > digits.CODES // 2
    error = (digits.unpatchify(digits.codebook()[codes]) - images).square().mean()
    assert error < 0.05 * images.var()


def test_codebook_is_the_same_every_time(digits):
    first = digits.codebook()
    digits.codebook.cache_clear()
    assert torch.equal(digits.codebook(), first)


def test_understanding_batch_asks_about_an_image_and_labels_the_answer_only(digits):
    batch = digits.understanding_batch(torch.rand(2, 8, 8), torch.tensor([7, 4]))
    words = [
        " ".join(digits.WORDS[i] for i in row if digits.WORDS[i] != "<image>") for row in batch["input_ids"].tolist()
    ]
    assert words == [
        "<bos> look which digit ? seven odd large <end>",
        "<bos> look which digit ? four even small <end>",
    ]
    assert batch["visual_mask"].sum(1).tolist() == [16, 16]
    assert (batch["labels"][:, :-4] == digits.IGNORE).all()
    assert torch.equal(batch["labels"][:, -4:], batch["input_ids"][:, -4:])


def test_generation_batch_holds_words_and_codes_in_one_id_space(digits):
    codes = torch.arange(16).repeat(2, 1)
    batch = digits.generation_batch(codes, torch.tensor([7, 4]))
    assert [digits.WORDS[i] for i in batch["input_ids"][0, :4].tolist()] == ["<bos>", "draw", "seven", ":"]
    assert torch.equal(batch["input_ids"][:, 4:], codes + digits.CODE_OFFSET)
    assert (batch["labels"] >= digits.CODE_OFFSET).sum() == 32
    assert torch.equal(batch["labels"] == digits.IGNORE, batch["input_ids"] < digits.CODE_OFFSET)


@pytest.mark.parametrize("task", TASKS)
def test_no_token_sees_a_later_one(digits, task):
    spec = digits.build(layers=2, dtype="float64")
    batch = batch_of(digits, task, 2)
    before = spec.tasks[task].forward(spec.model, **batch)["logits"]
    batch["input_ids"][:, -1] = digits.WORDS.index("<end>") if task == "generation" else digits.CODE_OFFSET
    after = spec.tasks[task].forward(spec.model, **batch)["logits"]
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_the_image_reaches_the_answer(digits):
    spec = digits.build(layers=2)
    batch = batch_of(digits, "understanding", 2)
    before = spec.tasks["understanding"].forward(spec.model, **batch)["logits"]
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    after = spec.tasks["understanding"].forward(spec.model, **batch)["logits"]
    assert torch.equal(after[:, :2], before[:, :2])  # the words before the image
    assert (after[:, -5:] != before[:, -5:]).any()


def test_both_tasks_train_every_parameter_but_the_patch_encoder(digits):
    spec = digits.build(layers=2)
    for task, untouched in (("understanding", set()), ("generation", {"patch_encoder"})):
        spec.model.zero_grad()
        spec.tasks[task].forward(spec.model, **spec.tasks[task].inputs)["loss"].backward()
        without = {name.split(".")[0] for name, weight in spec.model.named_parameters() if weight.grad is None}
        assert without == untouched


def test_the_seed_fixes_the_weights_and_leaves_the_global_random_state_alone(digits):
    state = torch.get_rng_state()
    first, again, other = (digits.build(layers=1, seed=seed).model.head.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_odd_heads_are_refused(digits):
    with pytest.raises(ValueError, match="multiple"):
        digits.build(hidden=60, heads=4)


class Wrapped(nn.Module):
    def __init__(self, model, forward):
        super().__init__()
        self.model, self.call = model, forward

    def forward(self, inputs):
        return self.call(self.model, **inputs)


@pytest.mark.parametrize("task", TASKS)
def test_export_keeps_batch_and_tokens_symbolic(digits, task):
    spec = digits.build(layers=2)
    given = spec.tasks[task]
    dims = {name: Dim(name) for name in ("batch", "tokens")}
    shapes = {key: {axis: dims[name] for axis, name in given.dynamic[key].items()} for key in given.inputs}
    program = export(Wrapped(spec.model, given.forward), (given.inputs,), strict=False, dynamic_shapes=(shapes,))
    batch, tokens, words = next(n for n in program.graph.nodes if n.op == "output").args[0][1].meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert isinstance(tokens, torch.SymInt)
    assert words == digits.CODE_OFFSET + digits.CODES
    other = batch_of(digits, task, 3)
    torch.testing.assert_close(program.module()(other), given.forward(spec.model, **other))


@pytest.mark.slow
def test_both_tasks_learn(digits):
    spec = digits.build(layers=2)
    untrained = digits.evaluate(plain(spec))
    history = digits.train(plain(spec), spec.model.parameters(), steps=150)
    accuracy, generation = digits.evaluate(plain(spec))
    assert untrained[0] < 0.05
    assert untrained[1] > 0.95 * math.log(digits.CODES)
    assert accuracy > 0.4  # chance: 0.1
    assert generation < 0.7 * math.log(digits.CODES)
    assert len(history["understanding"]) == len(history["generation"]) == 150


def test_drawing_goes_patch_by_patch(digits):
    spec = digits.build(layers=1)
    drawn = digits.draw(plain(spec)["generation"], torch.tensor([0, 7]), seed=1)
    assert drawn.shape == (2, 8, 8)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn, digits.draw(plain(spec)["generation"], torch.tensor([0, 7]), seed=1))

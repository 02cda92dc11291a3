"""Measured gradients against eager autograd, against linear layers, and against pathway profiles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from math import isnan

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, assert_same_gradients, gradients
from tests.measurement.gradients import (
    EXACT,
    ODD,
    TASKS,
    Measure,
    Measured,
    add,
    disagreements,
    in_full,
    loss_of,
    visual_tokens,
)
from tokgraph.errors import AnalysisError, BatchError
from tokgraph.measurement.gradients import GradientNorms, GradientSplit, gradient_cosines, measure_gradients

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["digits", "tiny", pytest.param("janus", marks=pytest.mark.slow), *ODD])
def test_the_parts_add_up_to_the_gradient(measured: Measure, name: str, task: str) -> None:
    spec = measured(name).captured.spec
    whole = measured(name).splits[task].whole()
    assert whole.keys() <= dict(spec.model.named_parameters()).keys()
    assert_same_gradients(in_full(whole, spec.model), gradients(spec.model, loss_of(spec, task)), EXACT)


# ------------------------------------------------------------------ the parts are of rows: eager linear layers


def linear_parts(
    spec: tg.ModelSpec, task: str, rows_of: Callable[[str, Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Visual and text parts of the gradients of every linear layer, from what goes in and what comes back.

    Args:
        rows_of: name of the module and its input -> the visual rows, of the input's shape without the last axis.
    """
    seen: list[tuple[str, nn.Linear, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, m, args[0].detach(), out)))
        for name, module in spec.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    loss = loss_of(spec, task)
    for hook in hooks:
        hook.remove()
    found = torch.autograd.grad(loss, [out for *_, out in seen], allow_unused=True)
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for (name, module, x, _), back in zip(seen, found, strict=True):
        if back is None:
            continue
        visual = rows_of(name, x)
        for part, rows in zip(parts, (visual, ~visual), strict=True):
            add(part, f"{name}.weight", back[rows].T @ x[rows])
            if module.bias is not None:
                add(part, f"{name}.bias", back[rows].sum(0))
    return parts


IMAGE_ONLY = ("vision_model", "model.aligner", "model.generation_aligner", "patch_encoder", "patches", "codes")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["janus", "digits", "tiny", ODD[0]])
def test_the_parts_of_linear_layers(measured: Measure, name: str, task: str) -> None:
    """``dW = grad_out[rows].T @ x[rows]`` of the eager model, over the visual rows and over the others."""
    spec, split = measured(name).captured.spec, measured(name).splits[task]
    tokens = visual_tokens(spec, task)

    def rows_of(module: str, x: Tensor) -> Tensor:
        if any(part in module for part in IMAGE_ONLY):
            return torch.ones(x.shape[:-1], dtype=torch.bool)
        if x.shape[:2] == tokens.shape:
            return tokens
        image = tokens[0].sum()  # the heads of generation: one row before each image token
        assert x.shape[1] == image
        return tokens[:, -image - 1 : -1]

    visual, text = linear_parts(spec, task, rows_of)
    assert len(visual) >= 12
    assert_same_gradients({n: split.visual[n] for n in visual}, visual, EXACT)
    assert_same_gradients({n: split.text[n] for n in text}, text, EXACT)


# ------------------------------------------------------------------ the parts and the profile


def read_by_the_last_visual_row_only(captured: Captured, task: str) -> set[str]:
    facts = captured.facts[task]
    return {n for n, share in facts.profile.items() if 0 < share <= facts.demand.visual / facts.visual.count < 1}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["janus", "digits", "tiny", *ODD])
def test_gradients_are_visual_where_the_profile_says_so(measured: Measure, name: str, task: str) -> None:
    """Demand is a safe superset: it counts the last image row, which predicts the text after the image. Where the task
    ignores that text (a question, of which only the answer is learned) no gradient flows through the row.
    """
    found = measured(name)
    ignored = name in ("janus", "digits") and task == "understanding"
    expected = read_by_the_last_visual_row_only(found.captured, task) if ignored else set()
    assert bool(expected) == ignored
    assert disagreements(found.captured, task, found.splits[task]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chameleon", "llava"])
def test_gradients_of_the_zoo_are_visual_where_the_profile_says_so(name: str) -> None:
    """Chameleon's image tokenizer makes visual tokens, but its codes are integers: no gradient passes them."""
    pytest.importorskip("transformers")
    from tests.test_zoo import task_of
    from tests.zoo import ZOO

    zoo = ZOO[name]("sdpa")
    tasks = {task: task_of(given, dynamic=False) for task, given in zoo.tasks.items()}
    found = Measured.of(Captured.of(tg.ModelSpec(zoo.model, tasks)))
    for task, split in found.splits.items():
        quantised = {n for n in found.captured.facts[task].profile if n.startswith("model.vqmodel.")}
        assert bool(quantised) == (name == "chameleon" and task == "understanding")
        assert disagreements(found.captured, task, split) == quantised
        reference = gradients(zoo.model, loss_of(found.captured.spec, task))
        assert_same_gradients(in_full(split.whole(), zoo.model), reference, 1e-4)  # float32


# ------------------------------------------------------------------ batches and types


def batch_of(task: str, samples: int, text: int, seed: int) -> dict[str, Tensor]:
    """A batch of the tiny model, of any size."""
    random = torch.Generator().manual_seed(seed)
    if task == "generation":
        return {
            "codes": torch.randint(0, tiny.CODES, (samples, tiny.IMAGE), generator=random),
            "ids": torch.randint(10, tiny.VOCABULARY, (samples, text), generator=random),
        }
    ids = torch.randint(10, tiny.VOCABULARY, (samples, text + tiny.IMAGE), generator=random)
    ids[:, 2 : 2 + tiny.IMAGE] = tiny.IMAGE_ID
    patches = torch.rand(samples, tiny.IMAGE, 4, dtype=torch.float64, generator=random)
    return {"patches": patches, "ids": ids, "labels": ids.masked_fill(ids == tiny.IMAGE_ID, -100)}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_mean_over_batches_of_any_size(measured: Measure, task: str) -> None:
    captured = measured("tiny").captured
    program, facts, spec = captured.program, captured.facts, captured.spec
    batches = [batch_of(task, 2, tiny.TEXT, 0), batch_of(task, 3, 9, 1), batch_of(task, 1, 7, 2)]
    with torch.no_grad():  # gradients are measured wherever it is called
        each = [measure_gradients(program[task], facts[task], [batch]) for batch in batches]
        mean = measure_gradients(program[task], facts[task], iter(batches))
    for batch, split in zip(batches, each, strict=True):
        whole = in_full(split.whole(), spec.model)
        assert_same_gradients(whole, gradients(spec.model, loss_of(spec, task, batch)), EXACT)
    visual, text = (
        {n: sum(getattr(split, part)[n] for split in each) / 3 for n in mean.visual} for part in ("visual", "text")
    )
    assert_same_gradients(mean.visual, visual, EXACT)
    assert_same_gradients(mean.text, text, EXACT)
    assert not disagreements(captured, task, mean)


@pytest.mark.slow
def test_the_parts_of_another_batch(measured: Measure) -> None:
    """The visual rows are those of the batch, not those of the example."""
    captured = measured("tiny").captured
    batch = batch_of("understanding", 3, 9, 1)
    split = measure_gradients(captured.program["understanding"], captured.facts["understanding"], [batch])
    task = replace(captured.spec.tasks["understanding"], inputs=batch)
    tokens = batch["ids"] == tiny.IMAGE_ID

    def rows_of(module: str, x: Tensor) -> Tensor:
        return torch.ones(x.shape[:-1], dtype=torch.bool) if module == "patches" else tokens

    visual, text = linear_parts(tg.ModelSpec(captured.model, {"understanding": task}), "understanding", rows_of)
    assert_same_gradients({n: split.visual[n] for n in visual}, visual, EXACT)
    assert_same_gradients({n: split.text[n] for n in text}, text, EXACT)


@pytest.mark.slow
def test_the_type_to_compute_in() -> None:
    """The model's own by default; in float64, a float32 model has the gradients of its float64 copy."""
    spec = tiny.build(dynamic=False)
    captured = Captured.of(spec)
    graph, facts = captured.program["generation"], captured.facts["generation"]
    own, double = (measure_gradients(graph, facts, dtype=dtype) for dtype in (None, torch.float64))
    assert {g.dtype for g in own.visual.values()} == {torch.float32}
    assert {g.dtype for g in double.text.values()} == {torch.float64}
    exact = tg.ModelSpec(copy.deepcopy(spec.model).double(), spec.tasks)
    reference = gradients(exact.model, loss_of(exact, "generation"))
    assert_same_gradients(in_full(double.whole(), spec.model), in_full(reference, exact.model), EXACT)
    assert_same_gradients({n: g.double() for n, g in own.whole().items()}, double.whole(), 1e-4)
    assert all(p.grad is None for p in spec.model.parameters())


def test_bfloat16() -> None:
    captured = Captured.of(tiny.build(layers=1, dtype="bfloat16", dynamic=False))
    split = Measured.of(captured).splits["understanding"]
    assert {g.dtype for g in split.visual.values()} == {torch.bfloat16}
    assert not disagreements(captured, "understanding", split)


@pytest.mark.slow
def test_frozen_parameters_have_no_gradient() -> None:
    spec = tiny.build(layers=1, dynamic=False)
    spec.model.embed.weight.requires_grad_(False)
    spec.model.layers.requires_grad_(False)
    split = Measured.of(Captured.of(spec)).splits["understanding"]
    assert split.visual.keys() == split.text.keys()
    assert set(split.visual) == {f"{m}.{p}" for m in ("patches", "norm", "head") for p in ("weight", "bias")}
    spec.model.requires_grad_(False)
    assert not Measured.of(Captured.of(spec)).splits["understanding"].whole()


@pytest.mark.slow
def test_what_is_refused(measured: Measure) -> None:
    captured = measured("tiny").captured
    graph, facts = captured.program["generation"], captured.facts["generation"]
    with pytest.raises(BatchError, match="no batch to measure"):
        measure_gradients(graph, facts, [])
    with pytest.raises(BatchError):
        measure_gradients(graph, facts, [{"ids": graph.task.inputs["ids"]}])
    spec = tiny.build(dynamic=False)
    meta = Captured.of(tg.ModelSpec(copy.deepcopy(spec.model).to("meta"), spec.tasks))
    with pytest.raises(AnalysisError, match="meta device"):
        measure_gradients(meta.program["generation"], meta.facts["generation"])


# ------------------------------------------------------------------ norms and cosines


def test_norms_are_plain_numbers() -> None:
    split = GradientSplit({"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([1.0, 0.0])})
    assert split.norms() == {"a": GradientNorms(5.0, 1.0)}
    assert type(split.norms()["a"].visual) is float
    assert split.whole()["a"].tolist() == [4.0, 4.0]


def test_cosines_by_hand(measured: Measure) -> None:
    facts = measured("tiny").captured.facts
    a = GradientSplit(
        {"layers.0.p": torch.tensor([1.0, 0.0]), "layers.0.q": torch.tensor([2.0]), "layers.1.p": torch.tensor([1.0])},
        {"layers.0.p": torch.tensor([0.0, 1.0]), "layers.0.q": torch.tensor([0.0]), "layers.1.p": torch.tensor([0.0])},
    )
    b = GradientSplit(
        {"layers.0.p": torch.tensor([1.0, 1.0]), "layers.1.p": torch.tensor([-2.0])},
        {"layers.0.p": torch.tensor([0.0, 3.0]), "layers.1.p": torch.tensor([1.0])},
    )
    first, second, third = gradient_cosines({"understanding": a, "generation": b}, facts)
    assert (first.tasks, first.block, first.module) == (("understanding", "generation"), 0, "layers.0")
    assert first.visual == pytest.approx(1 / (5**0.5 * 2**0.5))  # q is no parameter of the second task
    assert first.text == pytest.approx(1.0)
    assert first.whole == pytest.approx(5 / (6**0.5 * 17**0.5))
    assert (second.visual, second.whole) == (pytest.approx(-1.0), pytest.approx(-1.0))
    assert isnan(second.text)
    assert third.module == "layers.2"
    assert all(map(isnan, (third.whole, third.visual, third.text)))


def test_cosines_of_a_model(measured: Measure) -> None:
    """One a block, as the concatenated gradients have it; tasks that are alike agree."""
    found = measured("tiny")
    blocks = gradient_cosines(found.splits, found.captured.facts)
    assert [b.block for b in blocks] == [0, 1, 2]
    for block in blocks:
        names = [n for n in found.splits["generation"].visual if n.startswith(f"{block.module}.")]
        assert len(names) == 12
        for part, cosine in (("visual", block.visual), ("text", block.text)):
            x, y = (torch.cat([getattr(s, part)[n].flatten() for n in names]) for s in found.splits.values())
            assert cosine == pytest.approx(float(F.cosine_similarity(x, y, dim=0)), abs=1e-12)
    facts = found.captured.facts["generation"]
    twins = gradient_cosines(dict.fromkeys(("a", "b"), found.splits["generation"]), {"a": facts, "b": facts})
    assert [b.whole for b in twins] == [pytest.approx(1.0)] * 3


def test_blocks_without_a_counterpart_are_left_out(measured: Measure) -> None:
    found = measured("tiny")
    generation = found.captured.facts["generation"]
    unknown = replace(
        generation, blocks=tuple(replace(b, module="" if b.index else b.module) for b in generation.blocks)
    )
    blocks = gradient_cosines(
        found.splits, {"understanding": found.captured.facts["understanding"], "generation": unknown}
    )
    assert [b.module for b in blocks] == ["layers.0"]

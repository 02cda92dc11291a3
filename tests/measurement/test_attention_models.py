"""Attention allocation of the examples: what eager transformers and the model itself attend to."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tokgraph as tg
from tests.conftest import unround_norms
from tests.harness import Captured
from tests.measurement.allocations import CLOSE, assert_sums_to_one, expected, of
from tests.passes.tools import TASKS
from tokgraph.measurement.pieces import regions

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it


@pytest.fixture(scope="module")
def eager_janus() -> Captured:
    """The example with transformers' eager attention, otherwise as ``janus_example``."""
    pytest.importorskip("transformers")
    from examples import janus

    spec = janus.build(attn="eager", dtype="float64")
    unround_norms(spec.model)
    return Captured.of(spec)


def attentions(found: Captured, task: str) -> list[Tensor]:
    """The weights of transformers' own eager model."""
    given = dict(found.spec.tasks[task].inputs)
    model: Any = found.model
    with torch.no_grad():
        if task == "understanding":
            del given["labels"]
            return list(model(**given, use_cache=False, output_attentions=True).attentions)
        text = model.get_input_embeddings()(given["input_ids"])
        image = model.model.generation_aligner(model.model.generation_embeddings(given["image_codes"]))
        embedded = torch.cat([text, image], 1)
        out = model.model.language_model(inputs_embeds=embedded, use_cache=False, output_attentions=True)
        return list(out.attentions)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_janus_allocates_as_transformers_says(eager_janus: Captured, task: str) -> None:
    allocation = of(eager_janus, task)
    reference = expected(eager_janus, task, attentions(eager_janus, task), allocation)
    torch.testing.assert_close(allocation.mass, reference, **CLOSE)
    assert_sums_to_one(allocation)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_janus_runs_in_pieces(eager_janus: Captured, task: str) -> None:
    facts = eager_janus.facts[task]
    softmaxes = {a.node for block in facts.blocks for a in block.attention}
    assert {region.softmax.name for region in regions(eager_janus.program[task], facts).values()} == softmaxes
    torch.testing.assert_close(
        of(eager_janus, task, max_bytes=40_000).mass, of(eager_janus, task).mass, rtol=0, atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_janus_fused_equals_eager(janus_example: Captured, eager_janus: Captured, task: str) -> None:
    fused, plain = of(janus_example, task), of(eager_janus, task)
    assert (fused.queries, fused.rows) == (plain.queries, plain.rows)
    torch.testing.assert_close(fused.mass, plain.mass, **CLOSE)


def test_digits(digits_example: Captured) -> None:
    """Causal attention: system text, first in the sequence, sees nothing but itself."""
    for task in TASKS:
        assert_sums_to_one(of(digits_example, task))
    allocation = of(digits_example, "understanding")
    torch.testing.assert_close(allocation.between("system", "system"), torch.ones(4).double(), **CLOSE)
    assert (allocation.between("instruction", "output") == 0).all()
    assert (allocation.between("output", "image") > 0).all()


@pytest.fixture(scope="module")
def trained() -> Captured:
    from examples import digits

    spec = digits.build(batch=8)
    found = Captured.of(spec)
    tasks = {name: partial(task.forward, spec.model) for name, task in spec.tasks.items()}
    digits.train(tasks, spec.model.parameters(), steps=150)
    return found


@pytest.mark.slow
def test_trained_digits(trained: Captured) -> None:
    """After training, both tasks look at the image in every block: the answer at what it reads, the image at what it draws."""
    from examples import digits

    images, shown = (part[:128] for part in digits.load("held-out"))
    batches: dict[str, dict[str, Tensor]] = {
        "understanding": digits.understanding_batch(images, shown),
        "generation": digits.generation_batch(digits.quantise(images), shown),
    }
    found = {task: of(trained, task, batches[task]) for task in TASKS}
    for allocation in found.values():
        assert_sums_to_one(allocation)
    assert found["understanding"].rows == (256, 2048, 384, 512)
    # sixteen of the 22 tokens that an answer token sees on average are visual
    assert (found["understanding"].between("output", "image") > 0.3).all()
    assert (found["generation"].between("image", "image") > 0.3).all()


def test_the_task_is_not_changed(digits_example: Captured) -> None:
    graph = digits_example.program["generation"]
    before: tg.Task = graph.task
    of(digits_example, "generation")
    assert graph.task is before
    assert all(p.grad is None for p in digits_example.model.parameters())

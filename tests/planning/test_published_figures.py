"""FLOPs ratios that the papers print, from rewritten graphs of a model as deep and with as many tokens as theirs."""

from __future__ import annotations

import pytest

import tokgraph as tg
from tests.harness import Captured
from tokgraph.passes.cost.pathways import pathways
from tokgraph.report.published_flops import FORMULAS, Rows, Shape, himix_rows, staged, thinned, whole

pytest.importorskip("transformers")
from tests import zoo
from tests.test_zoo import task_of

U = "understanding"
VISUAL, TEXT = 576, 36
LLAVA_13B = Shape(layers=40, hidden=5120, intermediate=13824, tokens=VISUAL + TEXT, visual=VISUAL)
LLAVA_7B = Shape(layers=32, hidden=4096, intermediate=11008, tokens=VISUAL + TEXT, visual=VISUAL)

pytestmark = pytest.mark.slow


def llava(layers: int) -> Captured:
    """LLaVA-1.5 with its depth and its 24 x 24 image tokens; narrow, since the formulas take the width from the paper."""
    tower = zoo._tower(14, image_size=336, num_hidden_layers=2, projection_dim=zoo.VISION)
    config = zoo.tf.LlavaConfig(
        text_config={
            "model_type": "llama",
            **zoo._llama(num_hidden_layers=layers, max_position_embeddings=VISUAL + TEXT),
        },
        vision_config={"model_type": "clip_vision_model", **tower},
        image_token_index=zoo.IMAGE_ID,
        image_seq_length=VISUAL,
    )
    ids = zoo._codes(VISUAL + TEXT)[:1] + 3
    ids[:, 5 : 5 + VISUAL] = zoo.IMAGE_ID
    task = zoo._understanding(ids, {"pixel_values": zoo._pixels(1, 3, 336, 336)}, None)
    model = zoo._build(zoo.tf.LlavaForConditionalGeneration, config, "sdpa")
    return Captured.of(tg.ModelSpec(model, {U: task_of(task)}))


@pytest.fixture(scope="module")
def deep() -> Captured:
    return llava(LLAVA_13B.layers)


@pytest.fixture(scope="module")
def shallow() -> Captured:
    return llava(LLAVA_7B.layers)


def entering(model: Captured, policy: str, **options: object) -> list[float]:
    """Image rows that enter each block of the rewritten graph."""
    plan = tg.make_plan(model.program, policy, facts=model.facts, exact=False, **options)
    left = pathways(model.apply(plan).program[U], model.facts[U]).tokens_per_block
    return [float(VISUAL), *left[:-1]]


def ratio(convention: str, shape: Shape, rows: Rows) -> float:
    """FLOPs relative to the whole model's."""
    count = FORMULAS[convention]
    thin, full = (
        count(shape, rows_per_layer=r.rows, keys_per_layer=r.keys, visual_per_layer=r.visual)
        for r in (rows, whole(shape))
    )
    return thin / full


FASTV = {
    (2, 0.90): 29.7, (2, 0.75): 50.2, (2, 0.50): 84.6,
    (3, 0.90): 33.0, (3, 0.75): 52.9, (3, 0.50): 86.4,
    (5, 0.90): 39.6, (5, 0.75): 58.4, (5, 0.50): 90.1,
}  # fmt: skip
WHOLE = 154.6


@pytest.mark.parametrize(("k", "drop"), FASTV)
def test_fastv(deep: Captured, k: int, drop: float) -> None:
    """Table 1 of 2403.06764; its 57.6 image tokens at 90% are 58 here."""
    found = ratio("fastv", LLAVA_13B, thinned(LLAVA_13B, entering(deep, "fastv", k=k, drop=drop)))
    assert found == pytest.approx(FASTV[k, drop] / WHOLE, abs=0.001)


def test_pyramiddrop(shallow: Captured) -> None:
    """2410.17247: 1.78 of 3.82 TFLOPs."""
    found = entering(shallow, "pyramiddrop")
    assert found == list(staged(LLAVA_7B, {8: 0.5, 16: 0.25, 24: 0.125}).visual)
    assert ratio("pdrop", LLAVA_7B, thinned(LLAVA_7B, found)) == pytest.approx(1.78 / 3.82, abs=0.001)


def test_himix(shallow: Captured) -> None:
    """No image row is computed in any block; all serve as keys."""
    plan = tg.make_plan(shallow.program, "himix", facts=shallow.facts, exact=False)
    computed = pathways(shallow.apply(plan).program[U], shallow.facts[U]).tokens_per_block
    rows = thinned(LLAVA_7B, computed, mode="freeze")
    assert rows == himix_rows(LLAVA_7B)
    n, text, d, m = VISUAL + TEXT, TEXT, LLAVA_7B.hidden, LLAVA_7B.intermediate
    by_hand = 2 * text * d**2 + 2 * n * d**2 + 2 * text * n * d + 2 * text * d * m
    assert ratio("himix", LLAVA_7B, rows) == pytest.approx(by_hand / (4 * n * d**2 + 2 * n * n * d + 2 * n * d * m))

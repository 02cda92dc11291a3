"""FLOPs as papers print them: our numbers beside the published ones."""

from __future__ import annotations

import pytest

from tokgraph.errors import PlanError
from tokgraph.report.published_flops import (
    FORMULAS,
    NAMES,
    Rows,
    Shape,
    fastv,
    himix,
    himix_rows,
    hmgen_rows,
    pdrop,
    staged,
    thinned,
    whole,
)

GIGA, TERA = 1e9, 1e12
LLAVA_13B = Shape(layers=40, hidden=5120, intermediate=13824, tokens=612, visual=576)


def llava_7b(visual: int = 576) -> Shape:
    return Shape(layers=32, hidden=4096, intermediate=11008, tokens=visual + 64, visual=visual)


def count(convention: str, shape: Shape, rows: Rows) -> float:
    return FORMULAS[convention](shape, rows_per_layer=rows.rows, keys_per_layer=rows.keys, visual_per_layer=rows.visual)


@pytest.mark.parametrize(
    ("layer", "ratio", "published"),
    [
        (2, 0.90, 29.7),
        (2, 0.75, 50.2),
        (2, 0.50, 84.6),
        (3, 0.90, 33.0),
        (3, 0.75, 52.9),
        (3, 0.50, 86.4),
        (5, 0.90, 39.6),
        (5, 0.75, 58.4),
        (5, 0.50, 90.1),
        (0, 0.00, 154.6),
    ],
)
def test_fastv_table_1(layer: int, ratio: float, published: float) -> None:
    """LLaVA-1.5-13B, filtering layer K and ratio R, GFLOPs of a layer on average."""
    ours = count("fastv", LLAVA_13B, staged(LLAVA_13B, {layer: 1 - ratio})) / LLAVA_13B.layers / GIGA
    assert round(ours, 1) == published


@pytest.mark.parametrize(
    ("visual", "drops", "published"),
    [
        (576, {}, 3.82),
        (576, {8: 0.5, 16: 0.25, 24: 0.125}, 1.78),
        (576, {10: 0.5, 20: 0.25}, 2.13),  # three stages: 32 layers in thirds, rounded down
        (2880, {}, 20.8),
        (2880, {8: 0.5, 16: 0.25, 24: 0.125}, 9.46),
        (5184, {}, 40.6),
        (5184, {8: 0.5, 16: 0.25, 24: 0.125}, 18.1),
    ],
)
def test_pyramid_drop(visual: int, drops: dict[int, float], published: float) -> None:
    """LLaVA-1.5-7B and LLaVA-NeXT-7B, TFLOPs of the image tokens."""
    shape = llava_7b(visual)
    digits = len(str(published).split(".")[1])
    assert round(count("pdrop", shape, staged(shape, drops)) / TERA, digits) == published


def test_himix_is_fastv_where_every_row_is_a_query() -> None:
    shape = llava_7b()
    rows = staged(shape, {8: 0.5})
    assert count("himix", shape, rows) == pytest.approx(count("fastv", shape, rows))


def test_himix_by_hand() -> None:
    shape = Shape(layers=2, hidden=3, intermediate=5, tokens=7, visual=4)
    layer = (
        2 * 3 * 3 * 3  # query and output projections of three text rows
        + 2 * 7 * 3 * 3  # key and value projections of seven rows
        + 2 * 3 * 7 * 3  # three queries to seven keys: scores, and the sum of values
        + 2 * 3 * 3 * 5  # feed-forward part of three rows
    )
    assert count("himix", shape, himix_rows(shape)) == 2 * layer


def test_himix_costs_more_than_text_alone_and_much_less_than_all() -> None:
    """Its paper reports a tenth of the decoder's cost, without the projections of the image rows."""
    shape = llava_7b()
    share = count("himix", shape, himix_rows(shape)) / count("himix", shape, whole(shape))
    text = count("himix", shape, thinned(shape, [0] * 32)) / count("himix", shape, whole(shape))
    assert text < 0.1 < share < 0.3


def test_hmgen_leaves_image_rows_out_of_the_skipped_layers() -> None:
    shape = llava_7b()
    rows = hmgen_rows(shape, skipped=range(9, 25, 2))
    assert rows.visual[8:12] == (576, 0, 576, 0)
    assert rows.keys == rows.rows
    full, text = (himix(shape, rows_per_layer=[n] * 32) / 32 for n in (shape.tokens, shape.text))
    assert count("himix", shape, rows) == pytest.approx(24 * full + 8 * text)


def test_a_plans_tokens_per_block_are_counted() -> None:
    shape = Shape(layers=3, hidden=8, intermediate=16, tokens=10, visual=6)
    assert thinned(shape, [6, 3, 6]) == Rows((10, 7, 10), (10, 7, 10), (6, 3, 6))
    assert thinned(shape, [6, 3, 6], mode="freeze") == Rows((10, 7, 10), (10, 10, 10), (6, 3, 6))
    assert fastv(shape, rows_per_layer=[10, 7, 10]) < fastv(shape, rows_per_layer=[10, 10, 10])
    assert pdrop(shape, rows_per_layer=[10, 7, 10]) == count("pdrop", shape, thinned(shape, [6, 3, 6]))


def test_names() -> None:
    assert NAMES == ("exact", "fastv", "pdrop", "himix")
    assert set(FORMULAS) == set(NAMES) - {"exact"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows_per_layer": [10]}, "rows of 2 layers"),
        ({"rows_per_layer": [10, 10], "keys_per_layer": [10]}, "keys of 2 layers"),
        ({"rows_per_layer": [10, 3]}, "visual of 2 layers"),  # fewer rows than text: say which of them are visual
        ({"rows_per_layer": [10, 10], "keys_per_layer": [10, 9]}, "layer 1: 10 rows, 6 of them visual, and 9 keys"),
        ({"rows_per_layer": [10, 4], "visual_per_layer": [6, 5]}, "layer 1: 4 rows, 5 of them visual, and 4 keys"),
    ],
)
def test_numbers_that_fit_no_model(given: dict[str, list[float]], message: str) -> None:
    shape = Shape(layers=2, hidden=8, intermediate=16, tokens=10, visual=6)
    with pytest.raises(PlanError, match=message):
        fastv(shape, **given)


def test_shapes_that_are_none() -> None:
    with pytest.raises(PlanError, match="no model has these dimensions"):
        Shape(layers=2, hidden=8, intermediate=16, tokens=4, visual=5)

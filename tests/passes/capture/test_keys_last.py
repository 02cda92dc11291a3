"""Scores of attention are turned for their softmax, if they lie in another order than fused attention has."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.capture.test_batch_axis import plain, random
from tests.passes.capture.test_dispatch import after
from tests.passes.tools import changes
from tokgraph.passes.capture.keys_last import KeysLast


def test_keys_before_heads() -> None:
    """``[batch, tokens, keys, heads]``."""
    before = plain(lambda x: (x.softmax(2),), random(2, 5, 5, 4))
    assert_expected_inline(
        changes(before, after(KeysLast(), before)),
        """\
-%softmax = softmax.int(%args, 2)  # float64[2, 5, 5, 4]
-return [%softmax]
+%permute = permute(%args, [0, 3, 1, 2])  # float64[2, 4, 5, 5] by keys-last
+%softmax_int = softmax.int(%permute, 3, None)  # float64[2, 4, 5, 5] by keys-last
+%permute.2 = permute(%softmax_int, [0, 2, 3, 1])  # float64[2, 5, 5, 4] by keys-last
+return [%permute.2]
""",
    )


@pytest.mark.parametrize(("shape", "axis"), [((2, 4, 5, 5), 3), ((2, 5, 3), 1), ((5, 5), 0), ((2, 5, 4, 6), 3)])
def test_others_are_left(shape: tuple[int, ...], axis: int) -> None:
    """Queries and keys are last, or nothing is as long as the keys."""
    before = plain(lambda x: (x.softmax(axis),), torch.ones(shape))
    assert changes(before, after(KeysLast(), before)) == ""


def test_types_stay() -> None:
    def attend(x: Tensor) -> tuple[Tensor]:
        return (x.softmax(1, dtype=torch.float64),)

    before = plain(attend, torch.randn(2, 5, 5, 4))
    assert "float64[2, 5, 5, 4] by keys-last" in changes(before, after(KeysLast(), before))

"""Quotients of sums over rows and how many rows there are become averages, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from tests.passes.capture.test_batch_axis import plain, random
from tests.passes.capture.test_dispatch import after
from tests.passes.tools import changes
from tokgraph.passes.capture.row_averages import RowAverages

CLASSES = torch.tensor([[1, 0], [2, 1], [0, 1]])


def averaged(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> str:
    before = plain(function, *inputs)
    return changes(before, after(RowAverages(), before))


def test_running_sums() -> None:
    def balance(x: Tensor, y: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        total, count, rows = torch.zeros(4).double(), torch.zeros(4), 0.0
        for share in (x, y):
            total, rows = total + share.sum(0), rows + share.shape[0]
            count = count + torch.histc(classes.reshape(-1).float(), bins=4, min=0, max=4)
        return total / rows, count / rows

    assert_expected_inline(
        averaged(balance, random(3, 4), random(3, 4), CLASSES),
        """\
+%class_shares = class_shares([%args.3, %args.3], [], 4, torch.float32)  # float32[4] by row-averages
+%mean_of_rows = mean_of_rows([%args, %args.2], [])  # float64[4] by row-averages
-%_to_copy = _to_copy(%zeros, dtype=torch.float64)  # float64[4]
-%zeros.2 = zeros([4], device=cpu, pin_memory=False)  # float32[4]
-%sum = sum.dim_IntList(%args, [0])  # float64[4]
-%add = add.Tensor(%_to_copy, %sum)  # float64[4]
-%_to_copy.2 = _to_copy(%view, dtype=torch.float32)  # float32[6]
-%histc = histc(%_to_copy.2, 4, 0, 4)  # float32[4]
-%add.2 = add.Tensor(%zeros.2, %histc)  # float32[4]
-%sum.2 = sum.dim_IntList(%args.2, [0])  # float64[4]
-%add.3 = add.Tensor(%add, %sum.2)  # float64[4]
-%_to_copy.3 = _to_copy(%view.2, dtype=torch.float32)  # float32[6]
-%histc.2 = histc(%_to_copy.3, 4, 0, 4)  # float32[4]
-%add.4 = add.Tensor(%add.2, %histc.2)  # float32[4]
-%div = div.Tensor(%add.3, 6.0)  # float64[4]
-%div.2 = div.Tensor(%add.4, 6.0)  # float32[4]
-return [%div, %div.2]
+return [%mean_of_rows, %class_shares]
""",
    )


def test_weights_of_rows() -> None:
    def balance(x: Tensor, y: Tensor, classes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        flat = mask.reshape(-1).double()
        total = (x * flat.unsqueeze(-1)).sum(0) + (flat.view(-1, 1) * y).sum(0)
        count = torch.zeros(4).double().scatter_add_(0, classes.reshape(-1), flat.repeat_interleave(2))
        return total / (flat.sum() + flat.sum()), count / flat.sum()

    assert_expected_inline(
        averaged(balance, random(3, 4), random(3, 4), CLASSES, torch.tensor([[1, 0, 1]])),
        """\
-%unsqueeze = unsqueeze(%_to_copy, -1)  # float64[3, 1]
-%mul = mul.Tensor(%args, %unsqueeze)  # float64[3, 4]
-%sum = sum.dim_IntList(%mul, [0])  # float64[4]
-%view.2 = reshape(%_to_copy, [-1, 1])  # float64[3, 1]
-%mul.2 = mul.Tensor(%view.2, %args.2)  # float64[3, 4]
-%sum.2 = sum.dim_IntList(%mul.2, [0])  # float64[4]
-%add = add.Tensor(%sum, %sum.2)  # float64[4]
+%class_shares = class_shares([%args.3], [%_to_copy], 4, torch.float64)  # float64[4] by row-averages
+%mean_of_rows = mean_of_rows([%args, %args.2], [%_to_copy, %_to_copy])  # float64[4] by row-averages
-%_to_copy.2 = _to_copy(%zeros, dtype=torch.float64)  # float64[4]
-%view.3 = reshape(%args.3, [-1])  # int64[6]
-%repeat_interleave = repeat_interleave.self_int(%_to_copy, 2)  # float64[6]
-%scatter_add = scatter_add(%_to_copy.2, 0, %view.3, %repeat_interleave)  # float64[4]
-%sum.3 = sum(%_to_copy)  # float64[]
-%sum.4 = sum(%_to_copy)  # float64[]
-%add.2 = add.Tensor(%sum.3, %sum.4)  # float64[]
-%div = div.Tensor(%add, %add.2)  # float64[4]
-%sum.5 = sum(%_to_copy)  # float64[]
-%div.2 = div.Tensor(%scatter_add, %sum.5)  # float64[4]
-return [%div, %div.2]
+return [%mean_of_rows, %class_shares]
""",
    )


def test_rows_on_several_axes_and_choices_of_each() -> None:
    def balance(x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.histc(classes.reshape(-1).double(), bins=4, min=0, max=3)
        return x.sum((0, 1)) / (x.shape[0] * x.shape[1]), counts / classes.numel()

    assert_expected_inline(
        averaged(balance, random(2, 3, 4), CLASSES),
        """\
+%class_shares = class_shares([%args.2], [], 4, torch.float64)  # float64[4] by row-averages
+%div_tensor = div.Tensor(%class_shares, 2)  # float64[4] by row-averages
+%reshape = reshape(%args, [-1, 4])  # float64[6, 4] by row-averages
+%mean_of_rows = mean_of_rows([%reshape], [])  # float64[4] by row-averages
-%_to_copy = _to_copy(%view, dtype=torch.float64)  # float64[6]
-%histc = histc(%_to_copy, 4, 0, 3)  # float64[4]
-%sum = sum.dim_IntList(%args, [0, 1])  # float64[4]
-%div = div.Tensor(%sum, 6)  # float64[4]
-%div.2 = div.Tensor(%histc, 6)  # float64[4]
-return [%div, %div.2]
+return [%mean_of_rows, %div_tensor]
""",
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w, c: x.sum(0) / 7,
        lambda x, w, c: x.sum(1) / 4,
        lambda x, w, c: x.sum(0, keepdim=True) / 3,
        lambda x, w, c: x.sum() / 3,
        lambda x, w, c: (x.sum(0) + 1) / 3,
        lambda x, w, c: torch.add(x.sum(0), x.sum(0), alpha=2) / 6,
        lambda x, w, c: (x.sum(0) + x.mean(0)) / 6,
        lambda x, w, c: (x * w.unsqueeze(-1)).sum(0) / w.sum().clamp(min=1),
        lambda x, w, c: (x * w.unsqueeze(-1)).sum(0) / (2 * w).sum(),
        lambda x, w, c: (x * w.unsqueeze(-1)).sum(0) / (w.sum() + 1),
        lambda x, w, c: (x * w.unsqueeze(-1)).sum(0) / w.long().sum(),
        lambda x, w, c: (x * (w * 3).unsqueeze(-1)).sum(0) / (w * 3).bool().sum(),
        lambda x, w, c: torch.histc(c.bool().double().flatten(), bins=2, min=0, max=2) / 3,
        lambda x, w, c: (w * w).sum() / w.sum(),
        lambda x, w, c: torch.histc(x.flatten(), bins=4, min=0, max=4) / 3,
        lambda x, w, c: torch.histc(c.flatten().double(), bins=4, min=1, max=5) / 3,
        lambda x, w, c: torch.ones(4).double().scatter_add(0, c.flatten(), w.repeat_interleave(2)) / w.sum(),
    ],
)
def test_other_quotients_are_left_alone(other: Callable[..., Tensor]) -> None:
    assert averaged(lambda x, w, c: (other(x, w, c),), random(3, 4), random(3).abs(), CLASSES) == ""

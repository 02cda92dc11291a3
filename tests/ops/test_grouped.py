"""Grouped products and softmaxes beside sinks against what they are by definition, with gradients."""

from __future__ import annotations

import pytest
import torch

from tokgraph import ops

aten, tokgraph = torch.ops.aten, torch.ops.tokgraph


def numbers(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("function", [tokgraph.grouped_mm.default, ops.decompositions()[tokgraph.grouped_mm.default]])
def test_each_row_meets_the_matrix_of_its_group(function) -> None:
    x, weight, groups = numbers(2, 3, 4), numbers(5, 4, 6), torch.tensor([[0, 4, 0], [2, 4, 0]])  # two groups are empty
    expected = (x.unsqueeze(-2) @ weight[groups]).squeeze(-2)
    found = function(x, weight, groups)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(y.square().sum(), [x, weight]) for y in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_operator_of_grouped_products_is_whole() -> None:
    x, weight, groups = numbers(3, 4), numbers(5, 4, 6), torch.tensor([0, 4, 0])
    torch.library.opcheck(tokgraph.grouped_mm.default, (x, weight, groups))
    grad = numbers(3, 6).detach()
    plain = ops.decompositions()[tokgraph.grouped_mm_weight.default]
    torch.testing.assert_close(plain(x, grad, groups, 5), tokgraph.grouped_mm_weight(x, grad, groups, 5))


def test_weights_beside_sinks() -> None:
    scores, sinks = numbers(2, 3, 5), numbers(3, 2)
    share = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(tokgraph.softmax_beside(scores, sinks), share, rtol=1e-12, atol=1e-12)

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


@pytest.mark.parametrize("sizes", [(8, 16), (8, 5)])  # the second: rows that PyTorch's function refuses
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_groups_at_once(dtype: torch.dtype, tolerance: float, sizes: tuple[int, int]) -> None:
    """Matrices as they lie in memory, transposed, and with gaps; two groups are empty."""
    k, n = sizes
    groups = torch.tensor([[0, 4, 0], [2, 4, 0]])
    whole = [numbers(*shape).detach().to(dtype) for shape in ((5, k, n), (5, n, k), (5, 2 * k, 3 * n), (5, k, n + 1))]
    for weight in (whole[0], whole[1].mT, whole[2][:, ::2, ::3], whole[3][..., 1:]):
        x, weight = (y.detach().to(dtype).requires_grad_() for y in (numbers(2, 3, k), weight))
        pairs = [tokgraph.grouped_mm(x, weight, groups), (x.unsqueeze(-2) @ weight[groups]).squeeze(-2)]
        mine, theirs = ([y, *torch.autograd.grad(y.float().square().sum(), [x, weight])] for y in pairs)
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()


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

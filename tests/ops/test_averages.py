"""Averages over the rows of several tensors are those of the tensors joined."""

from __future__ import annotations

import torch

from tests.ops.test_ops import TOKGRAPH, index, numbers


def test_averages_over_the_rows_of_several_tensors():
    some, others, ones = numbers(3, 4), numbers(2, 4), [torch.ones(3), torch.ones(2)]
    mean = torch.cat([some, others]).mean(0)
    torch.testing.assert_close(TOKGRAPH.mean_of_rows([some, others], []), mean)
    torch.testing.assert_close(TOKGRAPH.mean_of_rows([some, others], ones), mean)
    weights = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0])]
    expected = (some[0] + 2 * some[2] + others[1]) / 4
    torch.testing.assert_close(TOKGRAPH.mean_of_rows([some, others], weights), expected)
    classes = [index([1, 3], [0, 3], [1, 0]), index([2, 3], [2, 0])]
    shares = TOKGRAPH.class_shares(classes, [], 4, torch.float64)
    torch.testing.assert_close(shares, torch.tensor([3, 2, 2, 3]).double() / 5)
    shares = TOKGRAPH.class_shares(classes, weights, 4, torch.float64)
    torch.testing.assert_close(shares, torch.tensor([3, 3, 1, 1]).double() / 4)

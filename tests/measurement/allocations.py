"""Allocations of captured models, and what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.harness import Captured
from tests.measurement.models import (
    allocation_by_hand,
)
from tokgraph.measurement import Allocation, attention_allocation, find_segments

CLOSE = {"rtol": 0, "atol": 1e-5}


def of(found: Captured, task: str = "t", *batches: dict[str, Any], **options: Any) -> Allocation:
    return attention_allocation(found.program[task], found.facts[task], batches or None, **options)


def assert_sums_to_one(allocation: Allocation) -> None:
    total = allocation.mass.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), **CLOSE)


def expected(found: Captured, task: str, weights: list[Tensor], allocation: Allocation, given: Any = None) -> Tensor:
    segments = find_segments(found.program[task], found.facts[task], given)
    return allocation_by_hand(
        weights, [segments[n] for n in allocation.queries], [segments[n] for n in allocation.keys]
    )

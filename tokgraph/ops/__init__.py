"""Run-time operators: index building, select, drop and restore, with fake kernels, autograd and an ATen lowering.

Every index is a ``[batch, rows]`` int64 tensor of token positions, unique and ascending in each row. Operators that build
one know its width before they run (shapes stay static or symbolic, so graphs compile and export), and check on each
batch that the width is right: a :class:`BatchError` on the CPU, ``torch._assert_async`` on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import averages, checks, grouped, indices, masks, moving, ranges, routed, scores, sinks, unread
from .base import NAMESPACE, Condition, expand_index
from .checks import check
from .grouped import grouped_mm
from .indices import drop_counts, keep_rows, lost_rows, ragged_rows, range_rows, ranks, rows, select_targets
from .masks import demand_mask, prompt_mask, range_mask
from .moving import drop, merge, restore, select
from .scores import prompt_attention, prompt_mass, random_score, similarity_score, spread_score, uniform_score
from .unread import check_unread

__all__ = [
    "NAMESPACE",
    "OF_MODELS",
    "Condition",
    "check",
    "check_unread",
    "conditions",
    "decompositions",
    "demand_mask",
    "drop",
    "drop_counts",
    "expand_index",
    "grouped_mm",
    "keep_rows",
    "lost_rows",
    "merge",
    "prompt_attention",
    "prompt_mask",
    "prompt_mass",
    "ragged_rows",
    "random_score",
    "range_mask",
    "range_rows",
    "ranks",
    "restore",
    "rows",
    "select",
    "select_targets",
    "similarity_score",
    "spread_score",
    "uniform_score",
]


OF_MODELS = frozenset(
    {
        torch.ops.tokgraph.grouped_mm.default,
        torch.ops.tokgraph.grouped_mm_weight.default,
        torch.ops.tokgraph.softmax_beside.default,
        torch.ops.tokgraph.mean_of_rows.default,
        torch.ops.tokgraph.class_shares.default,
    }
)
"""Operators that stand for what models compute; all others choose, move and check rows."""


def decompositions(grouped_products: bool = True) -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Operator -> plain ATen function, as ``ExportedProgram.run_decompositions`` takes it; the batch checks are left out.

    Args:
        grouped_products: these as well, which are then products of all rows with all matrices, for runtimes that know no
            groups.
    """
    return (
        moving.LOWERED
        | ranges.LOWERED
        | masks.LOWERED
        | indices.LOWERED
        | scores.LOWERED
        | unread.LOWERED
        | checks.LOWERED
        | (grouped.LOWERED if grouped_products else {})
        | sinks.LOWERED
        | routed.LOWERED
        | averages.LOWERED
    )


def conditions() -> dict[torch._ops.OpOverload, Condition]:
    """Operator -> what it asks of each batch, for runtimes that run its decomposition."""
    return indices.CONDITIONS | scores.CONDITIONS | unread.CONDITIONS | checks.CONDITIONS

"""Which indices are known to part the rows of an axis: a row is in one of them or in the other."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


def are_complements(a: fx.Node, b: fx.Node) -> bool:
    """Whether every row is known to be in exactly one of two indices: one has what the other's mask, or choice, leaves out."""
    return _leaves_out(a, b) or _leaves_out(b, a)


def _leaves_out(a: fx.Node, b: fx.Node) -> bool:
    """Whether ``a`` has the rows that are not in ``b``."""
    if a.target is tokgraph.keep_rows.default:
        return bool(a.args[2] == 0) and a.args[0] is b
    masks = [index.args[0] for index in (a, b) if index.target is tokgraph.rows.default and index.args[2] is True]
    if len(masks) != 2:
        return False
    mask, other = masks
    return isinstance(mask, fx.Node) and mask.target is aten.logical_not.default and mask.args[0] is other

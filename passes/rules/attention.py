"""The rule of fused attention."""

from __future__ import annotations

import torch
from torch import fx

from tokgraph.ir.node import argument, rank

from .registry import AxisMap, Mix, Rows, is_one, rule

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default, products=True, axes=())
def scaled_dot_product_attention(node: fx.Node) -> AxisMap:
    """Query rows follow the query and the mask, never key or value; key, value and mask columns are mixed.

    With ``is_causal`` a row's meaning depends on its position, so query rows are not followed either; they stay in place.
    """
    q, k, v, mask = (argument(node, name) for name in ("query", "key", "value", "attn_mask"))
    n = rank(node)
    grouped, causal = bool(argument(node, "enable_gqa", False)), bool(argument(node, "is_causal", False))
    rows: list[Rows] = []
    for axis in range(n):
        if axis == n - 2:
            query = (
                ((q, axis),) if mask is None or is_one(mask, rank(mask) - 2) else ((q, axis), (mask, rank(mask) - 2))
            )
            rows.append(None if causal else query)
        elif axis == n - 1:
            rows.append(((v, axis),))
        else:
            operands = [q] if grouped and axis == n - 3 else [q, k, v]
            aligned = [(x, axis - (n - rank(x))) for x in (*operands, mask) if x is not None]
            rows.append(tuple((x, j) for x, j in aligned if j >= 0 and (not is_one(x, j) or is_one(node, axis))))
    keys = [(k, rank(k) - 2), (v, rank(v) - 2)]
    if mask is not None and not is_one(mask, rank(mask) - 1):
        keys.append((mask, rank(mask) - 1))
    mixes = [Mix("attention", tuple(keys)), Mix("contraction", ((q, rank(q) - 1), (k, rank(k) - 1)))]
    return AxisMap(tuple(rows), tuple(mixes), ((n - 2, (q, n - 2)),) if causal else ())

"""Checks of the model on values whose rows are dropped: such a check is made on the rows that are left.

``all(isfinite(h))`` says of every row what it says of some, so it need not hold dropped rows back; a check that counts
rows would fail on fewer, and goes on reading all of them.
"""

from __future__ import annotations

import torch
from torch import fx

from tokgraph.ir.node import rank, tensor, tensor_inputs

from ..emitter import is_check
from ..rules import traits
from ..rules.registry import is_tagged_pointwise

aten = torch.ops.aten
_ALL = (aten.all.default, aten._is_all_true.default)
_POINTWISE = (aten.isfinite.default, aten.isnan.default, aten.isinf.default)
"""Operators that are element by element, and that torch does not tag so."""


def followers(graph: fx.Graph) -> set[fx.Node]:
    """Checks that hold of any rows if they hold of all, and the values that only they read."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_check(node):
            cone = _cone(node)
            leaves = {x for y in cone for x in tensor_inputs(y) if x not in cone and rank(x)} - set(told(node))
            if len(leaves) == 1:  # of two values, only one might lose its rows
                found |= cone
    return found


def told(node: fx.Node) -> list[fx.Node]:
    """The values and sizes that a check's message tells; none of another node."""
    return [x for numbers in node.args[4:6] for x in numbers if isinstance(x, fx.Node)] if is_check(node) else []  # type: ignore[union-attr]


def _cone(check: fx.Node) -> set[fx.Node]:
    """A check, and what its condition is made of element by element for it alone."""
    cone = {check}
    stack: list[fx.Node] = tensor_inputs(check)[:1]
    while stack and stack[-1].target in _ALL and set(stack[-1].users) <= cone:
        cone.add(stack[-1])
        stack = tensor_inputs(stack[-1])
    while stack:
        x = stack.pop()
        if _elementwise(x) and x not in cone and set(x.users) <= cone:
            cone.add(x)
            stack += tensor_inputs(x)
    return cone


def _elementwise(node: fx.Node) -> bool:
    if node.op != "call_function" or tensor(node) is None:
        return False
    return is_tagged_pointwise(node.target) or node.target in _POINTWISE or traits(node.target).copies

"""Einsums that are one matrix product, written as such: attentions are recognised by their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rules.contraction import einsum_letters

aten = torch.ops.aten


def products() -> dict[Any, Callable[..., Any]]:
    """Operator -> what it is in plain operators, as ``run_decompositions`` takes it; other einsums stay."""
    return {aten.einsum.default: product}


def product(equation: str, tensors: Sequence[Tensor], path: Sequence[int] | None = None) -> Any:
    """Two operands whose letters are those of a batch, one that is summed over, and at most one more in each: of several
    more, a matrix product would copy the other operand.

    Args:
        equation: as ``torch.einsum`` takes it.
        tensors: the operands.
        path: the order of products, which two operands do not have.
    """
    if len(tensors) != 2:
        return NotImplemented
    (one, two), result = einsum_letters(equation, [x.dim() for x in tensors])
    batch, summed = ([x for x in one if x in two and (x in result) is kept] for kept in (True, False))
    left, right = [x for x in one if x not in two], [x for x in two if x not in one]
    plain = all(len(set(x)) == len(x) for x in (one, two, result)) and set(left + right) <= set(result)
    if not plain or len(summed) != 1 or max(len(left), len(right)) > 1:
        return NotImplemented
    a, b = tensors
    if not right:
        a, b = _laid_out(a, one, [*batch, *left, *summed]), _laid_out(b, two, [*batch, *summed])
        found = (a @ b.unsqueeze(-1)).squeeze(-1)
    else:
        a, b = _laid_out(a, one, [*batch, *left, *summed]), _laid_out(b, two, [*batch, *summed, *right])
        found = a @ b if left else (a.unsqueeze(-2) @ b).squeeze(-2)
    return _laid_out(found, "".join([*batch, *left, *right]), list(result))


def _laid_out(x: Tensor, letters: str, order: Sequence[str]) -> Tensor:
    """``x``, whose axes have letters, with its axes in an order."""
    return x if list(letters) == list(order) else x.permute([letters.index(letter) for letter in order])

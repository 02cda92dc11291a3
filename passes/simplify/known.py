"""What can be said of the elements of a value by their positions: ``j <= i``, a constant, a sum of positions.

Axes are counted from the end, where broadcasting aligns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

Rows = tuple[fx.Node, ...]
"""Indices by which an axis was narrowed, one after the other; each ascends, so order along the axis is that of before."""
Number = int | float | bool


@dataclass(frozen=True)
class Linear:
    """An integer: ``offset`` plus, for each axis, a multiple of the position along it.

    Args:
        offset: what does not depend on a position.
        terms: ``(axis, factor, rows)``, ascending; the position is the one before ``rows`` narrowed the axis.
    """

    offset: int
    terms: tuple[tuple[int, int, Rows], ...] = ()

    def __add__(self, other: Linear) -> Linear | None:
        factors = {axis: (factor, rows) for axis, factor, rows in self.terms}
        for axis, factor, rows in other.terms:
            mine, same = factors.get(axis, (0, rows))
            if same != rows:
                return None
            factors[axis] = (mine + factor, rows)
        return linear(self.offset + other.offset, ((axis, *rest) for axis, rest in factors.items()))

    def times(self, factor: int) -> Linear:
        """The number, multiplied."""
        return linear(self.offset * factor, ((axis, f * factor, rows) for axis, f, rows in self.terms))

    def moved(self, to: Callable[[int], int]) -> Linear:
        """The same over renumbered axes."""
        return linear(self.offset, ((to(axis), f, rows) for axis, f, rows in self.terms))


@dataclass(frozen=True)
class AtMostZero:
    """A boolean: whether ``number`` is at most 0."""

    number: Linear


@dataclass(frozen=True)
class Constant:
    """The same number everywhere."""

    number: Number


@dataclass(frozen=True)
class Choice:
    """``yes`` where ``condition`` holds, else ``no``."""

    condition: AtMostZero
    yes: Number
    no: Number


Known = Linear | AtMostZero | Constant | Choice


def linear(offset: int, terms: Iterable[tuple[int, int, Rows]]) -> Linear:
    """A :class:`Linear` in its normal form."""
    return Linear(offset, tuple(sorted((t for t in terms if t[1]), key=lambda t: t[0])))


def is_lower_triangle(found: Known | None, lowest: float = -torch.inf) -> bool:
    """Whether a mask shows each row what stands at or before it, as one of booleans or one that is added to scores.

    Rows and columns may have been narrowed by the same indices: these ascend.

    Args:
        found: what is known of the mask.
        lowest: what a softmax makes exactly 0 of beside any score that is seen.
    """
    if isinstance(found, Choice):
        condition, yes, no = found.condition, found.yes, found.no
        if yes < no:
            condition, yes, no = opposite(condition), no, yes
        return yes == 0 and no <= lowest and is_lower_triangle(condition)
    if not isinstance(found, AtMostZero) or len(found.number.terms) != 2:
        return False
    (row, down, rows), (column, right, columns) = found.number.terms
    return (found.number.offset, row, down, column, right) == (0, -2, -1, -1, 1) and rows == columns


def shows_all(found: Known | None) -> bool:
    """Whether a mask hides nothing."""
    return isinstance(found, Constant) and (found.number is True or (type(found.number) is float and not found.number))


def remade(found: Known | None, change: Callable[[Linear], Linear | None]) -> Known | None:
    """What is known, with another number of the same positions in it."""
    if isinstance(found, Linear):
        return change(found)
    if isinstance(found, AtMostZero):
        number = change(found.number)
        return None if number is None else AtMostZero(number)
    if isinstance(found, Choice):
        number = change(found.condition.number)
        return None if number is None else Choice(AtMostZero(number), found.yes, found.no)
    return found


def opposite(condition: AtMostZero) -> AtMostZero:
    """Integers: ``d`` is above 0 where ``1 - d`` is at most 0."""
    number = condition.number.times(-1)
    return AtMostZero(Linear(number.offset + 1, number.terms))

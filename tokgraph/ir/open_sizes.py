"""Open sizes: whether something that looked at values of a graph took sizes that may change for those of the example batch.

To compare two sizes of fake tensors asks what they are in the example batch, and keeps the answer: that two of them are equal
(tokens and features, samples and heads) then holds for all that is computed in the graph from there on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils._sympy.value_ranges import ValueRanges

from .node import fake_mode

_MANY = 720720  # has many divisors: that one divides a size fixes nothing


REACH = 2**40
"""More than any axis has."""


@contextmanager
def within_reach(mode: FakeTensorMode | None) -> Iterator[None]:
    """Sizes of a mode are at most what an axis may have, while something is traced in it.

    PyTorch refuses to take a size that depends on data for a multiple of another one, where the multiple of that one's
    bound is no 64-bit number any more, by its own rounding of bounds.
    """
    environment = None if mode is None else mode.shape_env
    ranges = {} if environment is None else environment.var_to_range
    wide = {symbol: x.upper for symbol, x in ranges.items() if x.is_int and x.lower < REACH < x.upper}
    for symbol in wide:
        ranges[symbol] = ValueRanges(ranges[symbol].lower, sympy.Integer(REACH))
    try:
        yield
    finally:
        for symbol, upper in wide.items():
            if ranges[symbol].upper == REACH:
                ranges[symbol] = ValueRanges(ranges[symbol].lower, upper)


@dataclass(frozen=True)
class OpenSizes:
    """What is known of a graph's sizes at some time.

    Args:
        environment: the shape environment of its values; ``None``: it has none, and all of its sizes are numbers.
        guards: how many relations between sizes it had been asked for.
        replaced: the symbols that it took for something else.
    """

    environment: Any
    guards: int = 0
    replaced: frozenset[sympy.Symbol] = frozenset()

    @classmethod
    def of(cls, graph: fx.Graph) -> OpenSizes:
        """What is known now."""
        mode = fake_mode(graph)
        environment = None if mode is None else mode.shape_env
        if environment is None:
            return cls(None)
        return cls(environment, len(environment.guards), frozenset(environment.replacements))

    def fixed_since(self) -> list[str]:
        """The relations that hold in the example batch only and are taken for granted since then, as text."""
        if self.environment is None:
            return []
        replacements = self.environment.replacements
        found = {
            symbol for symbol in replacements.keys() - self.replaced if not symbol_is_type(symbol, SymT.UNBACKED_INT)
        }
        new = [guard.expr for guard in self.environment.guards[self.guards :]]
        relations = [expr for expr in new if isinstance(expr, sympy.Eq) and not _holds_of_others(expr)]
        return [f"{symbol} = {replacements[symbol]}" for symbol in sorted(found, key=str)] or list(map(str, relations))


def _holds_of_others(relation: sympy.Eq) -> bool:
    """Whether an equation holds of sizes that have nothing to do with one another, as of ``max(1, s - 5)`` and ``s - 5``."""
    symbols = sorted(relation.free_symbols, key=str)
    return bool(relation.xreplace({symbol: sympy.Integer(_MANY * (3 + i)) for i, symbol in enumerate(symbols)}) == True)  # noqa: E712

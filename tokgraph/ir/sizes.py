"""A task's named sizes in the symbols of its graph, and the symbols that give the sizes asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from tokgraph.errors import AnalysisError


def expression(x: Any) -> sympy.Expr:
    """A size as an expression."""
    found: sympy.Expr = sympy.sympify(x)
    return found


def _roots(left: sympy.Expr, symbol: sympy.Symbol) -> list[sympy.Expr]:
    """What a symbol has to be for the expression to be 0; none where sympy cannot tell."""
    try:
        return list(sympy.solve(left, symbol))
    except NotImplementedError:
        return []


@dataclass(frozen=True)
class Sizes:
    """How a task's named sizes are written in the symbols of its graph.

    Args:
        task: the task's name, for messages.
        names: ``"batch"``, ``"tokens"`` (length of the residual stream), ``"visual"`` (visual tokens of a sample) and
            other dimensions under the user's names -> expressions.
        example: symbol -> its value in the example batch.
        planned: whether rows are dropped, for the number of visual tokens of the example batch and no other.
        assumed: what shapes do not show and is assumed, in words; it matters at other sizes than those of the example.
    """

    task: str
    names: Mapping[str, sympy.Expr]
    example: Mapping[sympy.Symbol, int]
    planned: bool = False
    assumed: tuple[str, ...] = ()

    def values(self, /, **asked: int) -> dict[sympy.Symbol, int]:
        """The value of every symbol for the sizes asked for; the others are as in the example batch.

        Where the number of visual tokens changes and ``tokens`` is not given, the text keeps its length. A sample keeps
        its visual tokens unless ``visual`` or a dimension that they depend on is given.

        Raises:
            AnalysisError: no such size, or the captured graph fixes it to another value.
        """
        unknown = sorted(set(asked) - set(self.names))
        if unknown:
            raise AnalysisError(
                f"task {self.task!r} has no size {unknown[0]!r}", help=f"its sizes are {', '.join(self.names)}"
            )
        for name, size in asked.items():
            if size < (0 if name == "visual" else 1):
                raise AnalysisError(
                    f"task {self.task!r}: {name} cannot be {size}", help="ask for a size that a batch has"
                )
        wanted = {name: asked.get(name, self.example_of(name)) for name in ("batch", "visual", *asked)}
        found = self._solve(wanted, asked, {})
        if "tokens" not in asked:
            tokens = self.example_of("tokens") + self._at("visual", found) - self.example_of("visual")
            found = self._solve({"tokens": int(tokens)}, asked, found)
        values = {**self.example, **found}
        self._check(values)
        return values

    def example_of(self, name: str) -> int:
        """A named size in the example batch."""
        return int(expression(self.names[name]).xreplace(dict(self.example)))

    def _at(self, name: str, values: Mapping[sympy.Symbol, int]) -> sympy.Expr:
        return expression(expression(self.names[name]).xreplace({**self.example, **values}))

    def _solve(
        self, wanted: Mapping[str, int], asked: Mapping[str, int], known: Mapping[sympy.Symbol, int]
    ) -> dict[sympy.Symbol, int]:
        """The symbols that give the wanted sizes; what nobody asked for and others decide already is let go."""
        solved = dict(known)
        for name in sorted(wanted, key=lambda n: (len(self.names[n].free_symbols), n not in asked)):
            left = sympy.expand(self.names[name].xreplace(solved) - wanted[name])
            free = sorted(left.free_symbols, key=str)
            roots = _roots(left, free[0]) if free else []
            value = expression(roots[0].xreplace(dict(self.example))) if roots else None
            if value is not None and value.is_integer and value >= 0:
                solved[free[0]] = int(value)
            elif left.xreplace(dict(self.example)) != 0 and (free or name in asked):
                raise AnalysisError(
                    f"task {self.task!r}: the captured graph fixes {name} to {self.example_of(name)}, so its cost at "
                    f"{wanted[name]} cannot be told",
                    help="make that dimension dynamic in the task (Task.dynamic), or capture with another example batch",
                )
        return solved

    def _check(self, values: Mapping[sympy.Symbol, int]) -> None:
        batch, tokens, visual = (self._at(name, values) for name in ("batch", "tokens", "visual"))
        if not (visual.is_integer and 0 <= visual <= tokens):
            raise AnalysisError(
                f"task {self.task!r}: no sample has {visual} visual tokens among {tokens} (batch {batch})",
                help="ask for no more visual tokens than tokens, and for whole images",
            )
        if self.planned and visual != self.example_of("visual"):
            raise AnalysisError(
                f"task {self.task!r}: rows are dropped for {self.example_of('visual')} visual tokens a sample, so the cost "
                f"at {visual} cannot be told",
                help="capture with an example batch of that many, and plan for it",
            )

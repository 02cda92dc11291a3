"""Selectors: which visual tokens of a drop site stay. The built-in ones by name, and those that users register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokgraph.errors import PlanError

Score = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Selector:
    """A way to choose the visual tokens that stay: those of highest score; of equal ones the earlier.

    Args:
        name: its name in drop sites.
        causal: whether position ``i`` stays regardless of what is at other positions.
        score: a user's function (:func:`register_selector`); ``None`` for the built-in ones.
    """

    name: str
    causal: bool
    score: Score | None = None

    def scores(self, candidates: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Scores by the user's function.

        Args:
            candidates: ``[batch, m]``.
            rows: ``[batch, m, hidden]`` for a selector that is not causal.

        Returns:
            ``[batch, m]``.

        Raises:
            PlanError: the function fails, or returns another shape.
        """
        assert self.score is not None
        given = torch.arange(candidates.shape[1], device=candidates.device) if rows is None else rows.detach()
        try:
            found = self.score(given)
        except Exception as error:
            raise PlanError(
                f"selector {self.name!r} failed on a tensor of shape {tuple(given.shape)}: {error}",
                help="it runs on tensors without values as well, so it may not branch on them",
            ) from error
        wanted = candidates.shape if rows is not None else candidates.shape[1:]
        if not isinstance(found, torch.Tensor) or found.shape != wanted:
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise PlanError(f"selector {self.name!r} returned {got} for scores of shape {tuple(wanted)}")
        return found.expand(candidates.shape)


_SELECTORS = {
    name: Selector(name, causal)
    for name, causal in (
        ("uniform", True), ("random", True), ("norm", False), ("attention", False), ("similarity", False),
    )
}  # fmt: skip


def selectors() -> dict[str, Selector]:
    """Name -> selector, those that users registered among them."""
    return dict(_SELECTORS)


def register_selector(name: str, *, causal: bool) -> Callable[[Score], Score]:
    """A decorator that makes a function a selector, to be named in drop sites and plan files.

    The function scores the visual tokens that may be dropped; those of highest score stay. It is called while the graph is
    made, on tensors without values, and becomes part of the graph: PyTorch operators only, no branches on values. A
    sample's scores may depend on that sample alone.

    Args:
        name: its name.
        causal: ``False``: the function gets ``rows``, ``[batch, m, hidden]``, the residual rows at the start of the span,
            and returns ``[batch, m]``; tasks that predict visual tokens refuse it. ``True``: it gets ``positions``,
            ``[m]`` int64, the tokens' numbers ``0 .. m - 1`` and nothing else, and returns ``[m]``: what it chooses
            cannot depend on what is at other positions, because it sees none.

    Raises:
        PlanError: there is such a selector already.
    """

    def register(score: Score) -> Score:
        known = _SELECTORS.get(name)
        if known is not None and not _is_again(known.score, score):
            raise PlanError(f"there is a selector {name!r} already", help="choose another name")
        _SELECTORS[name] = Selector(name, causal, score)
        return score

    return register


def _is_again(known: Score | None, score: Score) -> bool:
    """Whether a module that was loaded twice registers the same function."""
    return known is not None and known.__qualname__ == score.__qualname__ and known.__module__ == score.__module__


def scorer(selector: Selector) -> Callable[..., torch.Tensor]:
    """The function ``(candidates, rows | None) -> scores`` that a graph calls, under the selector's name."""

    def scores(candidates: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        return selector.scores(candidates, rows)

    scores.__name__ = scores.__qualname__ = f"{selector.name}_scores".replace(" ", "_")
    return scores

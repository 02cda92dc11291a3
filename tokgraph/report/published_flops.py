"""FLOPs as papers count them: published formulas as small pure functions, so that a plan can be quoted beside their tables.

Papers count the decoder layers alone (no encoder, no vocabulary head), and a multiply-add as *one* operation; what
tokgraph counts itself, from the graph, is called ``"exact"``: every operator, a multiply-add as two. Compare figures of
one convention only. Dimensions are those of a plain decoder layer: ``d`` hidden, ``m`` of the feed-forward part, as
many key-value heads as heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

from tokgraph.errors import PlanError


@dataclass(frozen=True)
class Shape:
    """The dimensions that the formulas read.

    Args:
        layers: decoder layers.
        hidden: width of the residual stream, the papers' ``d``.
        intermediate: width of the feed-forward part, the papers' ``m``.
        tokens: positions of a sequence, the papers' ``n``.
        visual: visual tokens among them.
    """

    layers: int
    hidden: int
    intermediate: int
    tokens: int
    visual: int

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.intermediate, self.tokens) < 1 or not 0 <= self.visual <= self.tokens:
            raise PlanError(f"no model has these dimensions: {self}", help="visual tokens are among the tokens")

    @property
    def text(self) -> int:
        """Positions that are no visual tokens."""
        return self.tokens - self.visual


@dataclass(frozen=True)
class Rows:
    """How many rows of a sequence each layer works on; fractions are averages over samples.

    Args:
        rows: rows whose residual the layer computes.
        keys: rows that serve as keys and values, at least those.
        visual: visual tokens among ``rows``.
    """

    rows: tuple[float, ...]
    keys: tuple[float, ...]
    visual: tuple[float, ...]


class Formula(Protocol):
    """A way of counting one forward pass of the decoder layers, for one sequence."""

    def __call__(
        self,
        shape: Shape,
        *,
        rows_per_layer: Sequence[float],
        keys_per_layer: Sequence[float] | None = None,
        visual_per_layer: Sequence[float] | None = None,
    ) -> float:
        """FLOPs of the forward pass, summed over layers.

        Args:
            shape: the model and the sequence; only ``layers``, ``hidden`` and ``intermediate`` enter the formulas.
            rows_per_layer: rows that each layer computes.
            keys_per_layer: rows that serve as keys and values in each layer; ``None``: the rows that it computes.
            visual_per_layer: visual tokens among the rows that each layer computes; ``None``: those left when all text
                rows stay.

        Raises:
            PlanError: there is not one number a layer, or a layer has fewer keys than rows.
        """


def whole(shape: Shape) -> Rows:
    """Every row in every layer."""
    return thinned(shape, [shape.visual] * shape.layers)


def thinned(shape: Shape, tokens_per_block: Sequence[float], mode: Literal["hide", "freeze"] = "hide") -> Rows:
    """Rows of a plan: all text, and as many visual tokens in each block as its report's ``tokens_per_block`` says.

    Args:
        shape: the model and the sequence.
        tokens_per_block: visual tokens whose residual each block computes.
        mode: of the drop sites; ``"freeze"``: dropped rows still serve as keys and values.
    """
    rows = tuple(shape.text + visual for visual in tokens_per_block)
    keys = (float(shape.tokens),) * len(rows) if mode == "freeze" else rows
    return Rows(rows, keys, tuple(tokens_per_block))


def staged(shape: Shape, drops: Mapping[int, float]) -> Rows:
    """Rows of nested drops for good: FastV (one) and PyramidDrop (several).

    Args:
        shape: the model and the sequence.
        drops: layer -> share of the original visual tokens that is left from this layer on.
    """
    shares, share = [], 1.0
    for layer in range(shape.layers):
        share = drops.get(layer, share)
        shares.append(share)
    return thinned(shape, [share * shape.visual for share in shares])


def himix_rows(shape: Shape) -> Rows:
    """HiMix: text rows only are computed, image rows serve as keys and values in every layer.

    Source: Zhang et al., arXiv 2501.10318 (vision and language meet in the attention of every layer).
    """
    return thinned(shape, [0] * shape.layers, mode="freeze")


def hmgen_rows(shape: Shape, skipped: Sequence[int]) -> Rows:
    """HMGen: the ``skipped`` layers run without image rows, the others on every row.

    Source: arXiv 2606.01503, as this project's design describes the method (single layers in the middle of the depth,
    alternating with full ones).
    """
    return thinned(shape, [0 if layer in skipped else shape.visual for layer in range(shape.layers)])


def fastv(
    shape: Shape,
    *,
    rows_per_layer: Sequence[float],
    keys_per_layer: Sequence[float] | None = None,
    visual_per_layer: Sequence[float] | None = None,
) -> float:
    """FastV's count: ``4 n d^2 + 2 n^2 d + 2 n d m`` a layer, ``n`` the rows that the layer computes.

    The table of the paper prints the mean over layers: divide by ``shape.layers``. Rows that are keys only are not
    counted (the method has none), and the feed-forward part counts as two matrices, although LLaMA's has three.

    Args:
        shape: as in :class:`Formula`, and so the others.
        rows_per_layer: rows that each layer computes.
        keys_per_layer: not read.
        visual_per_layer: not read.

    Source: Chen et al., arXiv 2403.06764; the terms reproduce its Table 1.
    """
    rows = _layers(shape, rows_per_layer, keys_per_layer, visual_per_layer)
    return sum(_layer(shape, n, n, matrices=2) for n in rows.rows)


def pdrop(
    shape: Shape,
    *,
    rows_per_layer: Sequence[float],
    keys_per_layer: Sequence[float] | None = None,
    visual_per_layer: Sequence[float] | None = None,
) -> float:
    """PyramidDrop's count: ``4 n d^2 + 2 n^2 d + 3 n d m`` a layer, ``n`` the *visual* tokens that the layer computes.

    Text is not counted at all, and neither is what rows that are keys only cost.

    Args:
        shape: as in :class:`Formula`, and so the others.
        rows_per_layer: rows that each layer computes.
        keys_per_layer: not read.
        visual_per_layer: visual tokens among the rows.

    Source: Xing et al., arXiv 2410.17247; the terms reproduce its tables (its ablation over three and
    four stages among them).
    """
    rows = _layers(shape, rows_per_layer, keys_per_layer, visual_per_layer)
    return sum(_layer(shape, n, n, matrices=3) for n in rows.visual)


def himix(
    shape: Shape,
    *,
    rows_per_layer: Sequence[float],
    keys_per_layer: Sequence[float] | None = None,
    visual_per_layer: Sequence[float] | None = None,
) -> float:
    """A count for rows that are keys only: ``2 r d^2 + 2 k d^2 + 2 r k d + 2 r d m`` a layer, ``r`` rows and ``k`` keys.

    **Derived, not published.** The text of arXiv 2606.01503, section 5, was not available when this was written, so this
    is what the methods' definitions imply (:func:`himix_rows`, :func:`hmgen_rows`), in FastV's terms: the ``r`` rows that
    are computed take the query and the output projection and the feed-forward part, all ``k`` rows that are attended to
    take the key and the value projection, and each of the ``r`` attends to ``k``. It equals FastV's count where ``r = k``.
    HiMix's own complexity, ``O((N + M) M d) + O(8 M d^2)`` for ``M`` text and ``N`` image tokens, has the same attention
    term and leaves the projections of image rows out; here they count.

    Args:
        shape: as in :class:`Formula`, and so the others.
        rows_per_layer: rows that each layer computes.
        keys_per_layer: rows that serve as keys and values in each layer.
        visual_per_layer: not read.

    Source: derived as said; the methods are from arXiv 2501.10318 and arXiv 2606.01503.
    """
    rows = _layers(shape, rows_per_layer, keys_per_layer, visual_per_layer)
    return sum(_layer(shape, r, k, matrices=2) for r, k in zip(rows.rows, rows.keys, strict=True))


FORMULAS: Mapping[str, Formula] = MappingProxyType({"fastv": fastv, "pdrop": pdrop, "himix": himix})
"""The published formulas by name."""

NAMES = ("exact", *FORMULAS)
"""What a user may ask for; ``"exact"`` has no formula: it is counted from the graph."""


def _layer(shape: Shape, rows: float, keys: float, matrices: int) -> float:
    """One layer; its feed-forward part has ``matrices`` matrices of ``d`` by ``m``."""
    d, m = shape.hidden, shape.intermediate
    return 2 * rows * d**2 + 2 * keys * d**2 + 2 * rows * keys * d + matrices * rows * d * m


def _layers(shape: Shape, rows: Sequence[float], keys: Sequence[float] | None, visual: Sequence[float] | None) -> Rows:
    """The three, checked, with what was left out filled in."""
    keys = rows if keys is None else keys
    visual = [n - shape.text for n in rows] if visual is None else visual
    found = Rows(tuple(rows), tuple(keys), tuple(visual))
    for name, numbers in vars(found).items():
        if len(numbers) != shape.layers or min(numbers) < 0:
            raise PlanError(
                f"{name} of {shape.layers} layers cannot be {list(numbers)}", help="give one number >= 0 a layer"
            )
    for layer, (r, k, v) in enumerate(zip(found.rows, found.keys, found.visual, strict=True)):
        if k < r or v > r:
            raise PlanError(
                f"layer {layer}: {r} rows, {v} of them visual, and {k} keys",
                help="rows that are computed are keys as well, and visual ones are among them",
            )
    return found

"""Decisions as data: drop sites and plans, validated, with a JSON form that is the same byte for byte."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tokgraph.errors import PlanError
from tokgraph.files import parse_json, read_text, write_atomically

SCHEMA = 1
Mode = Literal["hide", "freeze"]
Projections = Literal["shared", "own"]
Ragged = Literal["min", "pad"]


@dataclass(frozen=True)
class DropSite:
    """Drop visual rows of one task in the blocks ``start .. end - 1``.

    Args:
        task: name of the task.
        start: first block of the span.
        end: the block after the span; ``None``: to the last block.
        keep: ratio of the task's visual tokens (their original number) that stay, in ``[0, 1]``.
        selector: which stay: ``"uniform"``, ``"random"``, ``"norm"`` (of the residual rows), ``"attention"`` (that the
            last prompt token pays them in the block before the span, mean over heads), ``"similarity"`` (least like
            the rows of largest norm), or a selector of the user's own (:func:`tokgraph.register_selector`).
        mode: ``"hide"``: dropped rows are invisible in the span; ``"freeze"``: they do not change there, but still
            serve as keys and values.
        restore: the dropped rows take their places again after the span; else they are gone for good.
        seed: seed of the ``"random"`` selector, which draws anew at every training step.
        projections: ``"shared"``: visual rows use the model's query, key and value projections; ``"own"``: in the span
            they get their own copies, new parameters of the task that start as the model's. Kept rows have them, and
            frozen ones, which still serve as keys and values.
        ragged: where samples hold different numbers of visual tokens, ``"min"``: every sample loses as many as the one
            with the fewest; ``"pad"``: each loses its own share, and rows that one sample drops and another keeps stay
            as padding, so that all samples stay equally long. Where all hold the same number, both are the same.

    Raises:
        PlanError: a field is out of range.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: str
    start: int
    end: int | None = None
    keep: float = 0.5
    selector: str = "uniform"
    mode: Mode = "hide"
    restore: bool = True
    seed: int = 0
    projections: Projections = "shared"
    ragged: Ragged = "min"

    def __post_init__(self) -> None:
        if not (isinstance(self.keep, (int, float)) and math.isfinite(self.keep) and 0.0 <= self.keep <= 1.0):
            raise PlanError(f"keep={self.keep} is outside [0, 1]", help="keep is the ratio of visual tokens that stay")
        object.__setattr__(self, "keep", self.keep + 0.0)  # 1, True and -0.0 are written as they are read
        if not 0 <= self.seed < 2**63:
            raise PlanError(f"seed={self.seed} is outside [0, 2**63)")
        if self.mode not in ("hide", "freeze"):
            raise PlanError(f"mode={self.mode!r} is not one of 'hide', 'freeze'")
        if self.projections not in ("shared", "own"):
            raise PlanError(f"projections={self.projections!r} is not one of 'shared', 'own'")
        if self.ragged not in ("min", "pad"):
            raise PlanError(f"ragged={self.ragged!r} is not one of 'min', 'pad'")
        if self.start < 0 or (self.end is not None and self.end <= self.start):
            raise PlanError(f"span [{self.start}, {self.end}) is empty or negative", help="give 0 <= start < end")

    def kept(self, visual: int) -> int:
        """How many of ``visual`` tokens stay: ``floor(keep * visual + 0.5)``."""
        return math.floor(self.keep * visual + 0.5)

    def resolved(self, blocks: int) -> DropSite:
        """The same site with ``end`` filled in.

        Raises:
            PlanError: the span leaves ``[0, blocks)``.
        """
        end = blocks if self.end is None else self.end
        if end > blocks or self.start >= blocks:
            raise PlanError(
                f"span [{self.start}, {end}) of task {self.task!r} is out of range: the task has {blocks} blocks",
                help=f"give 0 <= start < end <= {blocks}",
            )
        return replace(self, end=end)


@dataclass(frozen=True)
class Plan:
    """Drop sites, and whether work that no demanded output reads is removed as well.

    Args:
        sites: the drop sites; sites of one task must be nested or disjoint.
        exact: also remove work on rows that no demanded output reads (no approximation).
        policy: name of the policy that made the plan.
        options: the policy's options, for the record.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    sites: tuple[DropSite, ...] = ()
    exact: bool = False
    policy: str = "manual"
    options: dict[str, Any] = field(default_factory=dict)

    def for_task(self, task: str) -> tuple[DropSite, ...]:
        """The sites of ``task``, outer spans first."""
        mine = [site for site in self.sites if site.task == task]
        return tuple(sorted(mine, key=lambda s: (s.start, -(math.inf if s.end is None else s.end))))

    def to_json(self) -> str:
        """The plan file's text: keys sorted, the same for the same plan."""
        return json.dumps({"schema": SCHEMA, "kind": "tokgraph.plan", **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "plan") -> Plan:
        """Read a plan file's text.

        Raises:
            PlanError: not JSON, not a tokgraph plan, another schema version, or a field is missing or out of range.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(f"{origin} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.pop("kind", None) != "tokgraph.plan":
            raise PlanError(f"{origin} is not a tokgraph plan", help="plans are written by `tokgraph optimize -o OUT`")
        schema = data.pop("schema", None)
        if schema != SCHEMA:
            raise PlanError(f"{origin} has plan schema {schema!r}; this version reads schema {SCHEMA}")
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PlanError(f"{origin}: {where}: {first['msg']}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path``, whole or not at all."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: no such file, or not a valid plan.
        """
        try:
            text = read_text(Path(path))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read plan file {path}: {error}") from None
        return cls.from_json(text, origin=str(path))

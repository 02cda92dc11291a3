"""Figures of many cases: how many plans were accepted, refused for which reason, and what was found; runs add up in a file."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tokgraph as tg
from tokgraph.files import write_atomically

from .case import draw
from .judge import Broken, Verdict
from .run import verdicts

SCHEMA = 1
Outcome = tuple[int, list[Verdict] | str]
"""A seed, and one verdict a plan, or why its model does not run by itself."""


def outcome(seed: int) -> Outcome:
    """Judge the case of a seed."""
    torch.set_num_threads(1)
    try:
        return seed, verdicts(draw(seed))
    except Broken as error:
        return seed, str(error)


@dataclass
class Figures:
    """What was counted.

    Args:
        cases: decoders.
        plans: plans that were tried on them.
        accepted: plans that were accepted, and held to the oracle and to the loop by hand.
        refused: reason -> plans.
        examples: reason -> the first seed that was refused for it.
        broken: seed -> error of models that do not run by themselves.
        found: seed -> failures, one a plan.
        seeds: ``[first, last + 1]`` of the runs that went into this.
        runs: what was run, where.
    """

    cases: int = 0
    plans: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    found: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[list[int]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count a case."""
        seed, judged = outcome
        self.cases += 1
        self.cover(seed)
        if isinstance(judged, str):
            self.broken[str(seed)] = judged
            return
        for verdict in judged:
            self.plans += 1
            self.accepted += verdict.kind == "accepted"
            if verdict.kind == "refused":
                self.refused[verdict.reason] += 1
                self.examples.setdefault(verdict.reason, seed)
            elif verdict.failed:
                self.found.setdefault(str(seed), []).append(f"{verdict.kind} {verdict.reason}".strip())

    def cover(self, seed: int) -> None:
        """Remember that a seed was tried."""
        for span in self.seeds:
            if span[1] == seed:
                span[1] = seed + 1
                return
        self.seeds.append([seed, seed + 1])
        self.seeds.sort()

    def missing(self, first: int, count: int) -> Iterator[int]:
        """Those of the seeds that were not tried yet."""
        return (s for s in range(first, first + count) if not any(a <= s < b for a, b in self.seeds))

    def save(self, path: Path) -> None:
        """Write the figures, whole or not at all."""
        data = {"schema": SCHEMA, **vars(self), "refused": dict(self.refused.most_common())}
        write_atomically(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Figures:
        """Figures of earlier runs, none where there is no such file."""
        if not path.exists():
            return cls()
        data = json.loads(path.read_text())
        if data.pop("schema") != SCHEMA:
            raise SystemExit(f"{path} has figures of another schema; give another file")
        return cls(**{**data, "refused": Counter(data["refused"])})

    def shown_in(self, page: str) -> str:
        """A page with the figures between its marks."""
        before, begins, rest = page.partition("<!-- fuzz: begin -->\n")
        _, ends, after = rest.partition("<!-- fuzz: end -->")
        if not begins or not ends:
            raise SystemExit("the page has no marks <!-- fuzz: begin --> and <!-- fuzz: end -->")
        runs = [
            f"- {run['cases']} decoders at commit {run['commit'][:7]}, PyTorch {run['torch'].split('+')[0]}"
            for run in self.runs
            if run["cases"]
        ]
        spans = ", ".join(f"{first} to {last - 1}" for first, last in self.seeds)
        shown = "\n".join([f"Seeds {spans}:", "", *runs, "", self.table()])
        return f"{before}{begins}{shown}\n{ends}{after}"

    def table(self) -> str:
        """The figures in Markdown."""
        lines = [
            f"{self.cases} decoders, {self.plans} plans: {self.accepted} accepted, {sum(self.refused.values())} refused, "
            f"{sum(map(len, self.found.values()))} failures, {len(self.broken)} decoders that do not run by themselves.",
            "",
            "| plans | refused because |",
            "| --- | --- |",
            *(f"| {count} | {reason.replace('|', '/')} |" for reason, count in self.refused.most_common()),
        ]
        return "\n".join(lines)


def this_run() -> dict[str, Any]:
    """Commit and versions, for the record."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"tokgraph": tg.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"commit": commit, **versions, "machine": platform.machine()}

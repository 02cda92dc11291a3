"""The policies that drop no token: ``none``, a baseline, and ``exact``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import Plan

from .policy import Policy


@dataclass(frozen=True)
class NoDrop(Policy):
    """Drops nothing and removes nothing: the captured graphs, simplified."""

    name: ClassVar[str] = "none"

    def decide(self, facts: Facts) -> Plan:
        """The empty plan."""
        return Plan(policy=self.name)


@dataclass(frozen=True)
class Exact(Policy):
    """Drops no token; rows of the head and of the last block that no demanded output reads are not computed.

    Losses, outputs at demanded rows and all gradients stay as they are, beyond rounding.
    """

    name: ClassVar[str] = "exact"

    def decide(self, facts: Facts) -> Plan:
        """A plan without sites."""
        return Plan(exact=True, policy=self.name)

"""The policy that changes nothing: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..facts import Facts
from ..plan import Plan
from .base import Policy


@dataclass(frozen=True)
class NoDrop(Policy):
    """Drops nothing and removes nothing: the captured graphs as they are."""

    name: ClassVar[str] = "none"

    def plan(self, facts: Facts) -> Plan:
        """The empty plan."""
        return Plan(policy=self.name)

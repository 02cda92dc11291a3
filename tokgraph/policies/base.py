"""What a policy is, and the registry of policies by name."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

from ..errors import PlanError
from ..facts import Facts
from ..plan import Plan

_POLICIES: dict[str, type[Policy]] = {}


class Policy(abc.ABC):
    """Facts in, plan out. Subclasses are frozen dataclasses; their fields are their options.

    Class attributes:
        name: the policy's name on the command line.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if cls.name in _POLICIES and _POLICIES[cls.name].__qualname__ != cls.__qualname__:
            raise ValueError(f"policy {cls.name!r} is defined twice")
        _POLICIES[cls.name] = cls

    @abc.abstractmethod
    def plan(self, facts: Facts) -> Plan:
        """The plan for a model with these facts.

        Raises:
            PlanError: an option does not fit the model.
        """

    def options(self) -> dict[str, Any]:
        """The policy's options, as plain data for the plan's record."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


def policies() -> dict[str, type[Policy]]:
    """Policy name -> class, by name."""
    return dict(sorted(_POLICIES.items()))


def policy(name: str, **options: Any) -> Policy:
    """A policy by name.

    Raises:
        PlanError: no such policy, or it has no such option.
    """
    cls = _POLICIES.get(name)
    if cls is None:
        raise PlanError(f"no policy is named {name!r}", help=f"the policies are {', '.join(policies())}")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise PlanError(f"policy {name!r} has no option {unknown[0]!r}", help=f"its options are: {takes}")
    return cls(**options)

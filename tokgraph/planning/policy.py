"""What a policy is, and the registry of policies by name."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import DropSite, Plan

from .options import Kind, kind_of, options_of
from .placement import check_placed

GROUP = "tokgraph.policies"
"""Entry point group in which other packages declare policies."""
_POLICIES: dict[str, type[Policy]] = {}


Exactly = Annotated[bool, Field(description="also remove work that no demanded output reads")]
"""The option ``exact``, which most policies have."""


class Policy(abc.ABC):
    """Facts in, plan out. Subclasses are frozen dataclasses; their fields are their options (:mod:`.options`).

    Options are checked when a policy is made, and against the depth of the model when it plans.

    Class attributes:
        name: the policy's name on the command line.
        source: where it is published.
        thins: the kinds of tasks that get drop sites; ``None``: the plan tells.

    Raises:
        PlanError: an option is of another type, or outside of its range.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    name: ClassVar[str]
    source: ClassVar[str] = ""
    thins: ClassVar[tuple[Kind, ...] | None] = None

    def __init_subclass__(cls) -> None:
        if cls.name in _POLICIES and _POLICIES[cls.name].__qualname__ != cls.__qualname__:
            raise ValueError(f"policy {cls.name!r} is defined twice")
        _POLICIES[cls.name] = cls
        if "plan" in cls.__dict__:  # what a policy of the first version calls its plan is its decision
            cls.decide = cls.__dict__["plan"]  # type: ignore[method-assign]
            del cls.plan

    def __post_init__(self) -> None:
        for option in options_of(type(self)).values():
            object.__setattr__(self, option.name, option.checked(self.name, getattr(self, option.name)))

    def plan(self, facts: Facts) -> Plan:
        """The plan for a model with these facts.

        Raises:
            PlanError: an option does not fit the model, or the policy cannot plan for it.
        """
        check_placed(facts, [name for name, task in facts.items() if kind_of(task) in (self.thins or ())])
        for option in options_of(type(self)).values():
            option.check_depth(self.name, getattr(self, option.name), facts)
        return self.decide(facts)

    @abc.abstractmethod
    def decide(self, facts: Facts) -> Plan:
        """The plan, where every option is in its range.

        Raises:
            PlanError: the policy cannot plan for this model.
        """

    def made(self, sites: Iterable[DropSite], exact: bool) -> Plan:
        """A plan of these sites that records this policy and its options."""
        return Plan(tuple(sites), exact=exact, policy=self.name, options=self.options())

    def options(self) -> dict[str, Any]:
        """The policy's options, as plain data for the plan's record."""
        return {name: getattr(self, name) for name in options_of(type(self))}

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """What users are told of the policy, as plain data.

        Returns:
            ``{"summary", "source", "options": {name: JSON Schema}}``. Where a range depends on the number of blocks ``L``,
            its bounds stand under ``"x-blocks"``.
        """
        summary = " ".join((inspect.getdoc(cls) or cls.name).partition("\n\n")[0].split())
        options = {name: dict(option.schema) for name, option in options_of(cls).items()}
        return {"summary": summary, "source": cls.source, "options": options}


def policies() -> dict[str, type[Policy]]:
    """Policy name -> class, by name; those of installed packages (entry points of the group ``tokgraph.policies``) too."""
    _load_plugins()
    return dict(sorted(_POLICIES.items()))


@cache
def _load_plugins() -> None:
    """Import what other packages declare; defining a policy's class registers it.

    Raises:
        PlanError: an entry point cannot be loaded, or is no policy.
    """
    for point in entry_points(group=GROUP):
        try:
            loaded = point.load()
        except Exception as error:
            raise PlanError(
                f"policy plugin {point.name!r} ({point.value}) cannot be loaded: {type(error).__name__}: {error}",
                help="fix or uninstall the package that declares it",
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, Policy)):
            raise PlanError(
                f"policy plugin {point.name!r} ({point.value}) is no subclass of tokgraph.planning.Policy",
                help="let the entry point name the policy's class",
            )


def policy(name: str, **options: Any) -> Policy:
    """A policy by name.

    Raises:
        PlanError: no such policy, it has no such option, or an option's value is of another type or outside of its range.
    """
    cls = policies().get(name)
    if cls is None:
        raise PlanError(f"no policy is named {name!r}", help=f"the policies are {', '.join(policies())}")
    known = options_of(cls)
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise PlanError(f"policy {name!r} has no option {unknown[0]!r}", help=f"its options are: {takes}")
    return cls(**options)

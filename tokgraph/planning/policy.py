"""What a policy is, and the registry of policies by name."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts
from tokgraph.ir.plan import DropSite, Plan

GROUP = "tokgraph.policies"
"""Entry point group in which other packages declare policies."""
_POLICIES: dict[str, type[Policy]] = {}


def option(default: Any, allowed: str) -> Any:
    """A field of a policy that says which values it takes.

    Args:
        default: its default.
        allowed: the values, as a Python expression of the option's name and of ``L``, the number of blocks:
            ``"0 <= keep <= 1"``.
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed})


class Policy(abc.ABC):
    """Facts in, plan out. Subclasses are frozen dataclasses; their fields are their options (:func:`option` adds a range).

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

    def made(self, sites: Iterable[DropSite], exact: bool) -> Plan:
        """A plan of these sites that records this policy and its options."""
        return Plan(tuple(sites), exact=exact, policy=self.name, options=self.options())

    def options(self) -> dict[str, Any]:
        """The policy's options, as plain data for the plan's record."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


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
                f"policy plugin {point.name!r} ({point.value}) is no subclass of tokgraph.policies.Policy",
                help="let the entry point name the policy's class",
            )


def policy(name: str, **options: Any) -> Policy:
    """A policy by name.

    Raises:
        PlanError: no such policy, it has no such option, or an option's value is of another type.
    """
    cls = policies().get(name)
    if cls is None:
        raise PlanError(f"no policy is named {name!r}", help=f"the policies are {', '.join(policies())}")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise PlanError(f"policy {name!r} has no option {unknown[0]!r}", help=f"its options are: {takes}")
    hints = get_type_hints(cls)
    return cls(**{option: _typed(name, option, value, hints[option]) for option, value in options.items()})


def _typed(policy: str, option: str, value: Any, hint: Any) -> Any:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise PlanError(f"policy {policy!r}: option {option}={value!r}: {message}") from None

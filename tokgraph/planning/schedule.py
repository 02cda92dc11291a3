"""Which of several plans is in force at each step of a training run: phases, as plain data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from tokgraph.errors import PlanError

_SHARE = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<percent>%?)")
_HELP = "write phases as none:10%,shared,none:100: shares of the steps or steps, and one phase without for what is left"


@dataclass(frozen=True)
class Phase:
    """Some steps of a training run, one after the other, by one plan.

    Args:
        plan: name of the plan.
        start: its first step, from 0.
        stop: the step after its last one.
    """

    plan: str
    start: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """The phases of a training run; a plan may come back in a later phase.

    Args:
        phases: in order, from step 0, each beginning where the one before it stops.

    Raises:
        PlanError: there are none, or they leave steps out.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        at = 0
        for phase in self.phases:
            if phase.start != at or phase.stop <= at:
                raise PlanError(
                    f"phase {phase.plan!r} is from step {phase.start} to {phase.stop}; the one before it stops at {at}",
                    help="phases follow each other, and each has a step at least",
                )
            at = phase.stop
        if not self.phases:
            raise PlanError("a schedule has a phase at least", help=_HELP)

    @classmethod
    def parse(cls, text: str, steps: int) -> Schedule:
        """Read ``none:10%,shared,none:10%``.

        Args:
            text: ``PLAN:SHARE``, separated by commas. A share is per cent of the steps, or a number of steps; one phase may
                have none: it gets what is left.
            steps: of the whole run.

        Raises:
            PlanError: that is not how phases are written, they do not add up to the steps, or one has no step.
        """
        if not isinstance(steps, int) or steps < 1:
            raise PlanError(
                f"a run has a whole number of steps, 1 or more, and not {steps!r}", help="give all steps of the run"
            )
        written = [_parsed(part.strip(), steps) for part in text.split(",")]
        rest = steps - sum(share for _, share in written if share is not None)
        if [share for _, share in written].count(None) > 1:
            raise PlanError(f"several phases of {text!r} have no share", help=_HELP)
        if all(share is not None for _, share in written) and rest:
            raise PlanError(f"the phases {text!r} have {float(steps - rest):g} steps, the run has {steps}", help=_HELP)
        at, phases = Fraction(0), []
        for plan, share in written:
            start, at = at, at + (rest if share is None else share)
            if round(at) <= round(start):
                raise PlanError(f"phase {plan!r} of {text!r} has none of the {steps} steps", help=_HELP)
            phases.append(Phase(plan, round(start), round(at)))
        return cls(tuple(phases))

    @property
    def plans(self) -> tuple[str, ...]:
        """Names of the plans, each once, in the order in which they first come."""
        return tuple(dict.fromkeys(phase.plan for phase in self.phases))

    def at(self, step: int) -> str:
        """Name of the plan in force at a step, counted from 0; that of the last phase stays in force after it."""
        return next((phase.plan for phase in self.phases if step < phase.stop), self.phases[-1].plan)


def _parsed(part: str, steps: int) -> tuple[str, Fraction | None]:
    plan, colon, share = (x.strip() for x in part.partition(":"))
    found = _SHARE.fullmatch(share)
    if not plan or (colon and (found is None or ("." in found["number"] and not found["percent"]))):
        raise PlanError(f"{part!r} is no phase", help=_HELP)
    if found is None:
        return plan, None
    number = Fraction(found["number"])
    return plan, number * steps / 100 if found["percent"] else number

"""The smallest case that fails as a given one does, and a file of it that runs alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from pprint import pformat

from .case import OPTIONS, Case, PlanCase, Site, apart, sensible
from .judge import Broken, Verdict
from .run import verdicts
from .source import source

HERE = Path(__file__).parent
Judged = Callable[[Case], list[Verdict]]


def shrunk(case: Case, judged: Judged = verdicts) -> tuple[Case, Verdict]:
    """Greedily simpler, choice by choice, while the first failing plan fails in the same way.

    Args:
        case: fails.
        judged: one verdict a plan.
    """
    found = judged(case)
    number = next(i for i, verdict in enumerate(found) if verdict.failed)
    best, verdict = replace(case, plans=(case.plans[number],)), found[number]
    again = True
    while again:
        again = False
        for simpler in candidates(best):
            seen = outcome(simpler, judged)
            if seen is not None and alike(seen, verdict):
                best, verdict, again = simpler, seen, True
                break
    return best, verdict


def alike(a: Verdict, b: Verdict) -> bool:
    """Whether two failures are of one kind: numbers that differ are, wherever they show."""
    numbers = {"loss", "outputs", "gradients", "oracle"}
    return a.kind in numbers if b.kind in numbers else (a.kind, a.reason) == (b.kind, b.reason)


def outcome(case: Case, judged: Judged) -> Verdict | None:
    try:
        (verdict,) = judged(case)
    except Broken:
        return None
    return verdict


def candidates(case: Case) -> Iterator[Case]:
    """Simpler cases, those first that are simpler by much."""
    (plan,) = case.plans
    for i in range(len(plan.sites)):
        yield replace(case, plans=(replace(plan, sites=plan.sites[:i] + plan.sites[i + 1 :]),))
    for name in OPTIONS:
        options = OPTIONS[name]
        before = options.index(case.choices[name]) if case.choices[name] in options else len(options)
        for choice in options[:before]:
            choices = sensible({**case.choices, name: choice})
            if choices != case.choices and size(choices) < size(case.choices):
                yield replace(case, choices=choices, plans=(fitted(plan, choices["layers"]),))
    if plan.exact:
        yield replace(case, plans=(replace(plan, exact=False),))
    plain = Site(0, 1)
    for i, site in enumerate(plan.sites):
        ways = [{f: getattr(plain, f)} for f in ("keep", "selector", "mode", "restore", "seed", "start")]
        for change in [*ways, {"end": site.end - 1}]:
            new = replace(site, **change)
            others = plan.sites[:i] + plan.sites[i + 1 :]
            if new != site and new.start < new.end and all(apart(new, other) for other in others):
                yield replace(case, plans=(replace(plan, sites=(*plan.sites[:i], new, *plan.sites[i + 1 :])),))


def size(choices: dict[str, object]) -> tuple[int, ...]:
    """What gets smaller: how many choices are not the simplest, then how far they are from it."""
    far = [OPTIONS[name].index(choices[name]) if choices[name] in OPTIONS[name] else 1 for name in OPTIONS]
    return (sum(x != 0 for x in far), sum(far))


def fitted(plan: PlanCase, layers: int) -> PlanCase:
    """The plan, its spans cut to fewer layers."""
    sites = tuple(
        replace(s, start=min(s.start, layers - 1), end=layers if not s.restore else max(min(s.end, layers), min(s.start, layers - 1) + 1))
        for s in plan.sites
    )  # fmt: skip
    good = all(apart(a, b) for i, a in enumerate(sites) for b in sites[:i])
    return replace(plan, sites=sites if good else sites[:1])


def alone(case: Case, verdict: Verdict) -> str:
    """The text of a file that shows the failure with torch and tokgraph only."""
    (plan,) = case.plans
    parts = [without_imports(HERE / name) for name in ("hand.py", "judge.py")]
    chosen = {name: choice for name, choice in case.choices.items() if choice != OPTIONS[name][0]}
    told = "\n".join(f"# {line}" for line in verdict.detail.strip().splitlines()[-12:])
    loose = case.attention == "manual float32"
    text = [
        f"# {verdict.kind}: {verdict.reason}\n{told}\n# {chosen}\n# run: python THIS_FILE",
        "from __future__ import annotations\n",
        source(case),
        *parts,
        f"SITES = {pformat([asdict(s) for s in plan.sites], sort_dicts=False, width=110)}",
        'if __name__ == "__main__":',
        f"    print(judge(Subject(globals(), loose={loose}, dynamic={case.dynamic}), SITES, exact={plan.exact}))",
    ]
    return "\n\n".join(text) + "\n"


def without_imports(path: Path) -> str:
    """The text of a module but for what it takes from its neighbours, and ``__future__``."""
    text = path.read_text()
    return re.sub(r"^from (__future__|tests\.fuzz\S*) import .*\n", "", text, flags=re.MULTILINE)

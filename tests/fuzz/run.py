"""From a case to verdicts: its model file is written, run, and every plan of it judged."""

from __future__ import annotations

import linecache
from dataclasses import asdict
from typing import Any

from .case import Case
from .judge import Subject, Verdict, judge
from .source import source


def names_of(case: Case) -> dict[str, Any]:
    """What a case's model file defines; its lines are known to tracebacks."""
    text, file = source(case), f"<case {case.seed}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    names: dict[str, Any] = {"__name__": f"case_{case.seed}"}
    exec(compile(text, file, "exec"), names)
    return names


def verdicts(case: Case) -> list[Verdict]:
    """One a plan.

    Raises:
        Broken: the model does not run by itself.
    """
    subject = Subject(names_of(case), loose=case.attention == "manual float32", dynamic=case.dynamic)
    return [judge(subject, [asdict(site) for site in plan.sites], plan.exact) for plan in case.plans]

"""What a captured graph takes for granted of a call, as plain data for people and programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokgraph.ir.program import TaskGraph


def taken_for_granted(graph: TaskGraph) -> dict[str, Any]:
    """What is checked at each call beside the sizes of the inputs.

    Returns:
        ``guards``: relations between sizes, each with the line that branched on it, ``None`` where an operator needs it;
        ``constants``: plain attributes that the forward read, each with its value and the modules that have it, and inputs that
        are no tensors; ``modes``: how many modules' modes it read; ``numbers``: inputs that are Python numbers and stay open.
    """
    conditions, names = graph.conditions, dict(enumerate(graph.leaf_names().values()))
    return {
        "guards": [
            {"relation": conditions.readable(guard.relation, names), "source": guard.source}
            for guard in conditions.guards
        ],
        "constants": list(_constants(graph)),
        "modes": len(conditions.modes),
        "numbers": [names[leaf] for leaf in graph.numbers],
    }


def _constants(graph: TaskGraph) -> Iterator[dict[str, Any]]:
    """One entry for each name and value, with its modules in order."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, of_module in graph.conditions.constants.items():
        for name, x in of_module.items():
            found.setdefault((name, repr(x)), []).append(path)
    for (name, text), paths in found.items():
        yield {"name": name, "value": text, "modules": paths}

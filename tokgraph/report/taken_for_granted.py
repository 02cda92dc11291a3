"""What a captured graph takes for granted of a call, as plain data for people and programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokgraph.ir.conditions import object_at, shown
from tokgraph.ir.program import TaskGraph


def taken_for_granted(graph: TaskGraph, model: nn.Module) -> dict[str, Any]:
    """What is checked at each call beside the sizes of the inputs.

    Args:
        graph: a captured graph.
        model: the user's model.

    Returns:
        ``guards``: relations between sizes, each with the line that branched on it, ``None`` where an operator needs it;
        ``constants``: plain attributes that the forward read, each with its value, the modules that have it, and whether these
        are all PyTorch's own; ``modes``: how many modules' modes it read; ``numbers``: Python numbers
        that stay inputs.
    """
    conditions, names = graph.conditions, dict(enumerate(graph.leaf_names().values()))
    return {
        "guards": [
            {"relation": conditions.readable(guard.relation, names), "source": guard.source}
            for guard in conditions.guards
        ],
        "constants": list(_constants(graph, model)),
        "modes": len(conditions.modes),
        "numbers": [names[leaf] for leaf in graph.numbers],
    }


def _constants(graph: TaskGraph, model: nn.Module) -> Iterator[dict[str, Any]]:
    """One entry for each name and value, with its modules in order."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, of_module in graph.conditions.constants.items():
        for name, x in of_module.items():
            found.setdefault((name, shown(x)), []).append(path)
    for (name, text), paths in found.items():
        own = all(type(object_at(model, path)).__module__.startswith("torch.nn.") for path in paths)
        yield {"name": name, "value": text, "modules": paths, "of_torch": own}

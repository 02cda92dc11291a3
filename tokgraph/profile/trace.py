"""Profiles as a Chrome trace file, for chrome://tracing and Perfetto."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokgraph.files import write_atomically

from .events import RunProfile


def write_trace(path: Path, profiles: Mapping[str, Sequence[RunProfile]]) -> None:
    """Write the last run of each graph: a process a graph, a thread a phase, an event a node.

    Args:
        path: the file, JSON in the trace event format.
        profiles: label -> its runs.
    """
    events: list[dict[str, Any]] = []
    for process, (name, runs) in enumerate(profiles.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        threads: dict[str, int] = {}
        for event in runs[-1].events:
            place = event.place
            phase = place.phase if place else "unmapped"
            if phase not in threads:
                threads[phase] = len(threads)
                meta = {"ph": "M", "name": "thread_name", "pid": process, "tid": threads[phase]}
                events.append({**meta, "args": {"name": phase}})
            where = {} if place is None else {"module": place.module, "block": place.block, "node": place.node}
            events.append(
                {
                    "ph": "X",
                    "name": event.name,
                    "cat": place.kind if place else "unmapped",
                    "pid": process,
                    "tid": threads[phase],
                    "ts": event.start * 1e6,
                    "dur": event.seconds * 1e6,
                    "args": where,
                }
            )
    write_atomically(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

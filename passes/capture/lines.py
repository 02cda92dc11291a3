"""The lines of a model's code that make a node: ``torch.export`` records those in functions named ``forward`` only."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch.fx.proxy import TracerBase

from tokgraph.ir.frames import is_machinery

_FILTER = "_filter_traceback_frames"


@contextmanager
def whole_traces(below: str) -> Iterator[None]:
    """Let every node that is traced keep all frames of the model's code, outermost first, beside those that PyTorch records: a
    loop over layers may stand in any method. Where PyTorch has no such choice, nodes keep what it records.

    Args:
        below: the file of the ``forward`` that calls the model; who called that one is none of the model's code.
    """
    before = getattr(TracerBase, _FILTER, None)
    if before is None:
        yield
        return

    def filtered(self: TracerBase, frames: traceback.StackSummary) -> traceback.StackSummary:
        recorded = {id(frame) for frame in before(self, frames)}
        inside, found = False, []
        for frame in frames:
            inside = inside or (frame.name == "forward" and frame.filename == below)
            made_up = frame.filename.startswith("<")  # code without a file may be the model's as well
            if id(frame) in recorded or (inside and (made_up or not is_machinery(frame.filename))):
                found.append(frame)
        return traceback.StackSummary.from_list(found)

    setattr(TracerBase, _FILTER, filtered)
    try:
        yield
    finally:
        setattr(TracerBase, _FILTER, before)

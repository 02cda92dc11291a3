"""Masks over the token axis: the visual tokens, and the rows that the loss reads."""

from __future__ import annotations

import torch
from torch import fx

from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.node import by_name, rank

from ..emitter import Emitter

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


class Masks:
    """Emits the masks of one task, each when it is first asked for.

    Args:
        emit: where nodes go.
        facts: the task's facts.
    """

    def __init__(self, emit: Emitter, facts: TaskFacts) -> None:
        self._emit = emit
        self._facts = facts
        self._nodes = by_name(emit.graph)
        self.entry = self._nodes[facts.entry]
        self._visual: fx.Node | None = None

    @property
    def visual(self) -> fx.Node:
        """``[batch, tokens]`` bool: the visual tokens."""
        if self._visual is None:
            self._visual = self._make_visual()
        return self._visual

    @property
    def demanded(self) -> fx.Node:
        """``[batch, tokens]`` bool: the demanded rows."""
        return self._call(tokgraph.demand_mask.default, self.visual, self._facts.demand.reads)

    def _call(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self._emit.call(target, *args, origin=self.entry, **kwargs)

    def _make_visual(self) -> fx.Node:
        flow = self._facts.visual
        if flow.kind == "range":
            tokens = self._emit.size(self.entry, 1)
            offset = self._rows(flow.before)
            bounds = [tokens if b is None else self._bound(b, offset, tokens) for b in (flow.start, flow.stop)]
            return self._call(tokgraph.range_mask.default, self.entry, *bounds)
        assert flow.source is not None
        source = self._nodes[flow.source]
        if flow.kind == "ids":
            if flow.low == flow.high:
                return self._call(aten.eq.Scalar, source, flow.low)
            low, high = self._call(aten.ge.Scalar, source, flow.low), self._call(aten.le.Scalar, source, flow.high)
            return self._call(aten.logical_and.default, low, high)
        if rank(source) == 3:
            source = self._call(aten.squeeze.dim, source, -1)
        mask = self._call(aten._to_copy.default, source, dtype=torch.bool)
        beside = [
            self._rows(joined, more) for joined, more in zip((flow.before, flow.after), flow.padding, strict=True)
        ]
        before, after = ([self._no_rows(mask, rows)] if rows != 0 else [] for rows in beside)
        return self._call(aten.cat.default, [*before, mask, *after], 1) if before or after else mask

    def _rows(self, joined: tuple[tuple[str, int], ...], more: int = 0) -> fx.Node | int:
        """How many rows some values have together, and ``more``."""
        rows: fx.Node | int = more
        for name, axis in joined:
            rows = self._emit.add(rows, self._emit.size(self._nodes[name], axis), self.entry)
        return rows

    def _no_rows(self, mask: fx.Node, rows: fx.Node | int) -> fx.Node:
        return self._call(aten.new_zeros.default, mask, [self._emit.size(mask, 0), rows])

    def _bound(self, bound: int, offset: fx.Node | int, tokens: fx.Node | int) -> fx.Node | int:
        return self._emit.add(tokens if bound < 0 else offset, bound, self.entry)

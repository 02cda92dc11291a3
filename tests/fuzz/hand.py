"""Drops by hand: which rows the sites of a plan drop, in plain PyTorch, from what docs/policies.md says of them.

The loops of the fuzzer's models ask it what a row may see and which rows stay as they are. It knows nothing of tokgraph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Drops:
    """The sites of a plan at work in a loop over layers.

    Args:
        sites: their fields, as of ``tokgraph.DropSite``, with ``end`` filled in.
        visual: ``[batch, tokens]`` bool.
        reads: what the loss predicts: rows of this kind and those before them stay where a site does not restore.
        step: training steps before this one; random rows are others at each.
    """

    def __init__(self, sites: list[dict[str, Any]], visual: Tensor, reads: str, step: int = 0) -> None:
        self.step = step
        self.sites = sorted(sites, key=lambda site: (site["start"], -site["end"]))
        self.visual = visual
        read = {"text": ~visual, "visual": visual, "all": torch.ones_like(visual)}[reads]
        self.demanded = read | torch.cat([read[:, 1:], torch.zeros_like(read[:, :1])], 1)
        self.gone: dict[int, Tensor] = {}

    def enter(self, layer: int, x: Tensor | tuple[Tensor, ...], weights: Tensor | None = None) -> None:
        """Choose the rows of the sites that begin with a layer; ``x`` is the state before it, ``[batch, tokens, hidden]``."""
        stream = (torch.cat(x, -1) if isinstance(x, tuple) else x).detach()
        for number, site in enumerate(self.sites):
            if site["start"] == layer:
                self.gone[number] = self.chosen(site, self.frozen(layer), stream)

    def chosen(self, site: dict[str, Any], gone: Tensor, stream: Tensor) -> Tensor:
        """``[batch, tokens]`` bool: what a site drops of the visual rows that sites around it left."""
        left = [torch.nonzero(row).flatten().tolist() for row in self.visual & ~gone]
        free = [
            [i for i in rows if site["restore"] or not self.demanded[b, i]] for b, rows in enumerate(left)
        ]  # demanded rows stay for good where nothing is put back
        keep = math.floor(site["keep"] * int(self.visual[0].sum()) + 0.5)
        count = max(0, min(min(len(rows) for rows in left) - keep, *(len(rows) for rows in free)))
        result = torch.zeros_like(self.visual)
        for b, rows in enumerate(free):
            stay = len(rows) - count
            scores = self.scores(site, rows, b, stream[b])
            if scores is None:
                kept = {rows[j * len(rows) // stay] for j in range(stay)}
            else:
                order = sorted(range(len(rows)), key=lambda j: (-scores[j], j))
                kept = {rows[j] for j in order[:stay]}
            for i in rows:
                result[b, i] = i not in kept
        return result

    def scores(self, site: dict[str, Any], rows: list[int], sample: int, x: Tensor) -> list[float] | None:
        """Of each row; those of the highest stay. ``None``: evenly spaced ones do."""
        if site["selector"] == "norm":
            return [float(x[i].norm()) for i in rows]
        if site["selector"] == "random":
            drawn = sample * 0x9E3779B1 + site["seed"] * 0x85EBCA6B + self.step * 0xC2B2AE35
            return [float(mixed((drawn + j) % 2**32)) for j in range(len(rows))]
        return None

    def active(self, layer: int, hidden: bool) -> Tensor:
        result = torch.zeros_like(self.visual)
        for number, gone in self.gone.items():
            site = self.sites[number]
            inside = site["start"] <= layer < site["end"]
            lost = layer >= site["end"] and not site["restore"]
            if lost or (inside and (site["mode"] == "hide" or not hidden)):
                result = result | gone
        return result

    def frozen(self, layer: int) -> Tensor:
        """``[batch, tokens]`` bool: rows that stay as they are in a layer."""
        return self.active(layer, hidden=False)

    def seen(self, layer: int) -> Tensor:
        """``[batch, 1, tokens, keys]`` bool: rows that are hidden are no keys of rows that change."""
        hidden = self.active(layer, hidden=True)
        return (~hidden[:, None, None, :]) | self.frozen(layer)[:, None, :, None]

    def put_back(self, layer: int, before: Any, after: Any) -> Any:
        """The state after a layer in which dropped rows did not change."""
        if isinstance(after, tuple):
            return tuple(self.put_back(layer, a, b) for a, b in zip(before, after, strict=True))
        return torch.where(self.frozen(layer).unsqueeze(-1), before, after)

    def kept(self, layer: int, rows: Tensor) -> Tensor:
        """``[batch, tokens, n]`` -> ``[rows, n]``: those that take part in a layer."""
        return rows[~self.frozen(layer)]


def mixed(x: int) -> int:
    """A 32-bit hash."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)

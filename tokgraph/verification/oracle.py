"""The oracle: drop semantics by masked execution of the undropped graph. It never removes a row, and shares no code with
the rewriter: selections are made here in plain Python, one sample at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tokgraph.ir.blocks import Projection, Side
from tokgraph.ir.facts import TaskFacts
from tokgraph.ir.interpreter import GraphInterpreter
from tokgraph.ir.names import own_name
from tokgraph.ir.node import argument
from tokgraph.ir.plan import DropSite
from tokgraph.ir.program import TaskGraph
from tokgraph.planning.selectors import selectors

aten = torch.ops.aten
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Oracle(GraphInterpreter):
    """Runs a captured graph with the semantics of drop sites.

    Inside a span the residual rows of dropped positions do not change; where the site hides them, the other positions do
    not see them as attention keys.

    Args:
        graph: the captured, undropped graph.
        facts: its facts.
        sites: drop sites with their ends filled in.
        visual: ``[batch, tokens]`` bool, the visual tokens of the batch.
        tensors: as in :class:`GraphInterpreter`.
        constants: as in :class:`GraphInterpreter`.
        prompt: position of each sample's last prompt token, where a site selects by attention.
        step: training steps so far, which random choices depend on.
        own: name -> parameter, of those that sites with own projections add; one that is missing starts as the model's.
    """

    def __init__(
        self,
        graph: TaskGraph,
        facts: TaskFacts,
        sites: Sequence[DropSite],
        visual: torch.Tensor,
        tensors: Callable[[torch.Tensor], torch.Tensor],
        constants: Callable[[Any], Any],
        prompt: Sequence[int] | None = None,
        step: int = 0,
        own: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(graph.graph_module, tensors, constants)
        self._own = own or {}
        self._projections = {p.node: (block.index, p) for block in facts.blocks for p in block.projections}
        self._prompt = prompt
        self._step = step
        self._mass = torch.empty(0)
        self._facts = facts
        self._sites = sorted(sites, key=lambda s: (s.start, -(s.end or 0)))
        self._visual = visual
        self._dropped: dict[int, torch.Tensor] = {}
        self._ends = {b.end: (b.index, b.start) for b in facts.blocks}
        self._ends |= {s.end: (b.index, s.start) for b in facts.blocks for s in b.streams}
        self._befores = {block.index: block.before for block in facts.blocks}
        self._states = {name for block in facts.blocks for name in block.before}
        self._sides = {side.reader: (block.index, side) for block in facts.blocks for side in block.sides}
        self._attention = {a.node: (block.index, a.kind, a.batch) for block in facts.blocks for a in block.attention}
        self._state: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node; attention sees the visible keys only, and a block's end keeps its frozen rows."""
        if n.name in self._attention:
            result = self._attend(n, *self._attention[n.name])
        elif n.name in self._sides:
            result = self._aside(n, *self._sides[n.name])
        else:
            result = super().run_node(n)
        if n.name in self._projections:
            result = self._project(n, *self._projections[n.name], result)
        if n.name in self._ends:
            block, before = self._ends[n.name]
            gone = self._frozen(block)
            if gone.any():  # where none is, the block may give its rows another width
                result = torch.where(gone.reshape(*gone.shape, *[1] * (result.dim() - 2)), self._state[before], result)
        if n.name in self._states:
            self._state[n.name] = result
            for block in [b for b, names in self._befores.items() if all(name in self._state for name in names)]:
                self._enter(block, [self._state[name] for name in self._befores.pop(block)])
        return result

    def _aside(self, n: fx.Node, block: int, side: Side) -> Any:
        """A mean over rows of a block, or of several, one after the other: of those that are not dropped in it."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        gones = [self._frozen(number) for number in side.parts or (block,)]
        if not any(gone.any() for gone in gones):
            return self.call_function(n.target, args, kwargs)
        if isinstance(args[0], (list, tuple)):
            return _average(torch.cat([~gone.reshape(-1) for gone in gones]), *map(self._constants, args))
        x, over, keepdim = args[0], argument(n, "dim"), argument(n, "keepdim", False)
        over = list(range(x.dim())) if over is None else over
        shape = [1] * x.dim()
        if side.merged:
            shape[side.at] = x.shape[side.at]
        else:
            shape[side.at], shape[side.batch] = gones[0].shape[1], gones[0].shape[0]
        kept = ~torch.cat([gone.reshape(-1) for gone in gones]).reshape(shape).expand(x.shape)
        return torch.where(kept, x, 0).sum(over, keepdim) / kept.sum(over, keepdim)

    def _project(self, n: fx.Node, block: int, projection: Projection, result: torch.Tensor) -> torch.Tensor:
        """The projected rows, visual ones by their own parameters where a site gives them some."""
        mine = [s for s in self._sites if s.projections == "own" and s.start <= block < (s.end or 0)]
        unread = self._hidden(block) if projection.keys else self._frozen(block)
        if not mine or not (self._visual & ~unread).any():
            return result
        (x, *_), _ = self.fetch_args_kwargs_from_env(n)
        names = [name for name in (projection.weight, projection.bias) if name is not None]
        parameters = [self._own_parameter(mine[0].task, name).to(x.dtype) for name in names]
        return torch.where(self._visual.unsqueeze(-1), torch.nn.functional.linear(x, *parameters), result)

    def _own_parameter(self, task: str, name: str) -> torch.Tensor:
        own = own_name(task, name)
        if own not in self.attributes:
            self.attributes[own] = self._tensors(self._own[own] if own in self._own else self.fetch_tensor(name))
        found: torch.Tensor = self.attributes[own]
        return found

    def _enter(self, block: int, streams: Sequence[torch.Tensor]) -> None:
        """Choose the rows of the sites that begin with a block, when the state before it is known: all its streams."""
        for number, site in enumerate(self._sites):
            if site.start == block:
                gone, rows = self._frozen(block), torch.cat([x.detach().flatten(2) for x in streams], -1)
                self._dropped[number] = drop_mask(
                    site, self._visual, gone, self._demanded(), rows, self._mass, self._step
                )

    def _active(self, block: int) -> list[int]:
        reach = [(i, self._sites[i]) for i in self._dropped]
        return [i for i, s in reach if s.start <= block and (not s.restore or block < (s.end or 0))]

    def _frozen(self, block: int) -> torch.Tensor:
        """``[batch, tokens]``: positions whose residual row does not change in ``block``."""
        return self._union(self._active(block))

    def _hidden(self, block: int) -> torch.Tensor:
        """``[batch, tokens]``: positions that are no keys in ``block``."""
        sites = self._sites
        return self._union([i for i in self._active(block) if sites[i].mode == "hide" or block >= (sites[i].end or 0)])

    def _union(self, numbers: list[int]) -> torch.Tensor:
        gone = torch.zeros_like(self._visual)
        for number in numbers:
            gone = gone | self._dropped[number]
        return gone

    def _demanded(self) -> torch.Tensor:
        return demanded_rows(self._visual, self._facts.demand.reads)

    def _attend(self, n: fx.Node, block: int, kind: str, batch: int | None) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        hidden = self._hidden(block)
        if hidden.any():  # a row that changes does not see a hidden key; a frozen row's result is not used
            seen = _laid_out(~hidden.unsqueeze(1) | self._frozen(block).unsqueeze(2), args[0].dim(), batch or 0)
            if kind == "sdpa":
                args, kwargs = _mask_fused(args, kwargs, seen)
            else:
                args = (args[0].masked_fill(~seen, -math.inf), *args[1:])
        result = self.call_function(n.target, tuple(args), kwargs)
        if any(s.selector == "attention" and s.start == block + 1 for s in self._sites):
            self._mass = self._prompt_mass(result if kind == "eager" else _weights(args, kwargs))
        return result

    def _prompt_mass(self, weights: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens]``: what the last prompt token pays each key, the mean over heads."""
        assert self._prompt is not None
        return torch.stack([w.detach()[:, row].mean(0) for w, row in zip(weights, self._prompt, strict=True)])


def _average(
    kept: torch.Tensor,
    rows: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    bins: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The mean of all rows that are kept, with their weights; of rows that choose classes: how often each is chosen."""
    values, weight = torch.cat(tuple(rows)), torch.cat(tuple(weights)) if weights else torch.ones_like(kept)
    if bins is not None:
        values = torch.nn.functional.one_hot(values, bins).sum(-2).to(dtype)
    weight = torch.where(kept, weight, 0).to(values.dtype)
    shape = [-1, *[1] * (values.dim() - 1)]
    seen = torch.where(kept.reshape(shape), values, 0)
    return (seen * weight.reshape(shape)).sum(0) / weight.sum()


def _laid_out(seen: torch.Tensor, ndim: int, batch: int) -> torch.Tensor:
    """``[batch, tokens, keys]`` as scores of ``ndim`` dimensions lie whose samples are on another axis."""
    shape = [1] * (ndim - 2) + list(seen.shape[1:])
    shape[batch] = len(seen)
    return seen.reshape(shape)


def _weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The weights of a fused attention, by its definition, one query head after the other."""
    given = {**dict(zip(_SDPA_ARGUMENTS, args, strict=False)), **kwargs}
    query, key, mask, scale = given["query"], given["key"], given.get("attn_mask"), given.get("scale")
    group = query.shape[1] // key.shape[1]
    heads = [query[:, h] @ key[:, h // group].mT for h in range(query.shape[1])]
    scores = torch.stack(heads, 1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if given.get("is_causal", False):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1)


def _mask_fused(
    args: tuple[Any, ...], kwargs: dict[str, Any], seen: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = {**dict(zip(_SDPA_ARGUMENTS, args, strict=False)), **kwargs}
    mask = given.pop("attn_mask", None)
    if given.pop("is_causal", False):
        mask = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()
    if mask is None:
        mask = seen
    elif mask.dtype is torch.bool:
        mask = mask & seen
    else:
        mask = mask.masked_fill(~seen, -math.inf)
    return (given.pop("query"), given.pop("key"), given.pop("value"), mask), given


def demanded_rows(visual: torch.Tensor, reads: str) -> torch.Tensor:
    """``[batch, tokens]`` bool, by the definition: the row's token, or the token after it, is of the kind that is read."""
    result = torch.zeros_like(visual)
    for b, row in enumerate(visual.tolist()):
        for i, here in enumerate(row):
            kinds = {here, row[i + 1]} if i + 1 < len(row) else {here}
            result[b, i] = reads == "all" or (reads == "visual") in kinds
    return result


def drop_mask(
    site: DropSite,
    visual: torch.Tensor,
    gone: torch.Tensor,
    demanded: torch.Tensor,
    stream: torch.Tensor,
    mass: torch.Tensor | None = None,
    step: int = 0,
) -> torch.Tensor:
    """``[batch, tokens]`` bool: the positions that a site drops.

    Args:
        site: the drop site.
        visual: the visual tokens.
        gone: positions that enclosing sites dropped.
        demanded: the demanded rows, which stay when the site does not restore.
        stream: ``[batch, tokens, hidden]`` at the start of the span.
        mass: ``[batch, tokens]`` attention of the last prompt token in the block before.
        step: training steps so far.
    """
    result = torch.zeros_like(visual)
    samples = [[i for i, v in enumerate(row) if v] for row in visual.tolist()]
    alive = [[i for i in of_sample if not gone[b, i]] for b, of_sample in enumerate(samples)]
    frees = [[i for i in left if site.restore or not demanded[b, i]] for b, left in enumerate(alive)]
    kept = [math.floor(site.keep * len(of_sample) + 0.5) for of_sample in samples]
    drops = [max(0, min(len(a) - k, len(f))) for a, k, f in zip(alive, kept, frees, strict=True)]
    if site.ragged == "min":  # all samples lose as many as the one with the fewest
        drops = [max(0, min(min(map(len, alive)) - min(kept), *map(len, frees)))] * len(samples)
    for b, (free, drop) in enumerate(zip(frees, drops, strict=True)):
        paid = mass[b] if site.selector == "attention" and mass is not None else None
        stay = _stay(site, free, len(free) - drop, b, stream[b], paid, step)
        for i in free:
            result[b, i] = i not in stay
    return result


def _stay(
    site: DropSite,
    free: list[int],
    keep: int,
    sample: int,
    stream: torch.Tensor,
    mass: torch.Tensor | None,
    step: int,
) -> set[int]:
    if site.selector == "uniform":
        return {free[j * len(free) // keep] for j in range(keep)}
    if site.selector == "norm":
        norms = [float(stream[i].norm()) for i in free]
        return {free[j] for j in sorted(range(len(free)), key=lambda j: (-norms[j], j))[:keep]}
    if site.selector == "attention" and mass is not None:
        return set(sorted(free, key=lambda i: (-float(mass[i]), i))[:keep])
    if site.selector == "similarity":
        return set(sorted(free, key=lambda i: (_repeats(i, free, stream), i))[:keep])
    chosen = selectors().get(site.selector)
    if chosen is not None and chosen.score is not None:
        given = torch.arange(len(free)) if chosen.causal else stream[free].unsqueeze(0)
        found = chosen.score(given).reshape(len(free)).tolist()
        return {free[j] for j in sorted(range(len(free)), key=lambda j: (-found[j], j))[:keep]}
    scores = [_hash(sample, j, site.seed, step) for j in range(len(free))]
    return {free[j] for j in sorted(range(len(free)), key=lambda j: (-scores[j], j))[:keep]}


def _repeats(i: int, free: list[int], stream: torch.Tensor) -> float:
    """The largest cosine similarity of a row to one of the eight rows of largest norm, less than any for these."""
    pivots = sorted(free, key=lambda j: (-float(stream[j].norm()), j))[:8]
    if i in pivots:
        return -math.inf
    return max(float(torch.nn.functional.cosine_similarity(stream[i], stream[j], dim=0)) for j in pivots)


def _hash(sample: int, rank: int, seed: int, step: int) -> int:
    x = (sample * 0x9E3779B1 + rank + seed * 0x85EBCA6B + step % 2**30 * 0xC2B2AE35) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16

"""The graphs of one task: the one that was planned for, and those captured later for other modes, types and autocast."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tokgraph.errors import BatchError, StaleError
from tokgraph.ir.compilation import Compilation
from tokgraph.ir.conditions import Autocast
from tokgraph.ir.devices import captured_device
from tokgraph.ir.names import OWN, STEP
from tokgraph.ir.node import tensor
from tokgraph.ir.program import TIED, TaskGraph, cuda_devices, model_device, tied_names
from tokgraph.ir.tensors import held, hold, named_tensors, tensor_name
from tokgraph.passes.device import on_device

from .batch import compiled_check, misfit
from .compiled import Compiled
from .model import ModelCheck, held_as, tied_with
from .structure import Change

log = logging.getLogger(__name__)
_FOLLOWED = ("mode", "type")
"""Kinds of changes for which another capture of the same forward is what the user expects."""


class Variant:
    """One graph of a task, with the checks that tell whether it is the one to run.

    Args:
        model: the user's model.
        graph: the graph.
    """

    def __init__(self, model: nn.Module, graph: TaskGraph) -> None:
        self.graph = graph
        self.autocast = graph.conditions.autocast
        self.fits = compiled_check(graph.conditions)
        self.check = ModelCheck(model, graph)
        self._default = torch.get_default_dtype()
        self._compiled: Compiled | None = None
        self.device = model_device(graph.graph_module).type
        self.dtype = _dtype(graph)
        self._rest = ModelCheck(model, graph, tensors=False)

    def run(self, leaves: Sequence[Any], how: Compilation | None) -> Sequence[Any]:
        """The graph's outputs.

        Args:
            leaves: leaves of the call's inputs.
            how: how to compile the graph; ``None``: it runs operator by operator.
        """
        if how is None:
            return self.graph.graph_module(*leaves)  # type: ignore[no-any-return]
        return self.compiled(how)(leaves)

    def compiled(self, how: Compilation) -> Compiled:
        """The graph compiled, the same for each call."""
        if self._compiled is None or self._compiled.how != how:
            self._compiled = Compiled(self.graph, how)
        return self._compiled

    def region_holds(self) -> bool:
        """Whether the call is in the region of autocast that the graph was captured in."""
        return Autocast.active(self.device) == self.autocast

    def holds(self) -> bool:
        """Whether the model is what the graph takes for granted, and the call where it was captured for."""
        return self.region_holds() and torch.get_default_dtype() is self._default and self.check.holds()

    def holds_but_for_tensors(self) -> bool:
        """The same, whatever tensors the model has: for one who gives the graph those that are to be read."""
        return self.region_holds() and self._rest.holds()

    def rest_changes(self) -> list[Change]:
        """What :meth:`holds_but_for_tensors` finds in the model."""
        return self._rest.changes()

    def refuse(self, leaves: Sequence[Any]) -> BatchError | None:
        """What is wrong with a batch for this graph."""
        try:
            if self.fits(leaves):
                return None
        except (AttributeError, ValueError, TypeError):
            pass
        return misfit(self.graph, leaves)


class Variants:
    """Finds the graph of a task for each call.

    Args:
        model: the user's model.
        graph: the graph that the plan was made for.
        capture: makes the task's rewritten graph anew for the model as it is, a region of autocast and inputs like those of
            the call; ``None``: it cannot be made anew.
        captured: the graph before the rewrite, which follows the first.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: TaskGraph,
        capture: Callable[[Autocast | None, Sequence[Any]], TaskGraph] | None,
        captured: TaskGraph | None = None,
    ) -> None:
        self._model = model
        self._capture = capture
        self._captured_graph = captured
        self._all = [Variant(model, graph)]
        self._last = self._all[0]

    @property
    def first(self) -> Variant:
        """The variant that the plan was made for."""
        return self._all[0]

    def current(self, leaves: Sequence[Any]) -> Variant:
        """The variant for the model as it is.

        Args:
            leaves: leaves of the call's inputs, whose types the example batch gets where those of the model changed.

        Raises:
            StaleError: there is none, and there cannot be one.
        """
        if self._last.holds():
            return self._last
        for variant in self._all:
            if self._followed(variant) and variant.holds():
                return self._use(variant)
        first = self.first
        for change in sorted(_structural(first), key=partial(self._takes_its_place, first)):
            sharded = hasattr(change.now, "device_mesh")  # a DTensor, without importing what defines it
            raise StaleError(
                f"task {first.graph.name!r}: the model is {'sharded' if sharded else 'not the captured one'}: {change.text}",
                help="call the module that was sharded, made by accelerated.module() before"
                if sharded
                else "accelerated.refresh() captures it as it is now, with the same plan",
            )
        self._all.append(self._captured(leaves))
        return self._use(self._all[-1])

    def of_sharded(self, dtype: torch.dtype | None) -> Variant:
        """The variant for a model whose tensors are sharded, and were not when the graphs were captured.

        Args:
            dtype: the type of parameters in the forward; ``None``: that of the model.

        Raises:
            StaleError: there is none, and a sharded model is not captured.
        """
        for variant in self._all:
            if variant.dtype is (dtype or self.first.dtype) and variant.holds_but_for_tensors():
                return variant
        first = self.first
        found = [change.text for change in first.rest_changes()]
        if not first.region_holds():
            region = _named(Autocast.active(first.device))
            found.append(f"the call is in {region}, the capture was in {_named(first.autocast)}")
        raise StaleError(
            f"task {first.graph.name!r}: the model is sharded, and not the captured one: {'; '.join(found[:3])}",
            help="call module.prepare() in this mode and region before the module is sharded",
        )

    def share_added(self, other: Variants) -> None:
        """Hold what another plan added to the task under the names that this plan added as well: own projections, the step."""
        for variant in self._all:
            share_own(other.first.graph, variant.graph)

    def _use(self, variant: Variant) -> Variant:
        """Run a graph from now on: what the plan added to the model goes where the graph computes, as by ``model.to``."""
        self._last, first = variant, self.first.graph
        device = captured_device(variant.graph.graph_module)
        for name in _added(first):
            mine = held(first.graph_module, name)
            if mine is not None and device is not None and mine.device != device:
                moved = _moved(mine, device)
                for other in self._all:
                    hold(other.graph.graph_module, name, moved)
        return variant

    def _followed(self, variant: Variant) -> bool:
        """Let a graph hold tensors that took the places of those it holds; whether nothing of the structure changed."""
        changes = _structural(variant)
        if not changes or not all(self._takes_its_place(variant, change) for change in changes):
            return not changes
        modules = [variant.graph.graph_module]
        if variant is self.first and self._captured_graph is not None:
            modules.append(self._captured_graph.graph_module)
        for module in modules:
            for change in changes:
                if held(module, change.path) is not None:
                    hold(module, change.path, change.now)
            module.meta[TIED] = tied_names(self._model)
        variant.check.follow({change.path: change.now for change in changes})
        return True

    def _takes_its_place(self, variant: Variant, change: Change) -> bool:
        """Whether a change is another tensor of the same kind in the place of one that the graph holds.

        Where the graph holds one tensor for several names, all of them must have the new one.
        """
        mine, now = held_as(variant.graph, change.path), change.now
        if change.kind != "tensor" or mine is None or not isinstance(now, torch.Tensor) or type(now) is not type(mine):
            return False
        if (now.shape, now.dtype, now.device, now.layout) != (mine.shape, mine.dtype, mine.device, mine.layout):
            return False
        module, tensors = variant.graph.graph_module, named_tensors(self._model)
        alone = held(module, change.path) is not None
        together = (name for name in tied_with(variant.graph, change.path) if not alone or held(module, name) is None)
        return all(tensors.get(name, now) is now for name in together)

    def _captured(self, leaves: Sequence[Any]) -> Variant:
        first = self.first
        found = first.check.changes()
        changes = [change.text for change in found]
        device = model_device(self._model)
        region = Autocast.active(device.type)
        if region != first.autocast:
            changes.append(f"the call is in {_named(region)}, the capture was in {_named(first.autocast)}")
        why = "; ".join(changes[:3]) or "the default dtype of PyTorch changed"
        if self._capture is None and found and all(c.moved for c in found) and region == first.autocast:
            return Variant(self._model, _following(on_device(first.graph, device), self._model))
        if self._capture is None:
            raise StaleError(
                f"task {first.graph.name!r} cannot be captured for this call: {why}",
                help="a saved program, and one with passes of your own, has the graphs of one mode, type and region only",
            )
        log.info("task %s: captured once more, because %s", first.graph.name, why)
        with torch.random.fork_rng(cuda_devices(self._model)):  # as if nothing had run in between
            graph = self._capture(region, leaves)
        share_own(first.graph, graph)
        return Variant(self._model, graph)


def _dtype(graph: TaskGraph) -> torch.dtype | None:
    """The type that the first parameter of the graph had at capture."""
    named = graph.named_parameters()
    nodes = (node for node in graph.graph.find_nodes(op="get_attr") if tensor_name(node) in named)
    values = (tensor(node) for node in nodes if tensor_name(node).partition(".")[0] != OWN)
    return next((x.dtype for x in values if x is not None and x.is_floating_point()), None)


def _named(region: Autocast | None) -> str:
    return "no region of autocast" if region is None else f"autocast to {region.dtype} on {region.device}"


def _structural(variant: Variant) -> list[Change]:
    """Changes for which another capture would be of another model."""
    return [change for change in variant.check.changes() if change.kind not in _FOLLOWED]


def _following(graph: TaskGraph, model: nn.Module) -> TaskGraph:
    """The graph, holding the model's tensors as they are: some are replaced when a model is moved."""
    for name, x in named_tensors(model).items():
        if held(graph.graph_module, name) is not None:
            hold(graph.graph_module, name, x)
    return graph


def _added(graph: TaskGraph) -> tuple[str, ...]:
    """Names of the tensors that the plan added to the model's: own projections, the step."""
    return (*graph.own_parameters(), STEP)


def _moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, moved as modules move theirs: a parameter stays the same object where PyTorch can do that."""
    holder = nn.Module()
    if isinstance(x, nn.Parameter):
        holder.register_parameter("x", x)
    else:
        holder.register_buffer("x", x)
    holder.to(device)
    return next(iter(holder.state_dict(keep_vars=True).values()))  # type: ignore[no-any-return]


def share_own(graph: TaskGraph, other: TaskGraph) -> None:
    """Let another graph of the task hold the tensors that the plan added to this one: own projections, the step."""
    for name in _added(graph):
        mine, there = held(graph.graph_module, name), held(other.graph_module, name)
        if mine is not None and there is not None:
            hold(other.graph_module, name, mine)

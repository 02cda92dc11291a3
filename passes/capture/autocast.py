"""Capture inside ``torch.autocast``: the region of the capture, and one cast for all uses of a parameter, as eager has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tokgraph.ir.conditions import Autocast
from tokgraph.ir.facts import TaskFacts

from ..contract import GraphPass

aten = torch.ops.aten


@contextmanager
def in_autocast(region: Autocast | None, device: str) -> Iterator[None]:
    """Run in a region, or in none, whatever is active around.

    Casts are not cached in it: the cache would outlive a trace, with the trace's tensors in it.
    """
    with ExitStack() as regions:
        if region is not None:
            regions.enter_context(torch.autocast(region.device, region.dtype, cache_enabled=False))
        else:
            for kind in {device, "cpu"} - {"meta"}:
                regions.enter_context(torch.autocast(kind, enabled=False))
        yield


class CastsInside(TorchFunctionMode):
    """Casts what goes into operators that autocast casts only inside: a trace holds them whole, and would lose the cast.

    On CUDA the loss of classes is such an operator: the logarithm that it begins with runs in float32 there.

    Args:
        device: type of the device that is traced on.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = _CAST_INSIDE.get(func)
        if operator is not None and self._in_region() and not self._has_own_cast(operator):
            args, kwargs = pytree.tree_map_only(torch.Tensor, _in_float32, (args, kwargs))
        return func(*args, **kwargs)

    def _in_region(self) -> bool:
        return torch.amp.is_autocast_available(self._device) and torch.is_autocast_enabled(self._device)

    def _has_own_cast(self, operator: str) -> bool:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, f"Autocast{self._device.upper()}"))


_CAST_INSIDE: dict[Callable[..., Any], str] = {
    F.cross_entropy: "aten::cross_entropy_loss",
    F.nll_loss: "aten::nll_loss_nd",
    torch._C._nn.cross_entropy_loss: "aten::cross_entropy_loss",
    torch._C._nn.nll_loss_nd: "aten::nll_loss_nd",
}
"""Functions -> operators that are made of operators which autocast runs in float32."""


def _in_float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass(frozen=True)
class MergeParameterCasts(GraphPass):
    """Lets all uses of a parameter in one type read the same cast, as autocast's cache does: its gradient is then summed in
    that type.
    """

    name: ClassVar[str] = "merge-parameter-casts"

    def call(self, graph_module: fx.GraphModule, facts: TaskFacts | None) -> None:
        """Redirect the users of every further cast to the first."""
        first: dict[tuple[object, ...], fx.Node] = {}
        for node in list(graph_module.graph.nodes):
            if node.target is not aten._to_copy.default or node.args[0].op != "get_attr":
                continue
            key = (node.args[0].target, *sorted((name, str(x)) for name, x in node.kwargs.items()))
            kept = first.setdefault(key, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph_module.graph.erase_node(node)

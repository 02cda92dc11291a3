"""What FSDP2 does to modules and parameters, as far as calls must know of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def parameters_as(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let floating-point parameters of a model be of a type, as FSDP2 gives them to a forward; buffers stay."""
    tables = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    made: dict[int, nn.Parameter] = {}
    try:
        for table, before in tables:
            for name, p in before.items():
                if dtype is not None and p is not None and p.is_floating_point() and p.dtype is not dtype:
                    table[name] = made.setdefault(id(p), nn.Parameter(p.detach().to(dtype), p.requires_grad))
        yield
    finally:
        for table, before in tables:
            table.update(before)


@contextmanager
def views_allowed() -> Iterator[None]:
    """FSDP2 warns of parts that return views, which must not be written to: nothing here is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        yield


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # else nothing is sharded by it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)

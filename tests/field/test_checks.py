"""A model's own run-time checks stay checks under every policy, say what the model says, and hold no rows back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import gradients

check = torch.ops.tokgraph.check.default
POLICIES = ("none", "exact", "shared")


def spec_of(forward: Callable[..., Any], layers: int = 3, **options: Any) -> tg.ModelSpec:
    """Understanding of the tiny model with another forward."""
    spec = tiny.build(layers=layers, **options)
    return tg.ModelSpec(spec.model, {"understanding": replace(spec.tasks["understanding"], forward=forward)})


def counts(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    """As transformers does: the message tells the number of tokens."""
    features = model.patches(patches).flatten(0, 1)
    count = (ids == tiny.IMAGE_ID).sum()
    torch._check_tensor_all(count * features.shape[-1] == features.numel(), lambda: f"tokens: {count}, of {len(ids)}")
    return tiny.understand(model, ids, patches, labels)


def finite(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Any:
    """A check in every block, on the stream."""
    for layer in model.layers:
        layer.register_forward_hook(
            lambda module, args, result: torch._assert(torch.isfinite(result).all(), "not finite")
        )
    try:
        return tiny.understand(model, ids, patches, labels)
    finally:
        for layer in model.layers:
            layer._forward_hooks.clear()


def test_first() -> None:
    for policy in POLICIES:
        acc = tg.optimize(spec_of(counts), policy)
        inputs = dict(acc.program["understanding"].task.inputs)
        acc["understanding"](**inputs)
        ids = inputs["ids"].clone()
        ids[0, 2] = 12
        with pytest.raises(tg.BatchError) as e:
            acc["understanding"](**{**inputs, "ids": ids})
        print(policy, e.value)
    for policy in POLICIES:
        plain = tg.optimize(spec_of(tiny.understand), policy)
        acc = tg.optimize(spec_of(finite), policy)
        from tokgraph.passes.cost.flops import count_flops

        print(policy, count_flops(plain.program["understanding"]), count_flops(acc.program["understanding"]))
        for n in acc.program["understanding"].graph.nodes:
            if n.target is check:
                print(n.format_node(), n.args[0].args[0].meta["val"].shape)

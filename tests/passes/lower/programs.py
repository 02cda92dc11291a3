"""Programs that are lowered, their batches, and how a lowered graph is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import tokgraph as tg
from tests import tiny
from tokgraph.passes.lower import Lowered
from tokgraph.passes.lower.graph import lowered_place

U, G = "understanding", "generation"
TASKS = (U, G)
STEP = "tokgraph_step"
THINNED = tg.Plan((tg.DropSite(U, 1, 2, 0.5), tg.DropSite(G, 1, 2, 0.5)), exact=True)
RANDOM = tg.Plan((tg.DropSite(U, 0, 1, 0.5, "random", seed=5),), exact=True)
PLANS = {"captured": tg.Plan(), "thinned": THINNED}


def batch(task: str, rows: int, text: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of ``tests/tiny.py`` of any size: text, and six visual tokens in another place in each row."""
    generator = torch.Generator().manual_seed(rows + text)
    if task == G:
        ids = torch.randint(10, tiny.VOCABULARY, (rows, text), generator=generator)
        return {"ids": ids, "codes": torch.randint(0, tiny.CODES, (rows, tiny.IMAGE), generator=generator)}
    ids = torch.randint(10, tiny.VOCABULARY, (rows, text + tiny.IMAGE), generator=generator)
    for row in range(rows):
        ids[row, row % text : row % text + tiny.IMAGE] = tiny.IMAGE_ID
    patches = torch.rand(rows, tiny.IMAGE, 4, generator=generator, dtype=dtype)
    return {"ids": ids, "patches": patches, "labels": ids.masked_fill(ids == tiny.IMAGE_ID, -100)}


SIZES = [(2, 5), (3, 8)]
"""Rows and text tokens: those of the example batch, and others."""


def call(lowered: Lowered, inputs: Mapping[str, Tensor], **extra: Tensor) -> dict[str, Tensor]:
    """Run a lowered graph: output -> tensor."""
    given = {**lowered.initial, **inputs, **extra}
    outputs = lowered.module(*lowered.state.values(), *(given[name] for name in lowered.inputs))
    return dict(zip(lowered.outputs, outputs, strict=True))


def read(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> dict[str, Any]:
    loss, logits = tiny.understand(model, ids, patches, labels)
    best = logits.max(-1)
    return {"logits": logits, "loss": loss, "more": (best[0], {"best": best[1], "same": logits}), "about": [None, 7]}


def draw(model: tiny.Unified, ids: Tensor, codes: Tensor) -> tuple[Any, ...]:
    loss, logits = tiny.generate(model, ids, codes)
    return loss, [logits, (codes, "name")], loss


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-12, atol=1e-12, msg=name)


def places(lowered: Lowered) -> list[dict[str, Any]]:
    return [lowered_place(n) for n in lowered.module.graph.nodes if n.op == "call_function"]

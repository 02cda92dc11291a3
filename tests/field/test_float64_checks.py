"""Masks that a forward makes of integers, in PyTorch's default type: verification in float64 takes them along.

PyTorch's attention on the CPU is wrong without an error where queries are float64 and the mask is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests.field.models import VLM, Block, batch, seeded, spec, understanding
from tokgraph.ir.interpreter import GraphInterpreter, in_dtype

LOW = -1e4
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "a float minus integers": lambda seen: (1.0 - seen.long()) * LOW,
    "integers times a float": lambda seen: (~seen).long() * LOW,
    "a quotient of integers": lambda seen: (~seen).long() * int(LOW) / 1,
    "one of two floats": lambda seen: torch.where(seen, 0.0, LOW),
    "full, then filled": lambda seen: torch.full(seen.shape, LOW).masked_fill(seen, 0.0),
    "a logarithm of integers": lambda seen: seen.long().log().clamp(min=LOW),
}


class Masked(Block):
    mask: Callable[[Tensor], Tensor]

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = torch.arange(x.shape[1])[:, None] >= torch.arange(x.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=type(self).mask(seen))
        return self.o(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [next(iter(MASKS)), *(pytest.param(k, marks=pytest.mark.slow) for k in [*MASKS][1:])])
def test_masks_of_the_default_type(kind: str) -> None:
    masked = type("Masked", (Masked,), {"mask": staticmethod(MASKS[kind])})
    long = batch(before=20, after=10)  # the kernel that is wrong takes 16 rows at once
    program = tg.capture(spec(seeded(lambda: VLM(layers=1, block=masked)), inputs=long))
    graph = program["u"]
    exact = GraphInterpreter(graph.graph_module, *in_dtype(torch.float64, graph.graph_module))
    loss, *_ = exact.run(*graph.flatten(graph.example()))
    torch.testing.assert_close(loss, understanding(program.model, **long).double(), rtol=1e-5, atol=0)
    found = tg.verify(tg.apply(program, tg.make_plan(program, "exact")))
    assert found.dtype is torch.float64
    assert found.tasks["u"].output_error < 1e-9

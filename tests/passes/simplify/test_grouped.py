"""Heads that are repeated before attention: given once where no mask is, and left alone elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional as F

from tests.passes.tools import calls, traced
from tokgraph.ir.node import argument, entered, fake_mode
from tokgraph.passes.pipeline import Pipeline
from tokgraph.passes.simplify import GroupedHeads

SDPA = torch.ops.aten.scaled_dot_product_attention.default
Repeat = Callable[[Tensor], Tensor]


def side_by_side(x: Tensor) -> Tensor:
    """As transformers' ``repeat_kv``."""
    batch, heads, tokens, size = x.shape
    return x[:, :, None].expand(batch, heads, 3, tokens, size).reshape(batch, heads * 3, tokens, size)


def in_turns(x: Tensor) -> Tensor:
    batch, heads, tokens, size = x.shape
    return x[:, None].expand(batch, 3, heads, tokens, size).reshape(batch, heads * 3, tokens, size)


def attend(keys: Repeat, values: Repeat, masked: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = q.new_ones(q.shape[2], q.shape[2]).tril().bool() if masked else None
        found: Tensor = F.scaled_dot_product_attention(q, keys(k), values(v), mask, is_causal=not masked)
        return found

    return run


Q, K, V = torch.rand(2, 6, 5, 5), torch.rand(2, 2, 5, 5), torch.rand(2, 2, 5, 5)


def test_heads_are_given_once() -> None:
    before = traced(attend(side_by_side, side_by_side), Q, K, V)
    after = Pipeline([GroupedHeads()]).run_task(before)
    lines = [n.format_node() for n in after.graph.nodes if n.op == "call_function"]
    assert_expected_inline(
        "".join(f"{line}\n" for line in lines),
        """\
%scaled_dot_product_attention : [num_users=1] = call_function[target=torch.ops.aten.scaled_dot_product_attention.default](args = (%args_0, %args_1, %args_2, None, 0.0, True), kwargs = {enable_gqa: True})
""",
    )
    found = []
    for graph in (before, after):
        inputs = [x.double().requires_grad_() for x in (Q, K, V)]
        y = graph.graph_module(*inputs)[0]
        found.append((y.detach(), *torch.autograd.grad((y * y).sum(), inputs)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("keys", "values", "masked"),
    [
        (side_by_side, side_by_side, True),
        (in_turns, in_turns, False),
        (side_by_side, lambda x: side_by_side(x[..., :3]), False),
        (side_by_side, lambda x: x.repeat(1, 3, 1, 1), False),
        (lambda x: x.repeat_interleave(3, 1), side_by_side, False),
    ],
    ids=["masked", "in turns", "head sizes", "values repeated otherwise", "keys repeated otherwise"],
)
def test_others_are_left_alone(keys: Repeat, values: Repeat, masked: bool) -> None:
    graph = Pipeline([GroupedHeads()]).run_task(traced(attend(keys, values, masked), Q, K, V))
    assert not argument(calls(graph, SDPA)[0], "enable_gqa", False)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "once"),
    [
        ("cpu", torch.float32, 320, True),
        ("cuda", torch.bfloat16, 64, True),
        ("cuda", torch.bfloat16, 320, False),
        ("cuda", torch.float32, 64, False),
    ],
)
def test_only_where_a_fast_kernel_reads_them(device: str, dtype: torch.dtype, size: int, once: bool) -> None:
    q, k = (torch.zeros(1, heads, 4, size, dtype=dtype) for heads in (6, 2))
    graph = traced(attend(side_by_side, side_by_side), q, k, k)
    with entered(fake_mode(graph.graph)):  # a machine without a GPU has CUDA tensors without values
        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = torch.empty_like(node.meta["val"], device=device)
    after = Pipeline([GroupedHeads()]).run_task(graph)
    assert argument(calls(after, SDPA)[0], "enable_gqa", False) == once

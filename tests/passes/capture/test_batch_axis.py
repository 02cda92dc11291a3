"""Merged leading axes are kept apart where the rules show that it is the same, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.passes import models
from tests.passes.tools import Captured, assert_well_formed, calls, changes, traced
from tokgraph.ir.node import dims
from tokgraph.passes import Pipeline
from tokgraph.passes.capture.batch_axis import KeepBatchAxis
from tokgraph.passes.capture.normalize import SplitToSlices, ViewToReshape

aten = torch.ops.aten
B, S, H = 2, 3, 8


def plain(function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tg.TaskGraph:
    return Pipeline([SplitToSlices(), ViewToReshape()]).run_task(traced(function, *args))


def kept_apart(before: tg.TaskGraph) -> tg.TaskGraph:
    """The graph after the pass: the same values, a true ``modified``, nothing left for a second run."""
    after = Pipeline([KeepBatchAxis()]).run_task(before)
    assert_well_formed(after, before)
    inputs = before.flatten(before.example())
    for a, b in zip(after.graph_module(*inputs), before.graph_module(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert KeepBatchAxis()(before.copy().graph_module).modified == bool(changes(before, after))
    assert not KeepBatchAxis()(after.copy().graph_module).modified
    return after


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def per_head_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    y = x.reshape(-1, 4, 2)
    y = F.layer_norm(y, (2,)) * weight + bias
    return (y.reshape(x.shape[0], x.shape[1], 4, 2).transpose(1, 2),)


def test_norms_per_head() -> None:
    before = plain(per_head_norm, random(B, S, H), random(4, 2), random(4, 2))
    assert_expected_inline(
        changes(before, kept_apart(before)),
        """\
-%view = reshape(%args, [-1, 4, 2])  # float64[6, 4, 2]
-%layer_norm = layer_norm(%view, [2], None, None, 1e-05, False)  # float64[6, 4, 2]
-%mul = mul.Tensor(%layer_norm, %args.2)  # float64[6, 4, 2]
-%add = add.Tensor(%mul, %args.3)  # float64[6, 4, 2]
-%view.2 = reshape(%add, [2, 3, 4, 2])  # float64[2, 3, 4, 2]
-%transpose = transpose.int(%view.2, 1, 2)  # float64[2, 4, 3, 2]
+%reshape = reshape(%args, [2, 3, 4, 2])  # float64[2, 3, 4, 2] by keep-batch-axis
+%layer_norm.2 = layer_norm(%reshape, [2], None, None, 1e-05, False)  # float64[2, 3, 4, 2] by keep-batch-axis
+%mul_tensor = mul.Tensor(%layer_norm.2, %args.2)  # float64[2, 3, 4, 2] by keep-batch-axis
+%add_tensor = add.Tensor(%mul_tensor, %args.3)  # float64[2, 3, 4, 2] by keep-batch-axis
+%transpose = transpose.int(%add_tensor, 1, 2)  # float64[2, 4, 3, 2]
""",
    )


def heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], 4, -1).transpose(1, 2).reshape(x.shape[0] * 4, x.shape[1], -1)


def test_attention_over_merged_heads() -> None:
    """``bmm`` becomes ``matmul``; the mask is added between two more reshapes."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor]:
        scores = torch.bmm(heads(q), heads(k).transpose(1, 2)).reshape(B, 4, S, S) + mask
        weights = F.dropout(scores.reshape(B * 4, S, S).softmax(2), 0.0)
        return (torch.bmm(weights, heads(v)).reshape(B, 4, S, -1).transpose(1, 2).reshape(B, S, H),)

    before = plain(attend, *(random(B, S, H) for _ in range(3)), random(B, 1, S, S))
    after = kept_apart(before)
    assert not calls(after, aten.bmm.default)
    assert [dims(n) for n in calls(after, aten.matmul.default)] == [(B, 4, S, S), (B, 4, S, 2)]
    assert [dims(n) for n in calls(after, aten.softmax.int)] == [(B, 4, S, S)]


def test_a_residual_branch_over_merged_rows() -> None:
    def ffn(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor]:
        merged = x.reshape(-1, H)
        gate, value = F.linear(F.layer_norm(merged, (H,)), up).chunk(2, dim=1)
        value = torch.cat([value[:, 4:], value[:, :4]], 1)
        return ((merged + F.linear(F.silu(gate) * value, down)).reshape(x.shape),)

    after = kept_apart(plain(ffn, random(B, S, H), random(16, H), random(H, 8)))
    assert {len(dims(n)) for n in calls(after, aten.linear.default)} == {3}


def test_three_axes_and_a_trailing_reshape() -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        y = x.reshape(-1, 4, 6).unsqueeze(1).reshape(-1, 24).mean(-1, keepdim=True)
        return (y.expand(-1, 5).reshape(2, 3, 5, 5).sum(0) + y.exp().reshape(2, 3, 5, 1).sum(0),)

    after = kept_apart(plain(function, random(2, 3, 5, 4, 6)))
    assert [dims(n) for n in calls(after, aten.mean.dim)] == [(2, 3, 5, 1)]


def test_a_merged_value_with_another_reader_is_computed_once() -> None:
    def routed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x.reshape(-1, H), weight)
        return y.reshape(x.shape).exp(), y.softmax(-1).mean(0)

    before = plain(routed, random(B, S, H), random(H, H))
    assert_expected_inline(
        changes(before, kept_apart(before)),
        """\
-%view = reshape(%args, [-1, 8])  # float64[6, 8]
-%linear = linear(%view, %args.2)  # float64[6, 8]
-%view.2 = reshape(%linear, [2, 3, 8])  # float64[2, 3, 8]
-%exp = exp(%view.2)  # float64[2, 3, 8]
-%softmax = softmax.int(%linear, -1)  # float64[6, 8]
+%linear.2 = linear(%args, %args.2)  # float64[2, 3, 8] by keep-batch-axis
+%reshape = reshape(%linear.2, [-1, 8])  # float64[6, 8] by keep-batch-axis
+%exp = exp(%linear.2)  # float64[2, 3, 8]
+%softmax = softmax.int(%reshape, -1)  # float64[6, 8]
""",
    )


REFUSED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "never separated": lambda x, other: (x.reshape(-1, H).exp(),),
    "separated otherwise": lambda x, other: (x.reshape(-1, H).exp().reshape(S, B, H),),
    "a running sum": lambda x, other: (x.reshape(-1, H).cumsum(0).reshape(B, S, H),),
    "a reversal": lambda x, other: (x.reshape(-1, H).flip(0).reshape(B, S, H),),
    "another order": lambda x, other: (x.reshape(-1, H).sort(0).values.reshape(B, S, H),),
    "a mean over rows": lambda x, other: (x.reshape(-1, H).mean(0, keepdim=True).expand(B * S, H).reshape(B, S, H),),
    "a product over rows": lambda x, other: ((other @ x.reshape(-1, H)).reshape(B, S, H),),
    "an operand that is merged by itself": lambda x, other: ((x.reshape(-1, H) * other[:, :1]).reshape(B, S, H),),
    "a slice of rows": lambda x, other: (torch.cat([x.reshape(-1, H)[1:], x[0, :1]]).reshape(B, S, H),),
    "a memory format": lambda x, other: (
        x.reshape(-1, 2, 2, 2).clone(memory_format=torch.channels_last).reshape(B, S, H),
    ),
    "fused attention of a rank without kernels": lambda x, other: (
        F.scaled_dot_product_attention(*[x.reshape(-1, 2, 2, 2)] * 3).reshape(B, S, H),
    ),
    "a transposed row axis": lambda x, other: (x.reshape(-1, H).t().contiguous().reshape(B, S, H),),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_leaves_alone(name: str) -> None:
    before = plain(REFUSED[name], random(B, S, H), random(B * S, B * S))
    assert changes(before, kept_apart(before)) == ""


def test_equal_sizes() -> None:
    """Row-major order makes the reshapes inverse, whatever the sizes are."""

    def function(x: Tensor, scale: Tensor) -> tuple[Tensor]:
        y = x.transpose(0, 1).reshape(-1, 4) * scale
        return (y.reshape(4, 4, 4).transpose(0, 1).reshape(-1, 4).softmax(1).reshape(4, 4, 2, 2),)

    after = kept_apart(plain(function, random(4, 4, 4), random(4)))
    assert all(dims(n)[0] == 4 for n in after.graph.nodes if n.op == "call_function")


class MergedNorm(models.PreNorm):
    """Rows of batch and tokens are normalised together, and the FFN works on them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x.reshape(-1, x.shape[-1])).reshape(x.shape))
        merged = x.reshape(-1, x.shape[-1])
        return (merged + self.mlp(self.norm2(merged))).reshape(x.shape)


class MergedHeads(models.PreNorm):
    """Two heads, merged with the batch for ``bmm``."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        h, attention = self.norm1(x), self.attention
        q, k, v = (
            project(h).reshape(batch, tokens, 2, -1).transpose(1, 2).reshape(batch * 2, tokens, -1)
            for project in (attention.q, attention.k, attention.v)
        )
        scores = torch.bmm(q, k.transpose(1, 2)).reshape(batch, 2, tokens, tokens)
        scores = scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), float("-inf"))
        weights = scores.reshape(batch * 2, tokens, tokens).softmax(-1)
        rows = torch.bmm(weights, v).reshape(batch, 2, tokens, -1).transpose(1, 2).reshape(batch, tokens, hidden)
        x = x + attention.o(rows)
        return x + self.mlp(self.norm2(x))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [pytest.param(True, id="dynamic"), pytest.param(False, id="static")])
@pytest.mark.parametrize("block", [MergedNorm, MergedHeads])
def test_rows_can_be_dropped_in_a_block_that_merges_them(block: type[nn.Module], dynamic: bool) -> None:
    spec = models.spec(block)
    task = replace(spec.tasks["t"], dynamic={"ids": {0: "batch", 1: "tokens"}} if dynamic else None)
    found = Captured.of(tg.ModelSpec(spec.model, {"t": task}), "t")
    assert [len(block.attention) for block in found.facts.blocks] == [1, 1]
    accelerated = found.apply(tg.DropSite("t", 0, 1, 0.34), exact=True)
    tg.verify(found.program, accelerated).raise_if_failed()


@pytest.mark.parametrize("weighed", [False, True])
def test_heads_that_are_merged_with_samples(weighed: bool) -> None:
    """As ``nn.MultiheadAttention`` does: ``[tokens, batch, hidden]`` to ``[tokens, batch * heads, head]``."""

    def attend(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        q = x.reshape(S, B * 4, 2).transpose(0, 1)
        if weighed:
            rows = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q).transpose(0, 1).reshape(S * B, H)
        else:
            q = q.reshape(B, 4, S, 2)
            rows = F.scaled_dot_product_attention(q, q, q).permute(2, 0, 1, 3).reshape(S * B, H)
        return (F.linear(rows, weight).reshape(S, B, H),)

    found = kept_apart(plain(attend, random(S, B, H), random(H, H)))
    merged = {(S, B * 4), (B * 4, S), (S * B, H)}
    assert not [n.name for n in found.graph.nodes if n.op == "call_function" and dims(n)[:2] in merged]

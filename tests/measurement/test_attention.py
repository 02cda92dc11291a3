"""Attention allocation: against the plain formula, and within its memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness import Captured
from tests.measurement.allocations import CLOSE, assert_sums_to_one, expected, of
from tests.measurement.models import (
    HEADS,
    IMAGE_ID,
    allocation_by_hand,
    batch,
    captured,
    causal,
    declaring,
    weights_by_hand,
)
from tokgraph.errors import AnalysisError, SpecError
from tokgraph.ir.node import where
from tokgraph.measurement import attention_allocation, find_segments
from tokgraph.measurement.attention import MAX_BYTES, AllocationMeter
from tokgraph.measurement.observe import Call, Watched
from tokgraph.measurement.pieces import regions

aten = torch.ops.aten


# ------------------------------------------------------------------ ways to write attention

SPAN = torch.arange(32)
FUTURE = (SPAN.unsqueeze(0) > SPAN.unsqueeze(1)).double() * -1e30


def cut(bias: Tensor, q: Tensor) -> Tensor:
    return bias[..., : q.shape[-2], : q.shape[-2]].to(q)


def prefix(q: Tensor) -> Tensor:
    """An asymmetric mask: causal, but everyone sees the first four tokens, and nobody but itself the sixth."""
    n = q.shape[-2]
    row, column = torch.arange(n).unsqueeze(1), torch.arange(n)
    return ((column <= row) | (column < 4)) & ((column != 5) | (row == 5))


def with_prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=prefix(q))


SLOPES = (0.5 ** torch.arange(1.0, HEADS + 1)).view(HEADS, 1, 1)
DISTANCE = (SPAN.unsqueeze(0) - SPAN.unsqueeze(1)).double()


def bias_by_head(q: Tensor) -> Tensor:
    """A float mask that differs from head to head: ALiBi, and causal."""
    return cut(SLOPES * DISTANCE + FUTURE, q)


def with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_by_head(q))


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def undirected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + cut(FUTURE, q)
    return F.dropout(scores.softmax(-1), 0.5, training=True) @ v


def eager_in_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two key heads serve two query heads each, as ``[batch, key heads, group, tokens, width]``."""
    q = q.unflatten(1, (2, -1))
    scores = q @ k.unsqueeze(2).transpose(-1, -2) / math.sqrt(q.shape[-1]) + cut(FUTURE, q)
    return (scores.softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)


def no_bias(q: Tensor) -> float:
    return 0.0


def masked(q: Tensor) -> Tensor:
    return cut(FUTURE, q)


WAYS = {
    "causal": (causal, HEADS, masked, {}),
    "asymmetric mask": (with_prefix, HEADS, lambda q: torch.zeros(12, 12).double().masked_fill(~prefix(q), -1e30), {}),
    "bias by head": (with_bias, HEADS, bias_by_head, {}),
    "scale": (scaled, HEADS, masked, {"scale": 0.3}),
    "grouped heads": (grouped, 2, masked, {}),
    "no mask": (undirected, HEADS, no_bias, {}),
    "dropout in the operator": (dropping, HEADS, masked, {}),
    "eager with dropout": (eager, HEADS, masked, {}),
    "eager in groups": (eager_in_groups, 2, masked, {}),
}
ALIKE = ("bias by head", "scale", "dropout in the operator", "eager with dropout")  # one argument more than another way


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way in ALIKE else way for way in WAYS])
def test_the_formula(way: str) -> None:
    attend, key_heads, bias, options = WAYS[way]
    found = captured(attend, key_heads=key_heads)
    allocation = of(found)
    ids = found.spec.tasks["t"].inputs["ids"]
    weights = without_dropout(found, ids, way, bias(torch.zeros(12, 1).double()), options)
    torch.testing.assert_close(allocation.mass, expected(found, "t", weights, allocation), rtol=0, atol=1e-12)
    assert allocation.queries == ("system", "image", "instruction", "output")
    assert allocation.keys == (*allocation.queries, "other")
    assert allocation.rows == (3, 10, 3, 6)
    assert_sums_to_one(allocation)


def without_dropout(found: Captured, ids: Tensor, way: str, bias: Any, options: dict[str, float]) -> list[Tensor]:
    """The weights of the model with the dropout of its attentions taken out, for they are of the layers' inputs."""
    plain: Callable[..., Tensor] = causal if "dropout" in way else WAYS[way][0]
    attended = [layer.attend for layer in found.model.layers]
    try:
        for layer in found.model.layers:
            layer.attend = plain
        return weights_by_hand(found.model, ids, bias, **options)
    finally:
        for layer, before in zip(found.model.layers, attended, strict=True):
            layer.attend = before


# ------------------------------------------------------------------ rows without keys


def left_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first two tokens are hidden from everyone, themselves included."""
    n = q.shape[-2]
    row, column = torch.arange(n).unsqueeze(1), torch.arange(n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(column <= row) & (column >= 2))


def test_rows_that_see_no_key_are_not_averaged() -> None:
    """They give zero in the operator; the system text of the first sample is such a row, two of the second are."""
    allocation = of(captured(left_padded))
    assert allocation.queries == ("system", "image", "instruction", "output")
    assert allocation.mass[:, :, 0].isnan().all()
    torch.testing.assert_close(allocation.mass[:, :, 1:].sum(-1), torch.ones(2, HEADS, 3).double(), **CLOSE)


# ------------------------------------------------------------------ segments and batches


def test_query_segments_are_chosen() -> None:
    found = captured()
    whole, part = of(found), of(found, queries=("output", "other"))
    assert part.queries == ("output", "other")
    assert part.rows == (6, 2)
    torch.testing.assert_close(part.mass[:, :, 0], whole.mass[:, :, 3])
    assert_sums_to_one(part)
    torch.testing.assert_close(part.between("output", "image"), whole.mass[:, :, 3, 1].mean(1))
    with pytest.raises(KeyError, match="'image' is not among the measured segments output, other"):
        part.between("image", "output")
    with pytest.raises(SpecError, match="no segment is named 'answer'"):
        of(found, queries=("answer",))


def test_a_segment_without_rows_is_nan(digits_example: Captured) -> None:
    """A generation task has no output text."""
    found = of(digits_example, "generation", queries=("image", "output"))
    assert found.rows == (64, 0)
    assert found.mass[:, :, 1].isnan().all()
    assert found.mass.shape == (4, 4, 2, 5)
    alone = of(digits_example, "generation", queries=("output",))
    assert alone.mass.shape == (4, 4, 1, 5)
    assert alone.mass.isnan().all()


def thirds(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    at = torch.arange(ids.shape[1]).expand_as(ids)
    return {"head": at < 4, "tail": at >= 8}


def test_declared_segments() -> None:
    found = captured()
    allocation = attention_allocation(declaring(found, thirds), found.facts["t"])
    ids = found.spec.tasks["t"].inputs["ids"]
    weights = weights_by_hand(found.model, ids, cut(FUTURE, torch.zeros(12, 1).double()))
    parts = thirds(ids, ids)
    keys = [parts["head"], parts["tail"], ~(parts["head"] | parts["tail"])]
    assert (allocation.queries, allocation.keys) == (("head", "tail"), ("head", "tail", "other"))
    torch.testing.assert_close(allocation.mass, allocation_by_hand(weights, keys[:2], keys), rtol=0, atol=1e-12)


def test_segments_keep_their_names_from_batch_to_batch() -> None:
    found = captured()
    by_size = declaring(found, lambda ids, labels: {f"of {len(ids)}": ids == IMAGE_ID})
    with pytest.raises(SpecError, match="of one batch are of 2, other, of another of 3, other"):
        attention_allocation(by_size, found.facts["t"], [batch(2), batch(3)])


def test_batches_of_other_sizes_add_up() -> None:
    """Weighted by query rows, so the parts of a batch give what the batch gives."""
    found = captured()
    whole = batch(7, tokens=15)
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 2), slice(2, 7))]
    one, two = of(found, "t", whole), of(found, "t", *parts)
    torch.testing.assert_close(one.mass, two.mass, rtol=0, atol=1e-12)
    assert one.rows == two.rows
    ids = whole["ids"]
    weights = weights_by_hand(found.model, ids, cut(FUTURE, torch.zeros(15, 1).double()))
    torch.testing.assert_close(one.mass, expected(found, "t", weights, one, whole), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_half_precision() -> None:
    """Scores and sums are made in float32; the model's own rounding stays."""
    exact, half = of(captured()), of(captured(dtype=torch.bfloat16))
    assert_sums_to_one(half)
    torch.testing.assert_close(half.mass, exact.mass, rtol=0, atol=0.1)
    assert_sums_to_one(of(captured(eager, dtype=torch.bfloat16)))
    torch.testing.assert_close(
        of(captured(dtype=torch.bfloat16), dtype=torch.float64).mass, exact.mass, rtol=0, atol=0.1
    )


# ------------------------------------------------------------------ memory


MAKES_WEIGHTS = (torch.ops.aten.bmm, torch.ops.aten._softmax, torch.ops.aten._safe_softmax, torch.ops.aten._to_copy)


class Weights(TorchDispatchMode):
    """Notes the bytes of attention weights: what some operators give in the shape ``[..., rows, tokens]``.

    Args:
        tokens: number of tokens, which is no other size.
        more: operators that make some as well.
    """

    def __init__(self, tokens: int, *more: Any) -> None:
        super().__init__()
        self.makers = (*MAKES_WEIGHTS, *more)
        self.tokens, self.largest, self.together = tokens, 0, 0
        self.live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        wide = isinstance(out, Tensor) and out.dim() > 2 and out.shape[-1] == self.tokens and out.is_floating_point()
        if func.overloadpacket in self.makers and wide:
            storage = out.untyped_storage()
            self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
            self.live[StorageWeakRef(storage)] = storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
            self.together = max(self.together, sum(self.live.values()))
        return out


@pytest.mark.parametrize("max_bytes", [2 * 8 * 61, 1000, 5000, 100_000, MAX_BYTES])
def test_no_more_weights_than_allowed(max_bytes: int) -> None:
    """Scores and softmax together; one row of one head is the least."""
    found, given = captured(), batch(3, tokens=61)
    with Weights(61) as seen:
        allocation = of(found, "t", given, max_bytes=max_bytes)
    assert seen.together == 2 * seen.largest
    assert min(max_bytes, 2 * 8 * 61 * HEADS * 50) / 3 < seen.together <= max_bytes  # nor are chunks needlessly small
    torch.testing.assert_close(allocation.mass, of(found, "t", given).mass, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("attend", [eager, eager_in_groups], ids=["eager", "in groups"])
@pytest.mark.parametrize("rows", [1, 31])
def test_no_more_weights_than_allowed_where_the_model_makes_them(attend: Callable[..., Tensor], rows: int) -> None:
    """Attention that is not fused runs some rows at a time, of all samples and heads: two values at once, and two copies."""
    found = captured(attend, key_heads=HEADS if attend is eager else 2)
    given, one_row = batch(3, tokens=31), 4 * 8 * 31 * HEADS * 3
    with Weights(31, aten.matmul, aten.add, aten.div, aten.index) as seen:
        allocation = of(found, "t", given, max_bytes=rows * one_row)
    assert rows * one_row / 2 < seen.together <= rows * one_row
    torch.testing.assert_close(allocation.mass, of(found, "t", given).mass, rtol=0, atol=1e-12)
    ids = given["ids"]
    weights = without_dropout(
        found,
        ids,
        "eager in groups" if attend is eager_in_groups else "eager with dropout",
        cut(FUTURE, torch.zeros(31, 1)),
        {},
    )
    torch.testing.assert_close(allocation.mass, expected(found, "t", weights, allocation, given), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_limit_that_holds_no_row_of_the_model() -> None:
    with pytest.raises(SpecError, match="does not hold one row of the attention at 'softmax' in all samples and heads"):
        of(captured(eager), max_bytes=1000)


def reshaped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and query rows are one axis for a while."""
    scores = (q @ k.transpose(-1, -2)).flatten(1, 2) / math.sqrt(q.shape[-1])
    return (scores.unflatten(1, (HEADS, -1)) + cut(FUTURE, q)).softmax(-1) @ v


@pytest.mark.slow
def test_scores_that_are_reshaped_are_made_whole() -> None:
    found = captured(reshaped)
    assert not regions(found.program["t"], found.facts["t"])
    torch.testing.assert_close(of(found).mass, of(captured(eager)).mass, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_limit_counts_the_bytes_of_the_type() -> None:
    """Half precision is widened to float32."""
    found, given = captured(dtype=torch.bfloat16), batch(3, tokens=61)
    with Weights(61) as seen:
        of(found, "t", given, max_bytes=4000)
    assert 2000 < seen.together <= 4000


def test_a_limit_that_holds_no_row() -> None:
    with pytest.raises(SpecError, match="max_bytes=100 does not hold one row of attention weights .192 bytes"):
        of(captured(), max_bytes=100)


def test_heads_and_losses_are_not_run(digits_example: Captured) -> None:
    class Widest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.most += isinstance(out, Tensor) and out.shape[-1:] == (87,)
            return out

    graph = digits_example.program["generation"]
    with Widest() as whole, torch.no_grad():
        graph.graph_module(*graph.flatten(graph.example()))
    with Widest() as measured:
        of(digits_example, "generation")
    assert whole.most > 0
    assert measured.most == 0


# ------------------------------------------------------------------ refusals


def test_attention_that_merges_batch_and_heads_is_refused() -> None:
    """Which sample a row is of cannot be told."""
    found = captured()
    graph, facts = found.program["t"], found.facts["t"]
    segments = find_segments(graph, facts)
    meter = AllocationMeter(graph, facts)
    meter.begin(Watched(segments["image"], segments))
    node = next(n for n in graph.graph.nodes if n.name == facts.blocks[0].attention[0].node)
    merged = torch.rand(2 * HEADS, 12, 4)
    with pytest.raises(AnalysisError, match="batch and head axes are apart") as caught:
        meter.see(Call(node, (merged, merged, merged), {}, merged))
    assert caught.value.where == where(node)

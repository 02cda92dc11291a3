"""tokgraph's operators: registration, gradients, decompositions, batch checks, and the selection rules by definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokgraph as tg
from tests.harness import random_hash
from tokgraph import ops

quick = settings(deadline=None, max_examples=60, derandomize=True)
TOKGRAPH = torch.ops.tokgraph


def index(*samples: list[int]) -> Tensor:
    return torch.tensor(samples, dtype=torch.int64).reshape(len(samples), -1)


def numbers(*shape: int, grad: bool = False) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return found.requires_grad_(grad)


NOTHING = torch.empty(2, 0, dtype=torch.int64)
MASK = torch.tensor([[True, False, True, False, True], [False, True, True, True, False]])
SAMPLES: dict[Any, list[tuple[Any, ...]]] = {
    TOKGRAPH.select.default: [
        (numbers(2, 5, 3, grad=True), index([0, 2], [1, 4]), 1, 0),
        (numbers(2, 4, 5, 5, grad=True), index([0, 2, 3], [1, 2, 4]), 3, 0),  # a mask's keys; sizes coincide
        (numbers(5, 2, grad=True), index([3], [0]), 0, 1),
        (numbers(5, 2, 3, grad=True), index([0, 2], [1, 4]), 0, 1),
        (numbers(2, 5, 3, grad=True), NOTHING, 1, 0),
        (MASK, index([0, 2], [1, 4]), 1, 0),
    ],
    TOKGRAPH.drop.default: [
        (numbers(2, 5, 3, grad=True), index([0, 2], [1, 4])),
        (numbers(1, 3, 3, grad=True), index([0, 1, 2])),
        (numbers(2, 5, 3, grad=True), NOTHING),
    ],
    TOKGRAPH.restore.default: [
        (numbers(2, 5, 3, grad=True), numbers(2, 2, 3, grad=True), index([0, 2], [1, 4])),
        (numbers(1, 3, 3, grad=True), numbers(1, 3, 3, grad=True), index([0, 1, 2])),
        (numbers(2, 5, 3, grad=True), numbers(2, 0, 3, grad=True), NOTHING),
    ],
    TOKGRAPH.merge.default: [
        (numbers(2, 3, 3, grad=True), numbers(2, 2, 3, grad=True), index([0, 2], [1, 4])),
        (numbers(1, 0, 3, grad=True), numbers(1, 3, 3, grad=True), index([0, 1, 2])),
        (numbers(2, 5, 3, grad=True), numbers(2, 0, 3, grad=True), NOTHING),
    ],
    TOKGRAPH.select_range.default: [
        (numbers(2, 5, 3, grad=True), index([1, 2], [1, 2]), 1, 0, 1),
        (numbers(2, 4, 5, 5, grad=True), index([2, 3, 4]), 3, 0, 2),
        (numbers(2, 5, 3, grad=True), NOTHING, 1, 0, 5),
        (MASK, index([0, 1]), 1, 0, 0),
    ],
    TOKGRAPH.restore_range.default: [
        (numbers(2, 5, 3, grad=True), numbers(2, 2, 3, grad=True), index([1, 2], [1, 2]), 1),
        (numbers(1, 3, 3, grad=True), numbers(1, 3, 3, grad=True), index([0, 1, 2]), 0),
        (numbers(2, 5, 3, grad=True), numbers(2, 0, 3, grad=True), NOTHING, 5),
    ],
    TOKGRAPH.merge_range.default: [
        (numbers(2, 3, 3, grad=True), numbers(2, 2, 3, grad=True), index([1, 2], [1, 2]), 1),
        (numbers(1, 0, 3, grad=True), numbers(1, 3, 3, grad=True), index([0, 1, 2]), 0),
        (numbers(2, 5, 3, grad=True), numbers(2, 2, 3, grad=True), index([5, 6]), 5),
    ],
    TOKGRAPH.join.default: [
        (numbers(2, 2, 3, grad=True), numbers(2, 1, 3, grad=True), index([0, 2, 1], [1, 2, 0])),
        (numbers(1, 0, 3, grad=True), numbers(1, 2, 3, grad=True), index([0, 1])),
    ],
    TOKGRAPH.range_mask.default: [(numbers(2, 5, 3), 1, 3), (numbers(2, 5), 0, 5), (numbers(1, 4), 2, 2)],
    TOKGRAPH.demand_mask.default: [(MASK, "text"), (MASK, "visual"), (MASK[:1, :1], "text")],
    TOKGRAPH.rows.default: [(MASK, 3, True), (MASK, 4, False), (~MASK, 2, True), (MASK & False, 0, True)],
    TOKGRAPH.ragged_rows.default: [(MASK, 3, 1), (MASK, 4, 0), (~MASK, 2, 2), (MASK & False, 2, 0)],
    TOKGRAPH.ranks.default: [(MASK,), (MASK & False,), (~MASK,)],
    TOKGRAPH.spread_score.default: [
        *((MASK, torch.tensor([drop])) for drop in (0, 1, 3)),
        (MASK, torch.tensor([2, 1])),
        (MASK & False, torch.tensor([0])),
    ],
    TOKGRAPH.drop_counts.default: [
        (MASK, MASK, MASK & False, MASK, 0.5, 1),
        (MASK, MASK[:, 1:], ~MASK[:, 1:] & MASK[:, 1:], MASK[:, 1:], 0.0, 0),
        (MASK, MASK, MASK, MASK & False, 0.3, 2),
    ],
    TOKGRAPH.lost_rows.default: [
        (index([1, 3, 4], [0, 2, 3]), numbers(2, 3), torch.tensor([2, 0]), 6),
        (index([1, 3, 4], [0, 2, 3]), index([7, 7, 9], [1, 0, 0]), torch.tensor([1, 3]), 5),
        (NOTHING, torch.empty(2, 0), torch.tensor([0, 0]), 4),
    ],
    TOKGRAPH.range_rows.default: [(MASK, 1, 4), (numbers(1, 6, 2), 0, 6), (MASK, 2, 2)],
    TOKGRAPH.keep_rows.default: [
        (index([1, 3, 4], [0, 2, 3]), numbers(2, 3), 2, 6),
        (index([1, 3, 4], [0, 2, 3]), index([7, 7, 9], [1, 0, 0]), 0, 5),
        (index([1, 3, 4], [0, 2, 3]), numbers(2, 3), 3, 5),
        (NOTHING, torch.empty(2, 0), 0, 4),
    ],
    TOKGRAPH.uniform_score.default: [(index([1, 3, 4], [0, 2, 3]), 2), (index([1, 3]), 0), (NOTHING, 0)],
    TOKGRAPH.random_score.default: [
        (index([1, 3, 4], [0, 2, 3]), 5),
        (index([1, 3]), 0),
        (NOTHING, 1),
        (index([1, 3, 4], [0, 2, 3]), 5, torch.tensor(7)),
    ],
    TOKGRAPH.prompt_mask.default: [
        (index([-100, 4, 5, -100], [6, -100, -100, 7]), numbers(2, 4, 3), -100, 0),
        (index([-100, -100], [-100, 2]), numbers(2, 4), -100, 2),
    ],
    TOKGRAPH.prompt_mass.default: [(numbers(2, 3, 1, 4).softmax(-1), torch.tensor([[True, False] * 2] * 2))],
    TOKGRAPH.prompt_attention.default: [
        (numbers(2, 4, 1, 3), numbers(2, 4, 5, 3), None, None),
        (numbers(2, 4, 1, 3), numbers(2, 2, 5, 3), numbers(2, 1, 1, 5) > 0.1, 0.5),
        (numbers(1, 2, 3, 3), numbers(1, 2, 5, 3), numbers(3, 5), None),
    ],
    TOKGRAPH.similarity_score.default: [(numbers(2, 5, 3), 2), (numbers(1, 2, 3), 8)],
    TOKGRAPH.select_targets.default: [
        (index([-100, 4, 5, -100], [6, -100, -100, 7]), index([1, 2], [0, 3]), -100),
        (index([3, 1]), index([0, 1]), 2),
    ],
    TOKGRAPH.check_unread.default: [
        (numbers(2, 5, grad=True), MASK | True, "sum_1", "aten.sum.default", "", "model.py:3"),
        (
            torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
            torch.tensor(True),
            "mean",
            "aten.mean.dim",
            "head",
            "",
        ),
    ],
    TOKGRAPH.grouped_mm.default: [
        (numbers(2, 3, 4, grad=True), numbers(5, 4, 6, grad=True), index([0, 4, 0], [2, 4, 0])),
        (numbers(3, 4), numbers(1, 4, 2), torch.tensor([0, 0, 0])),
    ],
    TOKGRAPH.grouped_mm_weight.default: [(numbers(2, 3, 4), numbers(2, 3, 6), index([0, 4, 0], [2, 4, 0]), 5)],
    TOKGRAPH.routed.default: [(index([1, 0]).bool().unsqueeze(-1), numbers(1, 2, 3), -numbers(1, 2, 3))],
    TOKGRAPH.mean_of_rows.default: [
        ([numbers(3, 4, grad=True), numbers(2, 4, grad=True)], []),
        ([numbers(3, 4, 2, grad=True)], [numbers(3, grad=True)]),
        ([numbers(3, grad=True), numbers(1)], [torch.tensor([1.0, 0.0, 1.0]), torch.ones(1)]),
    ],
    TOKGRAPH.class_shares.default: [
        ([index([1, 3, 3], [0, 2, 1]), index([3, 3, 0])], [], 4, torch.float64),
        ([index([1, 3, 3], [0, 2, 1])], [torch.tensor([0.5, 2.0])], 4, torch.float32),
    ],
    TOKGRAPH.softmax_beside.default: [
        (numbers(2, 3, 5, grad=True), numbers(3, 2, grad=True)),
        (numbers(2, 3, 5, grad=True), numbers(1, 1, 1)),
    ],
    TOKGRAPH.check.default: [
        (MASK | True, "all true", "model.py:1", "layers.0", [], []),
        (torch.tensor(True), "⟦v0:.1f⟧ of ⟦s0:⟧", "", "", [torch.tensor(0.5)], [3]),
        (torch.ones(0, dtype=torch.bool), "of none", "", "", [], []),
    ],
}
CALLS = [
    pytest.param(op, args, id=f"{op._opname}-{i}") for op, calls in SAMPLES.items() for i, args in enumerate(calls)
]

MOVES = (*ops.moving.LOWERED, *ops.ranges.LOWERED, TOKGRAPH.check_unread.default)


def test_every_operator_is_sampled_and_decomposed():
    registered = {f"tokgraph::{op._opname}" for op in SAMPLES}
    assert registered == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tokgraph::")}
    assert ops.decompositions().keys() == SAMPLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("op", "args"), CALLS)
def test_registration(op, args):
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_decomposition_agrees(op, args):
    expected = op(*args)
    found = ops.decompositions()[op](*args)
    assert found is None if expected is None else torch.equal(found, expected)


@pytest.mark.parametrize(("op", "args"), [c for c in CALLS if c.values[0] in MOVES])
def test_gradients(op, args):
    if args[0].is_floating_point():
        assert torch.autograd.gradcheck(op, args)


def test_the_prompt_ends_where_the_labels_begin():
    """Row ``i`` of the labels says what follows position ``i + first``; a sample without labels ends at its last row."""
    labels = index([-100, -100, 4, 5], [-100, 6, -100, 7], [-100, -100, -100, -100])
    like = torch.zeros(3, 6)
    assert ops.prompt_mask(labels, like, -100, 0).nonzero().tolist() == [[0, 2], [1, 1], [2, 3]]
    assert ops.prompt_mask(labels, like, -100, 2).nonzero().tolist() == [[0, 4], [1, 3], [2, 5]]


def test_prompt_attention_is_what_fused_attention_weighs_by():
    query, key, mask = numbers(2, 4, 3, 8), numbers(2, 2, 5, 8), torch.ones(3, 5, dtype=torch.bool).tril(2)
    weights = ops.prompt_attention(query, key, mask, None)
    value = torch.eye(5).expand(2, 2, 5, 5)  # the weighted sum of unit vectors is the weights
    fused = F.scaled_dot_product_attention(query, key, value.to(query.dtype), mask, enable_gqa=True)
    torch.testing.assert_close(weights, fused)


def test_similarity_keeps_pivots_and_what_is_unlike_them():
    rows = torch.tensor([[[3.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]]])
    score = ops.similarity_score(rows, 1)[0]
    assert score.argsort(descending=True).tolist() == [0, 2, 3, 1]
    assert score[0] == torch.inf


def test_random_scores_change_with_the_step():
    candidates = index(range(32), range(32))
    scores = [ops.random_score(candidates, 3, torch.tensor(step)) for step in (0, 1, 2**30)]
    assert torch.equal(scores[0], ops.random_score(candidates, 3))
    assert (scores[0] != scores[1]).float().mean() > 0.9
    assert torch.equal(scores[0], scores[2])  # steps count modulo 2**30, so that the hash cannot overflow


def test_select_takes_and_restore_puts_back_rows_sample_by_sample():
    x = torch.arange(10.0).view(2, 5, 1)
    at = index([0, 2], [1, 4])
    assert ops.drop(x, at).flatten().tolist() == [0, 2, 6, 9]
    assert ops.select(x.mT, at, 2, 0).flatten().tolist() == [0, 2, 6, 9]
    assert ops.select(x.transpose(0, 1), at, 0, 1).flatten().tolist() == [0, 6, 2, 9]
    assert ops.restore(x, -ops.drop(x, at), at).flatten().tolist() == [-0.0, 1, -2, 3, 4, 5, -6, 7, 8, -9]


def test_merge_fills_the_gaps_in_order():
    others, rows = torch.arange(6.0).view(2, 3, 1), -torch.arange(1.0, 5.0).view(2, 2, 1)
    merged = ops.merge(others, rows, index([0, 2], [1, 4]))
    assert merged.flatten().tolist() == [-1, 0, -2, 1, 2, 3, -3, 4, 5, -4]


@pytest.mark.parametrize(("start", "count"), [(0, 2), (1, 2), (3, 2), (0, 5)])
def test_a_range_is_moved_as_any_index_is(start, count):
    x, rows, at = numbers(2, 5, 3), -numbers(2, count, 3), torch.arange(start, start + count).unsqueeze(0)
    others = numbers(2, 5 - count, 3)
    assert torch.equal(TOKGRAPH.select_range(x, at, 1, 0, start), ops.select(x, at, 1, 0))
    assert torch.equal(TOKGRAPH.restore_range(x, rows, at, start), ops.restore(x, rows, at))
    assert torch.equal(TOKGRAPH.merge_range(others, rows, at, start), ops.merge(others, rows, at.expand(2, -1)))


def test_rows_are_joined_in_the_order_that_a_selection_of_the_merged_ones_has():
    others, rows, at = numbers(2, 3, 4), -numbers(2, 2, 4), index([0, 2], [1, 4])
    order = torch.cat([index([1, 3, 4], [0, 2, 3]), at], 1)
    assert torch.equal(TOKGRAPH.join(others, rows, order), ops.select(ops.merge(others, rows, at), order, 1, 0))


def test_operators_export_and_decompose():
    class Thin(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            at = ops.rows(mask, 3, True)
            return ops.restore(x, ops.drop(x, at) * 2, at)

    args = (numbers(2, 5, 3), MASK)
    exported = torch.export.export(Thin(), args, strict=False).run_decompositions(ops.decompositions())
    assert not [n for n in exported.graph.nodes if "tokgraph" in str(n.target)]
    torch.testing.assert_close(exported.module()(*args), Thin()(*args), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rows(MASK, 2, True), "another number of"),
        (lambda: ops.rows(MASK & torch.tensor([[True], [False]]), 3, True), "another number of"),
        (lambda: ops.rows(MASK, 2, False), "more"),
        (lambda: ops.select_targets(index([1, 2, -100]), index([0, 2]), -100), "reads a position"),
        (lambda: ops.check_unread(numbers(3), MASK, "sum_1", "aten.sum.default", "head", ""), "reads a position"),
    ],
    ids=["too many", "a sample has fewer", "more than the width", "a label outside the index", "a row that is read"],
)
def test_a_batch_that_does_not_fit_is_refused(call, message):
    with pytest.raises(tg.BatchError, match=message):
        call()


def test_a_batch_is_checked_on_the_example_task(digits_example):
    accelerated = digits_example.apply(tg.Plan((tg.DropSite("understanding", 1, 2),)), "understanding")
    inputs = dict(digits_example.spec.tasks["understanding"].inputs)
    inputs["visual_mask"] = inputs["visual_mask"].clone()
    inputs["visual_mask"][0, 5] = False
    with pytest.raises(tg.BatchError, match="another number of such tokens"):
        accelerated["understanding"](**inputs)


# The rules of selection, in plain Python.


@st.composite
def masks(draw: st.DrawFn) -> list[list[bool]]:
    """Samples of one length with equally many true positions."""
    tokens = draw(st.integers(1, 12))
    count = draw(st.integers(0, tokens))
    chosen = st.sets(st.integers(0, tokens - 1), min_size=count, max_size=count)
    return [[i in positions for i in range(tokens)] for positions in draw(st.lists(chosen, min_size=1, max_size=3))]


def true_positions(sample: list[bool]) -> list[int]:
    return [i for i, here in enumerate(sample) if here]


@quick
@given(masks())
def test_rows_are_the_true_positions(mask):
    count = sum(mask[0])
    assert ops.rows(torch.tensor(mask), count, True).tolist() == [true_positions(sample) for sample in mask]


@quick
@given(masks(), st.integers(0, 3))
def test_rows_fill_up_with_the_first_false_positions(mask, more):
    width = min(sum(mask[0]) + more, len(mask[0]))
    for sample, found in zip(mask, ops.rows(torch.tensor(mask), width, False).tolist(), strict=True):
        false = [i for i, here in enumerate(sample) if not here]
        assert found == sorted(true_positions(sample) + false[: width - sum(sample)])


@quick
@given(st.integers(1, 8), st.integers(-2, 9), st.integers(-2, 9))
def test_range_mask_is_true_from_start_to_stop(tokens, start, stop):
    found = ops.range_mask(torch.empty(2, tokens), start, stop)
    assert found.tolist() == [[start <= i < stop for i in range(tokens)]] * 2


@quick
@given(masks(), st.sampled_from(["text", "visual"]))
def test_demanded_rows_are_of_the_kind_read_or_just_before_one(mask, reads):
    def demanded(sample: list[bool]) -> list[bool]:
        kind = [here == (reads == "visual") for here in sample]
        return [here or following for here, following in zip(kind, [*kind[1:], False], strict=True)]

    assert ops.demand_mask(torch.tensor(mask), reads).tolist() == [demanded(sample) for sample in mask]


def kept_of(
    mask: list[list[bool]], keep: int, selector: str, seed: int = 0, norms: Tensor | None = None
) -> list[list[int]]:
    """The positions that the operators leave: every token that is not a candidate, and ``keep`` candidates."""
    candidates = ops.rows(torch.tensor(mask), sum(mask[0]), True)
    if selector == "uniform":
        score = ops.uniform_score(candidates, keep)
    elif selector == "random":
        score = ops.random_score(candidates, seed)
    else:
        score = norms.gather(1, candidates)
    return ops.keep_rows(candidates, score, keep, len(mask[0])).tolist()


def with_others(sample: list[bool], kept: list[int]) -> list[int]:
    return [i for i, here in enumerate(sample) if not here or i in kept]


@quick
@given(masks(), st.floats(0, 1))
def test_uniform_keeps_evenly_spaced_ranks(mask, ratio):
    n = sum(mask[0])
    k = tg.DropSite("task", 0, keep=ratio).kept(n)
    assert k == math.floor(ratio * n + 0.5)
    for sample, found in zip(mask, kept_of(mask, k, "uniform"), strict=True):
        candidates = true_positions(sample)
        assert found == with_others(sample, [candidates[math.floor(j * n / k)] for j in range(k)])


@quick
@given(masks(), st.data())
def test_norm_keeps_the_largest_and_the_earlier_of_equals(mask, data):
    tokens = len(mask[0])
    keep = data.draw(st.integers(0, sum(mask[0])))
    row = st.lists(st.integers(0, 4).map(float), min_size=tokens, max_size=tokens)
    norms = data.draw(st.lists(row, min_size=len(mask), max_size=len(mask)))
    found = kept_of(mask, keep, "norm", norms=torch.tensor(norms))
    for sample, norm, kept in zip(mask, norms, found, strict=True):
        largest = sorted(true_positions(sample), key=lambda i: (-norm[i], i))[:keep]
        assert kept == with_others(sample, largest)


@quick
@given(masks(), st.integers(-(2**63), 2**63 - 1), st.data())
def test_random_keeps_the_largest_hashes_of_sample_rank_and_seed(mask, seed, data):
    keep = data.draw(st.integers(0, sum(mask[0])))
    for number, (sample, kept) in enumerate(zip(mask, kept_of(mask, keep, "random", seed), strict=True)):
        candidates = true_positions(sample)
        ranks = sorted(range(len(candidates)), key=lambda rank: -random_hash(number, rank, seed))[:keep]
        assert kept == with_others(sample, [candidates[rank] for rank in ranks])


def test_random_depends_on_seed_and_sample_only():
    mask = [[True] * 12] * 3
    assert kept_of(mask, 6, "random", 1) == kept_of(mask, 6, "random", 1)
    assert kept_of(mask, 6, "random", 1) != kept_of(mask, 6, "random", 2)
    assert len({tuple(kept) for kept in kept_of(mask, 6, "random", 1)}) == 3
    assert kept_of(mask[:1], 6, "random", 1) == kept_of(mask, 6, "random", 1)[:1]


@quick
@given(st.integers(0, 600), st.floats(0, 1))
def test_the_number_kept_is_rounded_half_up(visual, ratio):
    kept = tg.DropSite("task", 0, keep=ratio).kept(visual)
    assert abs(kept - ratio * visual) <= 0.5 + 1e-9
    assert 0 <= kept <= visual

"""Operators that make row indices: ``[batch, rows]`` int64 positions, unique and ascending in each sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokgraph.errors import BatchError

from .base import NAMESPACE, Condition, rank_of, require, true_rows
from .unread import READS_HELP


def _rows(mask: Tensor, count: int, exact: bool) -> Tensor:
    return true_rows(mask, count)


def _range_rows(like: Tensor, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, device=like.device).unsqueeze(0).expand(like.shape[0], -1).clone()


def _keep_rows(candidates: Tensor, score: Tensor, keep: int, tokens: int) -> Tensor:
    worst_first = score.sort(dim=1, descending=True, stable=True).indices[:, keep:]
    dropped = candidates.gather(1, worst_first)
    alive = torch.ones(candidates.shape[0], tokens, dtype=torch.bool, device=candidates.device).scatter(
        1, dropped, False
    )
    return true_rows(alive, tokens - (candidates.shape[1] - keep))


def _drop_counts(visual: Tensor, here: Tensor, padding: Tensor, free: Tensor, keep: float, least: int) -> Tensor:
    wanted = (visual.sum(1).to(torch.float64) * keep + 0.5).floor().to(torch.int64)
    alive = (here & ~padding).sum(1)
    return torch.minimum(alive - wanted, free.sum(1)).clamp(min=0)


def _lost_rows(candidates: Tensor, score: Tensor, drop: Tensor, tokens: int) -> Tensor:
    best_first = candidates.gather(1, score.sort(dim=1, descending=True, stable=True).indices)
    last = torch.arange(candidates.shape[1], device=candidates.device) >= candidates.shape[1] - drop.unsqueeze(1)
    return last.new_zeros(candidates.shape[0], tokens).scatter(1, best_first, last)


def _ragged_rows(mask: Tensor, most: int, least: int) -> Tensor:
    return true_rows(mask, most)


def _select_targets(targets: Tensor, index: Tensor, ignore_index: int) -> Tensor:
    return targets.gather(1, index.expand(targets.shape[0], -1))


def _rows_hold(mask: Tensor, count: int, exact: bool) -> Tensor:
    found = mask.sum(1)
    return (found == count).all() if exact else (found <= count).all()


def _rows_say(mask: Tensor, count: int, exact: bool) -> str:
    return (
        f"a sample has {'another number of' if exact else 'more'} such tokens than the {count} of the example batch "
        "(visual or demanded tokens)"
    )


def _ragged_rows_hold(mask: Tensor, most: int, least: int) -> Tensor:
    found = mask.sum(1)
    return ((found >= least) & (found <= most)).all()


def _ragged_rows_say(mask: Tensor, most: int, least: int) -> str:
    return (
        f"a sample has fewer than {least} or more than {most} such tokens (visual tokens): the plan was made for an "
        "example batch that lies between"
    )


def _drop_counts_hold(visual: Tensor, here: Tensor, padding: Tensor, free: Tensor, keep: float, least: int) -> Tensor:
    return (_drop_counts(visual, here, padding, free, keep, least) + padding.sum(1) >= least).all()


def _drop_counts_say(visual: Tensor, here: Tensor, padding: Tensor, free: Tensor, keep: float, least: int) -> str:
    return (
        f"a sample has so few visual tokens that fewer than {least} of its rows go: the plan was made for an example batch "
        "whose samples have more"
    )


_LABELLED = "the loss reads a position that the task's reads= rules out (a label is not the ignore index there)"


def _select_targets_hold(targets: Tensor, index: Tensor, ignore_index: int) -> Tensor:
    left_out = targets.scatter(1, index.expand(targets.shape[0], -1), ignore_index)
    return (left_out == ignore_index).all()


@torch.library.custom_op(f"{NAMESPACE}::rows", mutates_args=())
def rows(mask: Tensor, count: int, exact: bool) -> Tensor:
    """Positions at which ``mask`` is true, ascending.

    Args:
        mask: ``[batch, tokens]`` bool.
        count: width of the result.
        exact: every sample must have ``count`` true positions; else it may have fewer, and the first false positions
            fill the row up.

    Returns:
        ``[batch, count]`` int64.

    Raises:
        BatchError: a sample of the batch has another number of true positions.
    """
    if count < 0:  # symbolic sizes: the token axis less the rows of the example batch that go
        raise BatchError("the batch has fewer tokens than the plan drops", help="make the batch longer, or plan for it")
    require(_rows_hold(mask, count, exact), _rows_say(mask, count, exact))
    return _rows(mask, count, exact)


@torch.library.custom_op(f"{NAMESPACE}::ragged_rows", mutates_args=())
def ragged_rows(mask: Tensor, most: int, least: int) -> Tensor:
    """Positions at which ``mask`` is true, where samples have different numbers of them.

    Args:
        mask: ``[batch, tokens]`` bool.
        most: width of the result, where the batch is as long; a sample with fewer has other positions in between.
        least: true positions that every sample must have.

    Returns:
        ``[batch, min(most, tokens)]`` int64, ascending.

    Raises:
        BatchError: a sample of the batch has more or fewer true positions.
    """
    require(_ragged_rows_hold(mask, most, least), _ragged_rows_say(mask, most, least))
    return _ragged_rows(mask, most, least)


@torch.library.custom_op(f"{NAMESPACE}::drop_counts", mutates_args=())
def drop_counts(visual: Tensor, here: Tensor, padding: Tensor, free: Tensor, keep: float, least: int) -> Tensor:
    """How many visual tokens each sample loses at a site that keeps the same share of every sample.

    Of ``n`` visual tokens of a sample, ``floor(keep * n + 0.5)`` stay, and more where fewer are free to go.

    Args:
        visual: ``[batch, tokens]`` bool, the visual tokens of the task.
        here: ``[batch, rows]`` bool, those among the rows that enclosing sites left.
        padding: ``[batch, rows]`` bool, those of ``here`` that enclosing sites dropped and kept as padding.
        free: ``[batch, rows]`` bool, those that may be dropped.
        keep: the ratio.
        least: rows that leave every sample; a sample that loses more holds the others as padding.

    Returns:
        ``[batch]`` int64.

    Raises:
        BatchError: a sample of the batch, padding included, loses fewer than ``least`` rows.
    """
    require(
        _drop_counts_hold(visual, here, padding, free, keep, least),
        _drop_counts_say(visual, here, padding, free, keep, least),
    )
    return _drop_counts(visual, here, padding, free, keep, least)


@torch.library.custom_op(f"{NAMESPACE}::lost_rows", mutates_args=())
def lost_rows(candidates: Tensor, score: Tensor, drop: Tensor, tokens: int) -> Tensor:
    """The rows that are dropped, where samples drop different numbers of them.

    Args:
        candidates: ``[batch, m]`` int64 positions that may be dropped.
        score: ``[batch, m]``; of equal scores the earlier position stays.
        drop: ``[batch]`` int64, how many candidates of each sample go.
        tokens: length of the token axis.

    Returns:
        ``[batch, tokens]`` bool.
    """
    return _lost_rows(candidates, score, drop, tokens)


@torch.library.custom_op(f"{NAMESPACE}::ranks", mutates_args=())
def ranks(valid: Tensor) -> Tensor:
    """``[batch, m]`` int64: how many true positions lie before, where ``valid`` is true, else 0."""
    return rank_of(valid)


@torch.library.custom_op(f"{NAMESPACE}::range_rows", mutates_args=())
def range_rows(like: Tensor, start: int, stop: int) -> Tensor:
    """``[batch, stop - start]`` int64: positions ``start .. stop - 1`` for every sample of ``like``."""
    return _range_rows(like, start, stop)


@torch.library.custom_op(f"{NAMESPACE}::keep_rows", mutates_args=())
def keep_rows(candidates: Tensor, score: Tensor, keep: int, tokens: int) -> Tensor:
    """Every position except the candidates of lowest score.

    Args:
        candidates: ``[batch, m]`` int64 positions that may be dropped.
        score: ``[batch, m]``; of equal scores the earlier position stays.
        keep: how many candidates stay.
        tokens: length of the token axis.

    Returns:
        ``[batch, tokens - (m - keep)]`` int64, ascending.
    """
    return _keep_rows(candidates, score, keep, tokens)


@torch.library.custom_op(f"{NAMESPACE}::select_targets", mutates_args=())
def select_targets(targets: Tensor, index: Tensor, ignore_index: int) -> Tensor:
    """Targets of a loss at the demanded rows.

    Args:
        targets: ``[batch, tokens]`` int64 labels, already shifted.
        index: ``[batch, rows]`` int64 demanded positions, or ``[1, rows]`` for all samples.
        ignore_index: the label that the loss does not read.

    Returns:
        ``[batch, rows]`` int64.

    Raises:
        BatchError: a row outside ``index`` has a label, so the loss reads more than the task's ``reads=`` says.
    """
    require(_select_targets_hold(targets, index, ignore_index), _LABELLED, help=READS_HELP)
    return _select_targets(targets, index, ignore_index)


rows.register_fake(lambda mask, count, exact: mask.new_empty((mask.shape[0], count), dtype=torch.int64))
ragged_rows.register_fake(
    lambda mask, most, least: mask.new_empty((mask.shape[0], torch.sym_min(most, mask.shape[1])), dtype=torch.int64)
)
drop_counts.register_fake(
    lambda visual, here, padding, free, keep, least: visual.new_empty(visual.shape[:1], dtype=torch.int64)
)
lost_rows.register_fake(
    lambda candidates, score, drop, tokens: candidates.new_empty((candidates.shape[0], tokens), dtype=torch.bool)
)
ranks.register_fake(lambda valid: torch.empty_like(valid, dtype=torch.int64))
range_rows.register_fake(
    lambda like, start, stop: like.new_empty((like.shape[0], stop - start), dtype=torch.int64, requires_grad=False)
)
keep_rows.register_fake(
    lambda candidates, score, keep, tokens: candidates.new_empty(
        (candidates.shape[0], tokens - (candidates.shape[1] - keep))
    )
)
select_targets.register_fake(lambda targets, index, ignore_index: targets.new_empty((targets.shape[0], index.shape[1])))

LOWERED: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.tokgraph.rows.default: _rows,
    torch.ops.tokgraph.ragged_rows.default: _ragged_rows,
    torch.ops.tokgraph.drop_counts.default: _drop_counts,
    torch.ops.tokgraph.lost_rows.default: _lost_rows,
    torch.ops.tokgraph.ranks.default: rank_of,
    torch.ops.tokgraph.range_rows.default: _range_rows,
    torch.ops.tokgraph.keep_rows.default: _keep_rows,
    torch.ops.tokgraph.select_targets.default: _select_targets,
}
"""Operator -> the plain ATen function it is."""
CONDITIONS = {
    torch.ops.tokgraph.rows.default: Condition(_rows_hold, _rows_say),
    torch.ops.tokgraph.ragged_rows.default: Condition(_ragged_rows_hold, _ragged_rows_say),
    torch.ops.tokgraph.drop_counts.default: Condition(_drop_counts_hold, _drop_counts_say),
    torch.ops.tokgraph.select_targets.default: Condition(_select_targets_hold, lambda *_: _LABELLED),
}
"""Operator -> what it asks of a batch."""

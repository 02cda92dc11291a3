"""Run-time operators: index building, select, drop and restore, with fake kernels, autograd and an ATen lowering.

Every index is a ``[batch, rows]`` int64 tensor of token positions, unique and ascending in each row. Operators that build
one know its width before they run (shapes stay static or symbolic, so graphs compile and export), and check on each
batch that the width is right: a :class:`BatchError` on the CPU, ``torch._assert_async`` on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .errors import BatchError

NAMESPACE = "tokgraph"
_END = 2**63 - 1


def _require(ok: Tensor, message: str) -> None:
    """Raise on the CPU, assert asynchronously on a device: ``ok`` is a boolean scalar tensor."""
    if ok.device.type == "meta":
        return
    if ok.device.type == "cpu":
        if not bool(ok):
            raise BatchError(
                message, help="make the batch like the example batch of the task, or optimize for this one"
            )
    else:
        torch._assert_async(ok, message)


def expand_index(index: Tensor, shape: torch.Size, dim: int, batch_dim: int) -> Tensor:
    """``[batch, rows]`` index -> the index that ``gather`` along ``dim`` of a tensor of ``shape`` needs."""
    view = [1] * len(shape)
    view[batch_dim], view[dim] = index.shape
    sizes = list(shape)
    sizes[dim] = index.shape[1]
    return index.reshape(view).expand(sizes)


# ------------------------------------------------------------------ moving rows


def _select(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    return x.gather(dim, expand_index(index, x.shape, dim, batch_dim))


def _drop(x: Tensor, keep: Tensor) -> Tensor:
    return _select(x, keep, 1, 0)


def _restore(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return x.scatter(1, expand_index(index, x.shape, 1, 0), rows)


def _gaps(index: Tensor, count: int) -> Tensor:
    """``[batch, count]`` int64: the positions below ``count`` plus the index's that are not in it, ascending."""
    taken = torch.zeros(index.shape[0], index.shape[1] + count, dtype=torch.bool, device=index.device)
    return _rows(~taken.scatter(1, index, True), count, True)


def _merge(others: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    order = torch.cat([_gaps(index, others.shape[1]), index], 1).argsort(1)
    both = torch.cat([others, rows], 1)
    return both.gather(1, expand_index(order, both.shape, 1, 0))


@torch.library.custom_op(f"{NAMESPACE}::select", mutates_args=())
def select(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """Rows ``index`` of ``x`` along ``dim``, per sample.

    Args:
        x: any tensor with a batch axis.
        index: ``[batch, rows]`` int64, unique positions in each row.
        dim: the token axis of ``x``.
        batch_dim: the batch axis of ``x``.

    Returns:
        ``x`` with ``dim`` narrowed to ``rows``.
    """
    return _select(x, index, dim, batch_dim)


@torch.library.custom_op(f"{NAMESPACE}::drop", mutates_args=())
def drop(x: Tensor, keep: Tensor) -> Tensor:
    """The residual stream without its dropped rows: ``[batch, tokens, hidden]`` -> ``[batch, rows, hidden]``.

    Args:
        x: the residual stream.
        keep: ``[batch, rows]`` int64 positions that stay, ascending.
    """
    return _drop(x, keep)


@torch.library.custom_op(f"{NAMESPACE}::restore", mutates_args=())
def restore(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """``x`` with its rows ``index`` replaced: dropped rows, unchanged, take their places again.

    Args:
        x: ``[batch, tokens, hidden]``, the residual stream at the start of the span.
        rows: ``[batch, rows, hidden]``, the kept rows at its end.
        index: ``[batch, rows]`` int64 positions of ``rows`` in ``x``.
    """
    return _restore(x, rows, index)


@torch.library.custom_op(f"{NAMESPACE}::merge", mutates_args=())
def merge(others: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Two sets of rows as one: ``rows`` at the positions ``index``, ``others``, in order, at the positions between.

    Args:
        others: ``[batch, m, width]``.
        rows: ``[batch, n, width]``.
        index: ``[batch, n]`` int64, ascending positions below ``m + n``.

    Returns:
        ``[batch, m + n, width]``.
    """
    return _merge(others, rows, index)


def _select_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (index,) = ctx.saved_tensors
    into = expand_index(index, ctx.shape, ctx.dim, ctx.batch_dim)
    return grad.new_zeros(ctx.shape).scatter(ctx.dim, into, grad), None, None, None


def _select_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, ctx.dim, ctx.batch_dim = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(index)


def _drop_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _select_setup(ctx, (*inputs, 1, 0), output)


def _drop_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _select_backward(ctx, grad)[0], None


def _restore_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _restore_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    (index,) = ctx.saved_tensors
    at = expand_index(index, grad.shape, 1, 0)
    return grad.scatter(1, at, 0.0), grad.gather(1, at), None


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    others, _, index = inputs
    ctx.save_for_backward(_gaps(index, others.shape[1]), index)


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    gaps, index = ctx.saved_tensors
    others, rows = (grad.gather(1, expand_index(at, grad.shape, 1, 0)) for at in (gaps, index))
    return others, rows, None


merge.register_fake(_merge)
merge.register_autograd(_merge_backward, setup_context=_merge_setup)
select.register_fake(_select)
drop.register_fake(_drop)
restore.register_fake(_restore)
select.register_autograd(_select_backward, setup_context=_select_setup)
drop.register_autograd(_drop_backward, setup_context=_drop_setup)
restore.register_autograd(_restore_backward, setup_context=_restore_setup)

# ------------------------------------------------------------------ masks over the token axis


def _range_mask(like: Tensor, start: int, stop: int) -> Tensor:
    at = torch.arange(like.shape[1], device=like.device)
    return ((at >= start) & (at < stop)).unsqueeze(0).expand(like.shape[0], -1).clone()


def _demand_mask(visual: Tensor, reads: str) -> Tensor:
    read = visual if reads == "visual" else ~visual
    return read | F.pad(read[:, 1:], (0, 1), value=False)


@torch.library.custom_op(f"{NAMESPACE}::range_mask", mutates_args=())
def range_mask(like: Tensor, start: int, stop: int) -> Tensor:
    """``[batch, tokens]`` bool, true at positions ``start <= i < stop``; batch and tokens are those of ``like``."""
    return _range_mask(like, start, stop)


@torch.library.custom_op(f"{NAMESPACE}::demand_mask", mutates_args=())
def demand_mask(visual: Tensor, reads: str) -> Tensor:
    """The demanded rows of a next-token loss: rows of the kind it reads, and rows whose successor is of that kind.

    Args:
        visual: ``[batch, tokens]`` bool.
        reads: ``"text"`` or ``"visual"``.
    """
    return _demand_mask(visual, reads)


@range_mask.register_fake
def _(like: Tensor, start: int, stop: int) -> Tensor:
    return like.new_empty(like.shape[:2], dtype=torch.bool)


@demand_mask.register_fake
def _(visual: Tensor, reads: str) -> Tensor:
    return torch.empty_like(visual)


# ------------------------------------------------------------------ indices


def _rows(mask: Tensor, count: int, exact: bool) -> Tensor:
    first = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    return first[:, :count].sort(dim=1).values


def _range_rows(like: Tensor, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, device=like.device).unsqueeze(0).expand(like.shape[0], -1).clone()


def _keep_rows(candidates: Tensor, score: Tensor, keep: int, tokens: int) -> Tensor:
    worst_first = score.sort(dim=1, descending=True, stable=True).indices[:, keep:]
    dropped = candidates.gather(1, worst_first)
    alive = torch.ones(candidates.shape[0], tokens, dtype=torch.bool, device=candidates.device).scatter(
        1, dropped, False
    )
    return _rows(alive, tokens - (candidates.shape[1] - keep), True)


def _ragged_rows(mask: Tensor, most: int, least: int) -> Tensor:
    return _rows(mask, most, False)


def _ranks(valid: Tensor) -> Tensor:
    return (valid.to(torch.int64).cumsum(1) - 1).clamp(min=0) * valid


def _spread_score(valid: Tensor, drop: int) -> Tensor:
    n = valid.sum(1, keepdim=True)
    keep, rank = (n - drop).clamp(min=0), _ranks(valid)
    n = n.clamp(min=1)
    ends = [(at * keep + n - 1) // n for at in (rank, rank + 1)]  # numbers j with j * n / keep below rank, rank + 1
    return ((ends[1] > ends[0]) & valid).to(torch.float32)


def _uniform_score(candidates: Tensor, keep: int) -> Tensor:
    width = candidates.shape[1]
    rank = torch.arange(keep, device=candidates.device) * width // max(keep, 1)
    score = torch.zeros(width, device=candidates.device).scatter(0, rank, 1.0)
    return score.unsqueeze(0).expand(candidates.shape[0], -1).clone()


def _random_score(candidates: Tensor, seed: int, step: Tensor | None = None) -> Tensor:
    samples, width = candidates.shape
    device = candidates.device
    x = torch.arange(samples, device=device).unsqueeze(1) * 0x9E3779B1 + torch.arange(width, device=device)
    x = (x + (seed * 0x85EBCA6B & 0xFFFFFFFF)) & 0xFFFFFFFF  # reduced first: a large seed would overflow int64
    if step is not None:
        x = (x + (step & 0x3FFFFFFF) * 0xC2B2AE35) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x


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
    found = mask.sum(1)
    _require(
        (found == count).all() if exact else (found <= count).all(),
        f"a sample has {'another number of' if exact else 'more'} such tokens than the {count} of the example batch "
        "(visual or demanded tokens)",
    )
    return _rows(mask, count, exact)


@torch.library.custom_op(f"{NAMESPACE}::ragged_rows", mutates_args=())
def ragged_rows(mask: Tensor, most: int, least: int) -> Tensor:
    """Positions at which ``mask`` is true, where samples have different numbers of them.

    Args:
        mask: ``[batch, tokens]`` bool.
        most: width of the result; a sample with fewer has other positions in between.
        least: true positions that every sample must have.

    Returns:
        ``[batch, most]`` int64, ascending.

    Raises:
        BatchError: a sample of the batch has more or fewer true positions.
    """
    found = mask.sum(1)
    _require(
        ((found >= least) & (found <= most)).all(),
        f"a sample has fewer than {least} or more than {most} such tokens (visual tokens): the plan was made for an "
        "example batch that lies between",
    )
    return _ragged_rows(mask, most, least)


@torch.library.custom_op(f"{NAMESPACE}::ranks", mutates_args=())
def ranks(valid: Tensor) -> Tensor:
    """``[batch, m]`` int64: how many true positions lie before, where ``valid`` is true, else 0."""
    return _ranks(valid)


@torch.library.custom_op(f"{NAMESPACE}::spread_score", mutates_args=())
def spread_score(valid: Tensor, drop: int) -> Tensor:
    """:func:`uniform_score` for samples with different numbers of candidates.

    Args:
        valid: ``[batch, m]`` bool, the candidates.
        drop: how many of them go; ``n - drop`` of ``n`` stay.

    Returns:
        ``[batch, m]`` float32: 1 at the candidates of rank ``floor(j * n / keep)``, ``j = 0 .. keep - 1``, else 0.
    """
    return _spread_score(valid, drop)


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


@torch.library.custom_op(f"{NAMESPACE}::uniform_score", mutates_args=())
def uniform_score(candidates: Tensor, keep: int) -> Tensor:
    """``[batch, m]`` float32: 1 at the ranks ``floor(j * m / keep)``, ``j = 0 .. keep - 1``, else 0."""
    return _uniform_score(candidates, keep)


@torch.library.custom_op(f"{NAMESPACE}::random_score", mutates_args=())
def random_score(candidates: Tensor, seed: int, step: Tensor | None = None) -> Tensor:
    """``[batch, m]`` int64 in ``[0, 2**32)``: a hash of sample, rank, seed and step, the same on every device.

    Args:
        candidates: ``[batch, m]``.
        seed: another seed, another choice.
        step: int64 scalar tensor, the number of training steps so far; ``None``: 0.

    Source: the 32-bit integer finaliser with constants ``7feb352d``/``846ca68b`` (C. Wellons, hash-prospector).
    """
    return _random_score(candidates, seed, step)


def _prompt_mask(targets: Tensor, like: Tensor, ignore_index: int, first: int) -> Tensor:
    labelled = targets != ignore_index
    end = torch.where(labelled.any(1), labelled.to(torch.uint8).argmax(1), targets.shape[1] - 1) + first
    return torch.arange(like.shape[1], device=like.device).unsqueeze(0) == end.unsqueeze(1)


def _prompt_attention(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
    return scores.softmax(-1)


def _similarity_score(rows: Tensor, pivots: int) -> Tensor:
    pivots = min(pivots, rows.shape[1])
    found = rows.norm(dim=-1).sort(dim=1, descending=True, stable=True).indices[:, :pivots]
    unit = F.normalize(rows, dim=-1)
    alike = unit @ unit.gather(1, expand_index(found, unit.shape, 1, 0)).transpose(1, 2)
    return (-alike.amax(-1)).scatter(1, found, torch.inf)


@torch.library.custom_op(f"{NAMESPACE}::prompt_mask", mutates_args=())
def prompt_mask(targets: Tensor, like: Tensor, ignore_index: int, first: int) -> Tensor:
    """The last prompt token: the row that predicts the first label.

    Args:
        targets: ``[batch, rows]`` int64 labels, already shifted.
        like: ``[batch, tokens, ...]``.
        ignore_index: the label of rows that have none.
        first: position of the labels' first row; a sample without labels has its last row.

    Returns:
        ``[batch, tokens]`` bool, true once in each sample.
    """
    return _prompt_mask(targets, like, ignore_index, first)


@torch.library.custom_op(f"{NAMESPACE}::prompt_attention", mutates_args=())
def prompt_attention(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention weights of a few query rows, beside a fused attention that keeps its weights to itself.

    Args:
        query: ``[batch, heads, rows, head]``.
        key: ``[batch, key heads, keys, head]``; groups of query heads share one.
        attn_mask: bool (true: seen) or additive, broadcastable to ``[batch, heads, rows, keys]``.
        scale: factor of the scores; ``None``: ``head ** -0.5``.

    Returns:
        ``[batch, heads, rows, keys]``.
    """
    return _prompt_attention(query, key, attn_mask, scale)


@torch.library.custom_op(f"{NAMESPACE}::similarity_score", mutates_args=())
def similarity_score(rows: Tensor, pivots: int) -> Tensor:
    """How little a row repeats others: minus its largest cosine similarity to a pivot; pivots score infinity.

    Args:
        rows: ``[batch, m, hidden]``.
        pivots: how many rows of largest L2 norm are pivots.

    Returns:
        ``[batch, m]``.

    Source: DART (Wen et al., arXiv 2502.11494): tokens are kept by their duplication with a few pivots.
    """
    return _similarity_score(rows, pivots)


prompt_mask.register_fake(
    lambda targets, like, ignore_index, first: like.new_empty(like.shape[:2], dtype=torch.bool, requires_grad=False)
)
prompt_attention.register_fake(
    lambda query, key, attn_mask, scale: query.new_empty((*query.shape[:3], key.shape[2]), requires_grad=False)
)
similarity_score.register_fake(lambda rows, pivots: rows.new_empty(rows.shape[:2], requires_grad=False))


@register_flop_formula(torch.ops.tokgraph.prompt_attention)
def _prompt_attention_flop(query: Any, key: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> Any:
    batch, heads, rows, head = query
    return 2 * batch * heads * rows * head * key[2]


@register_flop_formula(torch.ops.tokgraph.similarity_score)
def _similarity_score_flop(rows: Any, pivots: int, *args: Any, out_shape: Any = None, **kwargs: Any) -> Any:
    batch, count, hidden = rows
    return 2 * batch * count * hidden * pivots


@torch.library.custom_op(f"{NAMESPACE}::select_targets", mutates_args=())
def select_targets(targets: Tensor, index: Tensor, ignore_index: int) -> Tensor:
    """Targets of a loss at the demanded rows.

    Args:
        targets: ``[batch, tokens]`` int64 labels, already shifted.
        index: ``[batch, rows]`` int64 demanded positions.
        ignore_index: the label that the loss does not read.

    Returns:
        ``[batch, rows]`` int64.

    Raises:
        BatchError: a row outside ``index`` has a label, so the loss reads more than the task's ``reads=`` says.
    """
    left_out = targets.scatter(1, index, ignore_index)
    _require(
        (left_out == ignore_index).all(),
        "the loss reads a position that the task's reads= rules out (a label is not the ignore index there)",
    )
    return targets.gather(1, index)


rows.register_fake(lambda mask, count, exact: mask.new_empty((mask.shape[0], count), dtype=torch.int64))
ragged_rows.register_fake(lambda mask, most, least: mask.new_empty((mask.shape[0], most), dtype=torch.int64))
ranks.register_fake(lambda valid: torch.empty_like(valid, dtype=torch.int64))
spread_score.register_fake(lambda valid, drop: torch.empty_like(valid, dtype=torch.float32))
range_rows.register_fake(
    lambda like, start, stop: like.new_empty((like.shape[0], stop - start), dtype=torch.int64, requires_grad=False)
)
keep_rows.register_fake(
    lambda candidates, score, keep, tokens: candidates.new_empty(
        (candidates.shape[0], tokens - (candidates.shape[1] - keep))
    )
)
uniform_score.register_fake(lambda candidates, keep: candidates.new_empty(candidates.shape, dtype=torch.float32))
random_score.register_fake(lambda candidates, seed, step=None: torch.empty_like(candidates))
select_targets.register_fake(lambda targets, index, ignore_index: targets.new_empty(index.shape))


def _select_targets(targets: Tensor, index: Tensor, ignore_index: int) -> Tensor:
    return targets.gather(1, index)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Tensor]]:
    """Operator -> plain ATen function, as ``ExportedProgram.run_decompositions`` takes it; the batch checks are left out."""
    ops = torch.ops.tokgraph
    return {
        ops.select.default: _select,
        ops.drop.default: _drop,
        ops.restore.default: _restore,
        ops.merge.default: _merge,
        ops.range_mask.default: _range_mask,
        ops.demand_mask.default: _demand_mask,
        ops.rows.default: _rows,
        ops.ragged_rows.default: _ragged_rows,
        ops.ranks.default: _ranks,
        ops.spread_score.default: _spread_score,
        ops.range_rows.default: _range_rows,
        ops.keep_rows.default: _keep_rows,
        ops.uniform_score.default: _uniform_score,
        ops.random_score.default: _random_score,
        ops.prompt_mask.default: _prompt_mask,
        ops.prompt_attention.default: _prompt_attention,
        ops.similarity_score.default: _similarity_score,
        ops.select_targets.default: _select_targets,
    }

"""The balance of routers over the rows of all layers, one after the other, as libraries write it: of the rows that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import tokgraph as tg
from tests.field import decoder as m
from tests.field import structures as s
from tests.field.decoder import HIDDEN, TASK, Block
from tests.field.test_structures import SITES, worst

EXPERTS, CHOSEN = 3, 2
Balance = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class Routed(Block):
    """A layer that routes merged rows, and leaves what its router said of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = x + self.out(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), hidden))
        rows = self.norm2(x).view(-1, HIDDEN)
        self.kv = self.gate(rows)  # a name that the loop takes away again
        share = self.kv.softmax(-1)
        return x + sum(share[:, i, None] * expert(rows) for i, expert in enumerate(self.experts)).view(x.shape)


def chosen(share: Tensor) -> Tensor:
    return F.one_hot(share.topk(CHOSEN, dim=-1).indices, EXPERTS)


def of_all(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    share = torch.cat(tuple(logits), dim=0).softmax(-1)
    return EXPERTS * (chosen(share).to(share).mean(0) * share.mean(0).unsqueeze(0)).sum()


def in_two_steps(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Probabilities of some layers are joined to those of others, and their squares are averaged, too."""
    first, *others = (x.softmax(-1) for x in logits)
    share = torch.cat([torch.cat(others), first])
    return of_all(logits, masks) + share.square().mean() + torch.cat([first, others[1]]).logsumexp(-1).mean(0)


def but_for_padding(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    share = torch.cat(tuple(logits)).softmax(-1)
    rows = torch.cat(tuple(masks)).unsqueeze(-1)
    return ((share * rows).sum(0) / rows.sum(0)).square().sum()


def as_libraries_do(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    found: Tensor = load_balancing_loss_func(tuple(logits), EXPERTS, CHOSEN)
    return found


def without_padding(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """What ``load_balancing_loss_func`` makes of an ``attention_mask``, which need not be the same in each layer."""
    counts, total, rows = torch.zeros(EXPERTS), torch.zeros(EXPERTS), 0.0
    for x, weights in zip(logits, masks, strict=True):
        share = x.softmax(-1)
        _, which = torch.topk(share, CHOSEN, dim=-1)
        once = torch.zeros(EXPERTS, dtype=weights.dtype)
        counts = counts + once.scatter_add_(0, which.reshape(-1), weights.repeat_interleave(CHOSEN))
        total = total + (share * weights.unsqueeze(-1)).sum(dim=0)
        rows = rows + weights.sum()
    return EXPERTS * torch.sum((counts / rows) * (total / rows).unsqueeze(0))


def as_running_sums(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Of probabilities, of how often an expert is the first, and of how often it is one of those that are chosen."""
    total, first, each, count = torch.zeros(EXPERTS, dtype=torch.float64), 0.0, 0.0, 0
    for share in (x.softmax(-1) for x in logits):
        total, count = total + share.sum(0), count + share.shape[0]
        first = first + torch.histc(share.argmax(-1).double(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        each = each + chosen(share).to(share).sum((0, 1))
    return ((total / count).square() * (first / count + each / count)).sum()


def of_choices(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Each layer on its own: the sum of choices is that of rows times how many each has."""
    terms = []
    for share in (x.softmax(-1) for x in logits):
        which = share.topk(CHOSEN, dim=-1).indices
        counts = torch.histc(which.flatten().to(share), bins=EXPERTS, min=0, max=EXPERTS)
        terms.append((counts / which.numel() * (share.sum(0) / share.shape[0])).sum())
    return torch.stack(terms).sum()


def by_a_number(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Divided by something else than the number of rows."""
    total: Tensor = sum(x.softmax(-1).sum(0) for x in logits) / 7.0
    return total.square().sum()


def weighed_by_rows(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    shares = [x.softmax(-1) for x in logits]
    weights = [share.amax(-1) for share in shares]
    mean = sum((x * w.unsqueeze(-1)).sum(0) for x, w in zip(shares, weights, strict=True)) / sum(
        w.sum() for w in weights
    )
    total: Tensor = mean.square().sum()
    return total


class Balanced(s.Looped):
    """The loop of other decoders, with a term over all layers at its end.

    Args:
        blocks: the layers.
        balance: logits of all routers, and the weights of their rows, to a term of the loss.
    """

    def __init__(self, blocks: list[nn.Module], balance: Balance = of_all) -> None:
        super().__init__(blocks)
        self.balance = balance

    def beside(self, number: int, x: Tensor, kept: Tensor | None) -> Tensor | float:
        logits = self.layers[number].kv
        mask = (self.inputs[0] % 5 != 2).to(logits.dtype).reshape(-1)
        rows = slice(None) if kept is None else kept.flatten()
        self.seen = [*(self.seen if number else ()), (logits[rows], mask[rows])]
        if number < len(self.layers) - 1:
            return 0.0
        seen, self.seen = self.seen, []
        return 0.3 * self.balance(*zip(*seen, strict=True))


def facts_of(balance: Balance, dynamic: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Balanced, tg.Facts]:
    model = m.model(Routed, 4, lambda blocks: Balanced(blocks, balance)).to(dtype)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in m.batch().items()}
    return model, tg.analyze(tg.capture(m.spec(model, inputs, s.loss, dynamic=dynamic)))


@pytest.mark.parametrize(
    ("balance", "dynamic", "sites"),
    [
        pytest.param(of_all, False, {"hide"}, marks=pytest.mark.slow),
        pytest.param(of_all, True, set(SITES), marks=pytest.mark.slow),
        pytest.param(in_two_steps, False, set(SITES), marks=pytest.mark.slow),
        (as_libraries_do, False, {"hide"}),
        (without_padding, False, {"gone"}),
        *(
            pytest.param(balance, True, set(SITES), marks=pytest.mark.slow)
            for balance in (as_libraries_do, without_padding, as_running_sums, of_choices)
        ),
    ],
)
def test_rows_of_all_layers_are_those_that_are_kept(balance: Balance, dynamic: bool, sites: set[str]) -> None:
    model, facts = facts_of(balance, dynamic)
    for name in sorted(sites):
        assert worst(facts, model, SITES[name], exact=name == "hide") < 1e-10, name


@pytest.mark.slow
def test_narrowed_averages_are_exported(tmp_path: Path) -> None:
    """A histogram has no form in ONNX; each graph is compared with PyTorch's, the gradients of its training step as well."""
    _, facts = facts_of(lambda *of: as_libraries_do(*of) + without_padding(*of), dtype=torch.float32)
    tg.apply(facts, tg.Plan((SITES["hide"],))).export_onnx(tmp_path / "onnx", ("forward", "train-step"))


@pytest.mark.slow
def test_where_sites_meet() -> None:
    _, facts = facts_of(in_two_steps)
    nested = (tg.DropSite(TASK, 0, 3, 0.5), tg.DropSite(TASK, 1, 2, 0.25, mode="freeze"))
    tg.verify(tg.apply(facts, tg.Plan(nested, exact=True))).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("balance", "why"),
    [
        (but_for_padding, "mul.Tensor reads .* combines them with other values after samples and tokens were merged"),
        (by_a_number, "sum.dim_IntList reads .* mixes them otherwise than by a mean"),
        (
            weighed_by_rows,
            "mean_of_rows.* reads .* weighs them by something else than a value for each token of each sample",
        ),
    ],
)
def test_other_sums_over_rows_are_named(balance: Balance, why: str) -> None:
    """Nothing tells what they mean where there are fewer rows; without a site it does not matter."""
    _, facts = facts_of(balance)
    tg.verify(tg.apply(facts, tg.Plan(exact=True))).raise_if_failed()
    with pytest.raises(tg.IllegalRewriteError, match=why):
        tg.apply(facts, tg.Plan((SITES["hide"],)))

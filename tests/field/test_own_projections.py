"""Own projections where weights are cast, tied, frozen or adapted: a loop by hand is the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field.models import IMAGE, VLM, Adapted, Block, assert_same, batch, cross_entropy, seeded, spec

pytestmark = pytest.mark.slow
FROZEN = tg.DropSite("u", 0, 3, 0.0, mode="freeze", projections="own")
HIDDEN = tg.DropSite("u", 1, 3, 0.5, projections="own")
ALL_ROWS = tg.DropSite("u", 1, 3, 1.0, projections="own")


class Together(nn.Module):
    """The model and what the plan added, for comparing all gradients."""

    def __init__(self, acc: tg.Accelerated) -> None:
        super().__init__()
        self.model = acc.model
        self.own = nn.ParameterDict({name.replace(".", "/"): p for name, p in acc.own_parameters.items()})

    def linear(self, name: str, x: Tensor) -> Tensor:
        """By the copies of a linear layer; the layer itself where it has none."""
        layer = self.model.get_submodule(name)
        weight, bias = (self.own.get(f"tokgraph_own/u/{name}/{what}".replace(".", "/")) for what in ("weight", "bias"))
        return F.linear(x, weight, bias) if weight is not None else layer(x)


def program(model: nn.Module, *sites: tg.DropSite, exact: bool = True) -> tg.Accelerated:
    acc = tg.optimize(spec(model), tg.Plan(sites, exact), verify=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in acc.own_parameters.values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return acc


def by_hand(whole: Together, site: tg.DropSite) -> Callable[..., Tensor]:
    """The site as a loop: visual rows by the copies in the span, frozen there, or all of them kept."""

    def loss(ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        model, visual = whole.model, (ids == IMAGE).unsqueeze(-1)
        x = model.embed(ids, patches)
        for i, block in enumerate(model.blocks):
            inside = site.start <= i < (site.end or len(model.blocks))
            h = block.norm1(x)
            rows = []
            for part in ("q", "k", "v"):
                y = getattr(block, part)(h)
                if inside:
                    y = torch.where(visual, whole.linear(f"blocks.{i}.{part}", h), y)
                rows.append(y.unflatten(-1, (block.heads, -1)).transpose(1, 2))
            attended = F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2).flatten(2)
            y = x + block.o(attended)
            y = y + block.feed(block.norm2(y))
            x = torch.where(visual, x, y) if inside and site.mode == "freeze" else y
        return cross_entropy(model.head(model.norm(x)), labels)

    return loss


def inside(dtype: torch.dtype, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return call()

    return run


@pytest.mark.parametrize(("dtype", "site"), [(torch.bfloat16, FROZEN), (torch.float16, ALL_ROWS)])
def test_in_autocast(dtype: torch.dtype, site: tg.DropSite) -> None:
    acc = program(seeded(lambda: VLM(3)), site)
    whole, loop = Together(acc), by_hand(Together(acc), site)
    for b in (batch(), batch(seed=3)):
        assert_same(whole, lambda b=b: loop(**b), lambda b=b: acc["u"](**b))
        tolerance = 8 * torch.finfo(dtype).eps  # rows are projected apart: sums of gradients are rounded otherwise
        assert_same(whole, inside(dtype, lambda b=b: loop(**b)), inside(dtype, lambda b=b: acc["u"](**b)), tolerance)


def test_one_set_of_copies_in_all_regions() -> None:
    """A step in the region and a step outside of it train the same copies, by blocks as well, computed again."""
    acc = program(seeded(lambda: VLM(3)), FROZEN)
    whole, loop, b = Together(acc), by_hand(Together(acc), FROZEN), batch(seed=5)
    module = acc.module(checkpoint=True)
    optimizer = torch.optim.SGD(acc.parameters(), 0.05)
    for _ in range(2):
        for call in (lambda: acc["u"](**b), lambda: module(task="u", **b)):
            inside(torch.bfloat16, lambda call=call: call().backward())()
            optimizer.step()
            optimizer.zero_grad()
            assert_same(whole, lambda: loop(**b), call)
            region = torch.bfloat16
            assert_same(whole, inside(region, lambda: loop(**b)), inside(region, call), 8 * torch.finfo(region).eps)


class CastBlock(Block):
    """Projects in the type of its input, as models whose weights have another one do."""

    def attend(self, x: Tensor) -> Tensor:
        def project(layer: nn.Linear) -> Tensor:
            y = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = map(project, (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def wide_projections() -> nn.Module:
    model = VLM(3, block=CastBlock)
    for block in model.blocks:
        for layer in (block.q, block.k, block.v):
            layer.double()
    return model


def adapted() -> nn.Module:
    model = VLM(3)
    for block in model.blocks:
        block.q, block.k, block.v = map(Adapted, (block.q, block.k, block.v))
    return model


def tied() -> nn.Module:
    """Keys and values by the same weights, words read and written by the same."""
    model = VLM(3)
    for block in model.blocks:
        block.v.weight = block.k.weight
    model.head.weight = model.embedding.weight
    return model


def frozen() -> nn.Module:
    """A tower and the projections of a block that learn nothing."""
    model = VLM(3)
    model.tower.requires_grad_(False)
    for layer in (model.blocks[1].k, model.blocks[1].v):
        layer.requires_grad_(False)
    return model


KINDS = {"cast": wide_projections, "adapted": adapted, "tied": tied, "frozen": frozen}


@pytest.mark.parametrize(("kind", "site"), [("cast", HIDDEN), *((kind, FROZEN) for kind in KINDS)])
def test_the_oracle_agrees(kind: str, site: tg.DropSite) -> None:
    acc = program(seeded(KINDS[kind]), site)
    assert acc.own_parameters
    tg.verify(acc.facts.program, acc).raise_if_failed()


@pytest.mark.parametrize("kind", ["tied", "frozen"])
def test_equal_to_a_loop(kind: str) -> None:
    acc = program(seeded(KINDS[kind]), FROZEN)
    whole = Together(acc)
    if kind == "frozen":
        assert {n for n, p in acc.own_parameters.items() if not p.requires_grad} == {
            f"tokgraph_own.u.blocks.1.{part}.{what}" for part in "kv" for what in ("weight", "bias")
        }
    else:
        for i in range(3):  # of tied weights there is one copy
            keys = [f"tokgraph_own/u/blocks/{i}/{part}/weight" for part in "kv"]
            (copied,) = [key for key in keys if key in whole.own]
            whole.own.update(dict.fromkeys(keys, whole.own[copied]))
    loop = by_hand(whole, FROZEN)
    for b in (batch(), batch(seed=3)):
        assert_same(whole, lambda b=b: loop(**b), lambda b=b: acc["u"](**b))
        region = torch.bfloat16
        calls = inside(region, lambda b=b: loop(**b)), inside(region, lambda b=b: acc["u"](**b))
        assert_same(whole, *calls, 8 * torch.finfo(region).eps)


def test_adapters_in_autocast() -> None:
    """As outside of it, to rounding: the base and the second factor of visual rows are copies, the first one is the model's."""
    acc = program(seeded(adapted), FROZEN)
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in acc.own_parameters}
    assert names == {"inner", "up"}
    b = batch(seed=3)
    exact = acc["u"](**b).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(acc["u"](**b).detach(), exact, rtol=2e-2, atol=0)

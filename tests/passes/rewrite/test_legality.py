"""What must hold inside a span: every operator has a rule, and attention alone mixes tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tokgraph as tg
from tests import tiny
from tests.passes import models
from tests.passes.tools import Captured, captured, site
from tokgraph.errors import IllegalRewriteError
from tokgraph.passes.rewrite.legality import check_blocks


@pytest.mark.parametrize(
    ("mixer", "op", "why", "module", "dynamic"),
    [
        ("conv", "aten.conv1d.default", "mixes neighbouring tokens", "layers.1.conv", True),
        ("conv", "aten.conv1d.default", "mixes neighbouring tokens", "layers.1.conv", False),
        ("cumsum", "aten.cumsum.default", "runs along the token axis", "layers.1", False),
        ("unruled", "aten.renorm.default", "has no token-axis rule", "layers.1", False),
    ],
)
def test_a_token_mixer_inside_the_span(mixer: str, op: str, why: str, module: str, dynamic: bool) -> None:
    """Refused with operator, node, module and source line, and with what to do."""
    found = captured("understanding", layers=3, token_mixer=mixer, dynamic=dynamic)
    with pytest.raises(IllegalRewriteError, match=why) as caught:
        found.seeded(site(0, 2))
    where = caught.value.where
    assert where is not None
    assert (where.op, where.module) == (op, module)
    assert where.node in {n.name for n in found.graph.graph.nodes}
    assert "block 1" in str(caught.value)
    assert op in str(caught.value)
    assert caught.value.help
    if where.source is not None:
        file, _, line = where.source.rpartition(":")
        assert Path(file).name == Path(tiny.__file__).name
        assert line.isdigit()


@pytest.mark.parametrize("mixer", ["conv", *(pytest.param(m, marks=pytest.mark.slow) for m in ("cumsum", "unruled"))])
def test_a_token_mixer_outside_the_span(mixer: str) -> None:
    """Blocks before and after may be thinned; the mixer sees whole rows again."""
    found = captured("understanding", layers=3, token_mixer=mixer)
    for sites in ((site(0, 1, 0.5),), (site(2, 3, 0.5),), (site(0, 1, 0.5), site(2, 3, 0.0))):
        assert tg.verify(found.program, found.apply(*sites, exact=True)).passed


def test_a_site_for_good_runs_through_every_later_block() -> None:
    found = captured("understanding", layers=3, token_mixer="conv")
    with pytest.raises(IllegalRewriteError, match="block 1"):
        found.seeded(site(0, 1, restore=False))


def test_frozen_spans_are_checked_as_well() -> None:
    found = captured("understanding", layers=3, token_mixer="cumsum")
    with pytest.raises(IllegalRewriteError, match="runs along the token axis"):
        found.seeded(site(0, 3, mode="freeze"))


def test_keep_all_is_no_excuse() -> None:
    """A plan is legal or not, whatever its ratio."""
    found = captured("understanding", layers=3, token_mixer="conv")
    with pytest.raises(IllegalRewriteError):
        found.seeded(site(1, 2, 1.0))


class Mixing(models.PreNorm):
    """A layer with a step over normalised rows that mixes tokens in some way."""

    step: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(type(self).step(self.norm2(x)))


def mixing(step: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    return type("Mixing", (Mixing,), {"step": staticmethod(step)})


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda h: h - h.mean(1, keepdim=True), "reduces over the token axis"),
        (lambda h: h.softmax(1), "normalises over the token axis outside an attention"),
        (lambda h: h.flip(1), "runs along the token axis"),
        (lambda h: torch.cat([h[:, 1:], h[:, :1]], 1), "splits, merges, cuts or joins the token axis"),
        (lambda h: h.tril().cumsum(1), "runs along the token axis"),  # which no rule of tril could change
        (lambda h: h.roll(1, 1), "runs along the token axis"),
        (lambda h: h.sort(1).values, "reads or writes tokens by order or index"),
        (lambda h: torch.nn.functional.pad(h, (0, 0, 1, 0))[:, :-1], "splits, merges, cuts or joins the token axis"),
        (
            lambda h: h.reshape(h.shape[0], -1, 2 * h.shape[2]).repeat_interleave(2, 1)[..., :4],
            "token axis|no token-axis rule",
        ),
        (lambda h: h @ (h.transpose(1, 2) @ h), "sums over the token axis outside an attention"),
        (lambda h: h[:, torch.arange(h.shape[1] - 1, -1, -1)], "reads or writes tokens by order or index"),
    ],
    ids=[
        "mean",
        "softmax",
        "flip",
        "cat",
        "no rule beside",
        "roll",
        "sort",
        "shift",
        "pairs",
        "linear attention",
        "gather",
    ],
)
def test_every_way_to_mix_tokens(step: Callable[[Tensor], Tensor], why: str) -> None:
    found = Captured.of(models.spec(mixing(step)), "t")
    with pytest.raises(IllegalRewriteError, match=why) as caught:
        found.seeded(site(0, 1))
    assert caught.value.where is not None
    assert caught.value.where.module is not None
    assert caught.value.where.module.startswith("stages.stage_0")


@pytest.mark.parametrize(
    "block", [models.PreNorm, models.Eager, models.Parallel, models.NormAfter, models.SelfAndCross]
)
def test_blocks_that_are_legal(block: type[nn.Module]) -> None:
    (program,) = [tg.capture(models.spec(block))]
    facts = tg.analyze(program)["t"]
    check_blocks(program["t"].graph, facts, facts.blocks)

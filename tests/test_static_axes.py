"""Static shapes in which every size is the same number: axes are told apart by what operators do, never by their size.

The model below is captured twice without dynamic dimensions: once with all sizes different, once with one number for
the sequence length, the hidden size, heads times head size, the vocabulary, the FFN, and the number of image patches. The
graphs differ in their numbers only, so the facts of both must name the same nodes and axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.harness import Captured
from tokgraph.ir.facts import TaskFacts
from tokgraph.report.report import make_report

BATCH, HEADS, LAYERS, VISUAL = 2, 4, 3, 6


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    vocabulary: int
    ffn: int
    patches: int
    patch: int


DISTINCT = Sizes(tokens=14, hidden=24, vocabulary=20, ffn=28, patches=10, patch=18)
EQUAL = Sizes(*(16,) * 6)


class Attention(nn.Module):
    """Self-attention; query and key are normalised per head with batch and tokens merged."""

    def __init__(self, hidden: int, causal: bool, fused: bool) -> None:
        super().__init__()
        self.causal, self.fused = causal, fused
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.query_norm, self.key_norm = nn.LayerNorm(hidden // HEADS), nn.LayerNorm(hidden // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        per_head = (-1, HEADS, hidden // HEADS)
        split = (batch, tokens, HEADS, hidden // HEADS)
        q = self.query_norm(self.query(x).reshape(per_head)).reshape(split).transpose(1, 2)
        k = self.key_norm(self.key(x).reshape(per_head)).reshape(split).transpose(1, 2)
        v = self.value(x).reshape(split).transpose(1, 2)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if self.causal else None
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-2, -1) * (hidden // HEADS) ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, hidden))


class Block(nn.Module):
    def __init__(self, hidden: int, ffn: int, causal: bool, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = Attention(hidden, causal, fused)
        self.mlp = nn.Sequential(nn.Linear(hidden, ffn), nn.GELU(), nn.Linear(ffn, hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Trap(nn.Module):
    """A unified model with learned positions; its vision encoder sees as many patches as the text has tokens."""

    def __init__(self, sizes: Sizes, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.tokens, sizes.hidden)
        self.patch = nn.Linear(sizes.patch, sizes.hidden)
        self.encoder = Block(sizes.hidden, sizes.ffn, causal=False, fused=fused)
        self.pool = nn.Linear(sizes.patches, VISUAL)
        self.blocks = nn.ModuleList(Block(sizes.hidden, sizes.ffn, True, fused) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary)

    def see(self, patches: Tensor) -> Tensor:
        """``[batch, patches, patch] -> [batch, VISUAL, hidden]``."""
        encoded = self.encoder(self.patch(patches))
        return self.pool(encoded.transpose(1, 2)).transpose(1, 2)

    def read(self, x: Tensor) -> Tensor:
        x = x + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def understand(model: Trap, ids: Tensor, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x = model.embed(ids).masked_scatter((ids == 0).unsqueeze(-1), model.see(patches))
    logits = model.read(x)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), shifted.reshape(-1)), logits


def generate(model: Trap, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The whole sequence is image tokens: as many visual tokens as positions."""
    logits = model.read(model.embed(codes))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), codes[:, 1:].flatten()), logits


@cache
def captured(sizes: Sizes, fused: bool = True) -> Captured:
    torch.manual_seed(0)
    model = Trap(sizes, fused).double()
    ids = torch.randint(1, sizes.vocabulary, (BATCH, sizes.tokens))
    for row in range(BATCH):
        ids[row, 1 + row : 1 + row + VISUAL] = 0
    codes = torch.randint(1, sizes.vocabulary, (BATCH, sizes.tokens))
    patches = torch.randn(BATCH, sizes.patches, sizes.patch, dtype=torch.float64)
    understanding = tg.Task(
        understand,
        {"ids": ids, "patches": patches, "labels": ids.masked_fill(ids == 0, -100)},
        visual=tg.VisualTokens.ids(input="ids", equal=0),
        visual_inputs=("patches",),
        reads="text",
    )
    generation = tg.Task(
        generate,
        {"codes": codes},
        visual=tg.VisualTokens.ids(input="codes", low=1, high=sizes.vocabulary),
        visual_inputs=("codes",),
        reads="visual",
    )
    return Captured.of(tg.ModelSpec(model, {"understanding": understanding, "generation": generation}))


def facts_of(sizes: Sizes, fused: bool, task: str, declared: bool) -> TaskFacts:
    """A task's facts; not ``declared``: as if the user had only named the inputs that carry image content."""
    model = captured(sizes, fused)
    if declared:
        return model.facts[task]
    graph = model.program[task]
    asking = replace(graph, task=replace(graph.task, visual=None))
    return tg.analyze(tg.Program(model.spec, {task: asking}))[task]


def places(facts: TaskFacts) -> dict[str, object]:
    """What facts say of places in the graph: nodes and axes, no sizes."""
    return {
        "entry": facts.entry,
        "blocks": facts.blocks,
        "visual": replace(facts.visual, count=0, most=0, mean=0, step=0, low=None, high=None),
        "exits": facts.exits,
        "windows": [window.node for window in facts.windows],
        "token axes": dict(facts.token_axes),
        "unruled": facts.unruled,
        "parameters": set(facts.profile),
    }


@pytest.mark.slow
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "found"])
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["sdpa", "eager"])
@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_equal_sizes_do_not_change_what_analysis_finds(task: str, fused: bool, declared: bool) -> None:
    expected, actual = (places(facts_of(sizes, fused, task, declared)) for sizes in (DISTINCT, EQUAL))
    for what, places_expected in expected.items():
        assert actual[what] == places_expected, what


def test_sizes_are_those_of_the_example_batch() -> None:
    facts = captured(EQUAL).facts
    assert [len(f.blocks) for f in facts.values()] == [LAYERS, LAYERS]
    assert facts["understanding"].visual.count == VISUAL
    assert facts["generation"].visual.count == facts["generation"].demand.tokens == EQUAL.tokens
    assert all(not f.unruled for f in facts.values())


@dataclass(frozen=True)
class Case:
    """A plan, and the visual rows that its blocks compute in each task."""

    sites: tuple[tg.DropSite, ...]
    understanding: list[float]
    generation: list[float]


CASES = {
    "exact": Case((), [6, 6, 1], [16, 16, 16]),
    "hide": Case((tg.DropSite("", 1, 2, 0.5),), [6, 3, 1], [16, 8, 16]),
    "hide from the start": Case((tg.DropSite("", 0, 2, 0.5, "random"),), [3, 3, 1], [8, 8, 16]),
    "hide all": Case((tg.DropSite("", 0, 2, 0.0),), [0, 0, 1], [0, 0, 16]),
    "freeze": Case((tg.DropSite("", 0, None, 0.0, mode="freeze"),), [0, 0, 0], [0, 0, 0]),
    "freeze some": Case((tg.DropSite("", 0, 2, 0.5, mode="freeze"),), [3, 3, 1], [8, 8, 16]),
    "hide for good": Case((tg.DropSite("", 0, None, 0.5, restore=False),), [3, 3, 1], [16, 16, 16]),
}


@pytest.mark.parametrize(
    "name",
    [name if "for good" in name or "some" in name else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
@pytest.mark.parametrize(
    "fused", [pytest.param(True, id="sdpa"), pytest.param(False, id="eager", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("task", ["understanding", pytest.param("generation", marks=pytest.mark.slow)])
def test_it_agrees_with_the_oracle(task: str, fused: bool, name: str) -> None:
    sites = tuple(replace(site, task=task) for site in CASES[name].sites)
    accelerated = captured(EQUAL, fused).apply(tg.Plan(sites, exact=True), task)
    tg.verify(accelerated.captured, accelerated).raise_if_failed()
    report = make_report(accelerated)
    assert report["tasks"][task]["tokens_per_block"]["after"] == getattr(CASES[name], task)
    assert 0 < report["coverage"] <= 1
    assert report["flops_ratio"] <= 1

"""Decoder blocks and their attentions, found without names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.passes import models
from tests.passes.models import IMAGE_ID
from tokgraph.errors import AnalysisError
from tokgraph.ir.facts import TaskFacts


def facts_of(spec: tg.ModelSpec) -> TaskFacts:
    (found,) = tg.analyze(tg.capture(spec)).values()
    return found


@pytest.mark.parametrize(
    "block", [models.PreNorm, models.Parallel, models.NormAfter, models.SelfAndCross, models.Eager]
)
def test_every_layer_is_one_block(block: type[nn.Module]) -> None:
    facts = facts_of(models.spec(block, depth=3))
    assert [b.module for b in facts.blocks] == [f"stages.stage_{i}.0" for i in range(3)]
    assert [b.index for b in facts.blocks] == [0, 1, 2]
    assert facts.stream == (facts.blocks[0].start, *(b.end for b in facts.blocks))
    assert facts.unruled == ()


def test_self_and_cross_attention_belong_to_one_block() -> None:
    facts = facts_of(models.spec(models.SelfAndCross))
    assert [[a.kind for a in b.attention] for b in facts.blocks] == [["sdpa", "sdpa"]] * 2


def test_the_operands_of_a_fused_attention() -> None:
    program = tg.capture(models.spec(models.PreNorm, depth=1))
    (facts,) = tg.analyze(program).values()
    ((attention,),) = (b.attention for b in facts.blocks)
    node = next(n for n in program["t"].graph.nodes if n.name == attention.node)
    assert attention.output == attention.node
    assert [(k.role, k.node, k.axis) for k in attention.keys] == [
        ("key", node.args[1].name, 2),
        ("value", node.args[2].name, 2),
    ]


def test_the_operands_of_an_eager_attention() -> None:
    """The scores that softmax normalises, and the values of the matmul that its weights reach through dropout."""
    program = tg.capture(models.spec(models.Eager, depth=1))
    (facts,) = tg.analyze(program).values()
    ((attention,),) = (b.attention for b in facts.blocks)
    nodes = {n.name: n for n in program["t"].graph.nodes}
    assert attention.kind == "eager"
    assert nodes[attention.node].target is torch.ops.aten.softmax.int
    assert nodes[attention.output].target is torch.ops.aten.matmul.default
    scores, values = attention.keys
    assert (scores.role, scores.user, scores.axis) == ("scores", attention.node, 3)
    assert (values.role, values.user, values.axis) == ("value", attention.output, 2)
    assert nodes[attention.output].args[1] is nodes[values.node]


def layer(x: Tensor, weight: Tensor) -> Tensor:
    h = F.layer_norm(x, x.shape[-1:])
    rows = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], is_causal=True)[:, 0]
    x = x + rows @ weight
    return x + torch.tanh(F.layer_norm(x, x.shape[-1:]) @ weight)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 4))
        self.weight = nn.Parameter(torch.randn(4, 4))


def functional(model: Weights, ids: Tensor) -> Tensor:
    """Three layers out of functions: export records no module for any node."""
    x = F.embedding(ids, model.table)
    for _ in range(3):
        x = layer(x, model.weight)
    return F.cross_entropy((x @ model.table.t()).flatten(0, 1), ids.masked_fill(ids == IMAGE_ID, -100).flatten())


def test_a_model_without_modules_has_blocks_all_the_same() -> None:
    task = tg.Task(
        functional, {"ids": models.image_ids()}, visual=tg.VisualTokens.ids(input="ids", equal=IMAGE_ID), reads="text"
    )
    spec = tg.ModelSpec(Weights(), {"t": task})
    facts = facts_of(spec)
    assert [b.module for b in facts.blocks] == ["", "", ""]
    assert [len(b.attention) for b in facts.blocks] == [1, 1, 1]
    accelerated = tg.apply(program := tg.capture(spec), tg.Plan((tg.DropSite("t", 1, 2, 0.5),), exact=True))
    assert tg.verify(program, accelerated).passed


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(AnalysisError, match="no attention over the residual stream was found") as caught:
        facts_of(models.spec(models.NoAttention))
    assert "scaled_dot_product_attention" in str(caught.value.help)


def tokens_first(model: models.Decoder, ids: Tensor) -> Tensor:
    x = model.tokens(ids).transpose(0, 1) * 2.0
    for stage in model.stages.values():
        x = stage(x)
    return F.cross_entropy(model.head(x).flatten(0, 1), ids.t().flatten())


def flat(model: models.Decoder, ids: Tensor) -> Tensor:
    """The stream is ``[tokens, hidden]``."""
    x = model.tokens(ids[0]) * 2.0
    for stage in model.stages.values():
        for part in stage:
            x = x + part.attention(part.norm1(x).unsqueeze(0)).squeeze(0)
    return F.cross_entropy(model.head(x), ids[0])


def test_a_stream_whose_tokens_are_first_is_found() -> None:
    task = tg.Task(tokens_first, {"ids": models.image_ids()}, visual=tg.VisualTokens.positions(slice(1, 3)))
    spec = tg.ModelSpec(models.decoder(models.TokensFirst), {"t": task})
    facts = facts_of(spec)
    assert [len(block.attention) for block in facts.blocks] == [1, 1]
    accelerated = tg.apply(program := tg.capture(spec), tg.Plan((tg.DropSite("t", 0, 1, 0.5),)))
    assert tg.verify(program, accelerated).passed


def test_a_stream_without_samples_is_refused() -> None:
    task = tg.Task(flat, {"ids": models.image_ids()}, visual=tg.VisualTokens.positions(slice(1, 3)))
    with pytest.raises(AnalysisError) as caught:
        facts_of(tg.ModelSpec(models.decoder(models.PreNorm), {"t": task}))
    message = str(caught.value)
    assert "(8, 4)" in message
    assert "tokens on axis 0" in message
    assert "[batch, tokens, ...]" in message
    assert "packed, one after the other, are a batch of one" in message


class Product(nn.Module):
    """Scores that are averaged, not normalised, over keys: no attention that tokgraph knows."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = models.PreNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])
        return self.inner(x + scores @ x)


def test_a_mix_that_is_no_attention_is_found_and_refused_inside_a_span() -> None:
    spec = models.spec(Product)
    program = tg.capture(spec)
    facts = tg.analyze(program)
    with pytest.raises(tg.IllegalRewriteError, match=r"sums over the token axis outside an attention") as caught:
        tg.apply(program, tg.Plan((tg.DropSite("t", 0, 1, 0.5),)), facts=facts)
    assert caught.value.where is not None
    assert caught.value.where.op == "aten.matmul.default"

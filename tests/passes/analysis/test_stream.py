"""The residual stream of many architectures: cut points from structure alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokgraph as tg
from tests.passes import models
from tests.passes.tools import traced
from tokgraph.errors import AnalysisError
from tokgraph.ir.program import loss_node
from tokgraph.passes.analysis.stream import residual_segments


def segments_of(spec: tg.ModelSpec) -> list[tuple[str, list[str]]]:
    """Module of every segment, and the operators that begin and end it."""
    (graph,) = tg.capture(spec).values()
    return [(s.module, [str(s.start.target), str(s.end.target)]) for s in residual_segments(graph)]


EMBEDDING, ADD, SCALE = "aten.embedding.default", "aten.add.Tensor", "aten.mul.Tensor"


def test_attention_and_ffn_are_segments_of_their_own() -> None:
    found = segments_of(models.spec(models.PreNorm))
    assert [ops for _, ops in found] == [[EMBEDDING, ADD], [ADD, ADD], [ADD, ADD], [ADD, ADD]]
    assert [module for module, _ in found] == [f"stages.stage_{i}.0" for i in (0, 0, 1, 1)]


def test_a_parallel_layer_is_one_segment() -> None:
    """``x + attn(n(x))`` is no cut point: the FFN goes around it."""
    found = segments_of(models.spec(models.Parallel))
    assert [module for module, _ in found] == ["stages.stage_0.0", "stages.stage_1.0"]


def test_norms_after_the_sublayer_leave_the_stream_alone() -> None:
    assert len(segments_of(models.spec(models.NormAfter))) == 4


def test_a_scaled_embedding_begins_the_stream() -> None:
    """The scaled value is what blocks add to, not the embedding."""
    found = segments_of(models.spec(models.PreNorm, scale=2.0))
    assert [ops for _, ops in found] == [[SCALE, ADD], [ADD, ADD], [ADD, ADD], [ADD, ADD]]


def test_segments_hold_what_their_end_is_computed_from() -> None:
    (graph,) = tg.capture(models.spec(models.PreNorm)).values()
    segments = residual_segments(graph)
    for before, after in zip(segments, segments[1:], strict=False):
        assert before.end is after.start
    for segment in segments:
        assert segment.start not in segment.nodes
        assert segment.nodes[-1] is segment.end
        assert all(n.op == "call_function" for n in segment.nodes)
    nodes = [n for s in segments for n in s.nodes]
    assert len(nodes) == len(set(nodes))


def test_a_model_without_a_residual_stream_is_refused() -> None:
    with pytest.raises(AnalysisError, match="no residual stream|no attention over the residual stream"):
        tg.analyze(tg.capture(models.spec(models.NoResidual)))


def test_a_loss_without_content_is_refused() -> None:
    graph = traced(lambda ids: (ids.sum() * 1.0,), torch.arange(4))
    with pytest.raises(AnalysisError, match="does not depend on any embedded or float input"):
        residual_segments(graph)


def test_the_loss_is_the_first_scalar_float() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x, (x > 0).sum(), F.relu(x).sum(), x.mean()

    graph = traced(function, torch.rand(3))
    assert str(loss_node(graph).target) == "aten.sum.default"
    with pytest.raises(AnalysisError, match="no output of the graph is a scalar loss"):
        loss_node(traced(lambda x: (x + 1,), torch.rand(3)))

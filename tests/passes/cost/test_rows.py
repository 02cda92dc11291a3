"""Rows followed along the axes of values: merged and parted, forwards and back, through rewritten graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.passes import models
from tests.passes.tools import Captured, calls, captured, site
from tokgraph.ir.tensors import tensor_name
from tokgraph.passes.cost.pathways import lean_graph, pathways
from tokgraph.passes.cost.rows import SAMPLES, held_rows, place_rows, row_spaces, visual_rows

aten = torch.ops.aten
ALL = ()


class Positions(models.Decoder):
    """Learned positions, a head that reads merged rows, a layer on tokens and samples merged the other way round."""

    def __init__(self) -> None:
        super().__init__(models.PreNorm, depth=3)
        self.positions = nn.Embedding(models.TOKENS, 4)
        self.extra = nn.Linear(4, 4)


def positions_loss(model: Positions, ids: Tensor) -> Tensor:
    x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1], device=ids.device))
    for stage in model.stages.values():
        x = stage(x)
    merged = F.gelu(model.extra(x.transpose(0, 1).flatten(0, 1)))
    x = x + merged.unflatten(0, (ids.shape[1], ids.shape[0])).transpose(0, 1)
    labels = F.pad(ids.masked_fill(ids == models.IMAGE_ID, -100), (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(model.head(model.norm(x).flatten(0, 1)), labels.flatten())


@pytest.fixture(scope="module", params=["static", "dynamic"])
def positions(request: pytest.FixtureRequest) -> Captured:
    torch.manual_seed(0)
    task = tg.Task(
        positions_loss,
        {"ids": models.image_ids()},
        dynamic={"ids": {0: "batch"}} if request.param == "dynamic" else None,
        visual=tg.VisualTokens.ids(input="ids", equal=models.IMAGE_ID),
        reads="text",
    )
    return Captured.of(tg.ModelSpec(Positions().double(), {"t": task}), "t")


def reader(graph: tg.TaskGraph, parameter: str) -> fx.Node:
    """The node that reads a parameter."""
    (user,) = next(n for n in graph.graph.nodes if tensor_name(n) == parameter).users
    return user


def test_rows_of_no_sample_are_rows(positions: Captured) -> None:
    """Of a table of positions that is added to the stream, and of the table of ids before it."""
    held = held_rows(positions.graph.graph, positions.facts)
    table, ids = (reader(positions.graph, f"{name}.weight") for name in ("positions", "tokens"))
    assert held[table, 0] == (ALL,)
    assert (held[ids, 0], held[ids, 1]) == ((SAMPLES,), (ALL,))
    assert place_rows(table, held, {ALL: torch.ones(2, models.TOKENS).bool()}) is None
    assert {positions.facts.profile[f"{name}.weight"] for name in ("positions", "tokens", "head", "extra")} == {1.0}


def test_merged_axes_hold_both(positions: Captured) -> None:
    held = held_rows(positions.graph.graph, positions.facts)
    head = reader(positions.graph, "head.weight")
    assert held[head, 0] == (SAMPLES, ALL)
    visual = positions.graph.task.inputs["ids"] == models.IMAGE_ID
    mask = place_rows(head, held, {ALL: visual})
    assert mask is not None
    assert torch.equal(mask, visual.reshape(-1, 1))
    after = [n for n in calls(positions.graph, aten.gelu.default) if "stages" not in str(n.meta["nn_module_stack"])]
    merged = place_rows(after[0], held, {ALL: visual})
    assert merged is not None
    assert torch.equal(merged.reshape(-1), visual.T.reshape(-1))


def test_a_rewritten_graph_passes_as_many_rows_through_its_tables(positions: Captured) -> None:
    """Rows are followed back through selections: hiding rows later does not thin what was looked up before."""
    graph = positions.rewritten(site(1, 2, 0.0))
    shares = pathways(graph, positions.facts).profile
    assert {shares[f"{name}.weight"] for name in ("positions", "tokens", "head", "extra")} == {1.0}
    assert {share for name, share in shares.items() if "stage_1" in name} == {0.0}


def test_rows_before_text_and_visual_rows_meet_are_not_followed() -> None:
    """Text embeddings hold no visual rows, although ``where`` computes its result row by row from them."""

    def understand(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        image = F.pad(model.patches(patches), (0, 0, 2, ids.shape[1] - 2 - tiny.IMAGE))
        x = torch.where((ids == tiny.IMAGE_ID).unsqueeze(-1), image, model.embed(ids))
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(model.head(model.backbone(x)).flatten(0, 1), shifted.flatten())

    spec = tiny.build(layers=2, dynamic=False)
    task = replace(spec.tasks["understanding"], forward=understand, visual=None, visual_inputs=("patches",))
    task.inputs["ids"][0] = task.inputs["ids"][1]  # the image at the same place in both samples
    found = Captured.of(tg.ModelSpec(spec.model, {"t": task}), "t")
    assert found.facts.profile["embed.weight"] == 0
    assert found.facts.profile["patches.weight"] == 1


def test_a_convolution_that_keeps_the_number_of_rows_keeps_rows() -> None:
    found = captured("understanding", layers=3, token_mixer="conv")
    (conv,) = calls(found.graph, aten.conv1d.default)
    assert row_spaces(found.graph.graph, found.facts)[conv, 2] == ALL
    inside = {n: share for n, share in found.facts.profile.items() if n.startswith("layers.1.")}
    assert {"layers.1.conv.weight", "layers.1.mlp.0.weight"} < inside.keys()
    assert set(inside.values()) == {1.0}


def test_which_rows_of_a_chain_are_visual() -> None:
    """Of a nested chain, by hand: the first index leaves out row 0, the second the last row that is left."""
    found = captured("understanding")
    graph = lean_graph(found.graph, found.facts)
    chains = set(row_spaces(graph.graph, found.facts).values())
    ids = found.graph.task.inputs["ids"]
    rows = visual_rows(graph, ids == tiny.IMAGE_ID, chains)
    assert torch.equal(rows[ALL], ids == tiny.IMAGE_ID)
    (demanded,) = chains - {ALL}
    text = [
        [i for i in range(11) if row[i] != tiny.IMAGE_ID or (i < 10 and row[i + 1] != tiny.IMAGE_ID)] for row in ids
    ]
    expected = torch.stack([(row == tiny.IMAGE_ID)[at] for row, at in zip(ids, text, strict=True)])
    assert torch.equal(rows[demanded], expected)

"""Where nodes belong, told by structure, against what the modules' names say: analysis does not read those."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import fx

import tokgraph as tg
from tests import tiny as small
from tests.harness import Captured, captured_tiny
from tests.passes import models
from tokgraph.passes.lower import Place, lower_program, places_of
from tokgraph.passes.lower.places import KINDS, place_of

U, G = "understanding", "generation"
TASKS = (U, G)


@pytest.fixture(scope="module")
def tiny() -> Captured:
    return captured_tiny(2)


@pytest.fixture(scope="module")
def thinned(tiny: Captured) -> tg.Accelerated:
    return tiny.apply(tg.Plan((tg.DropSite(U, 1, 2, 0.5), tg.DropSite(G, 1, 2, 0.5)), exact=True))


@pytest.fixture(scope="module")
def eager() -> Captured:
    return Captured.of(models.spec(models.Eager, depth=1))


def calls(graph: tg.TaskGraph) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def on_tensors(graph: tg.TaskGraph) -> list[fx.Node]:
    """Calls that make tensors: sizes belong to no module."""
    return [node for node in calls(graph) if isinstance(node.meta["val"], torch.Tensor)]


def by_names(
    block: str, kinds: Mapping[str, str], rest: Mapping[str, str]
) -> Callable[[tg.TaskGraph], dict[str, tuple]]:
    """Name -> (block, kind), as module names have it; the two additions of a block come after attention and after FFN.

    Args:
        block: pattern of a block's path, its number in a group.
        kinds: first part of a path inside a block -> kind.
        rest: path outside blocks -> kind.
    """

    def expected(graph: tg.TaskGraph) -> dict[str, tuple[int | None, str]]:
        found: dict[str, tuple[int | None, str]] = {}
        additions: Counter[int] = Counter()
        for node in on_tensors(graph):
            path = next((p for p, _ in reversed(node.meta.get("nn_module_stack", {}).values()) if p), "")
            inside = re.fullmatch(block + r"(?:\.(.*))?", path)
            if inside is None:
                if path.partition(".")[0] in rest:
                    found[node.name] = (None, rest[path.partition(".")[0]])
                continue
            number, name = int(inside[1]), (inside[2] or "").partition(".")[0]
            if name:
                found[node.name] = (number, kinds[name])
            else:
                assert node.target is torch.ops.aten.add.Tensor
                found[node.name] = (number, ("attention", "ffn")[additions[number]])
                additions[number] += 1
        assert set(additions.values()) == {2}
        return found

    return expected


TINY = by_names(
    r"layers\.(\d+)",
    {"norm1": "norm", "norm2": "norm", "attention": "attention", "mlp": "ffn"},
    {"embed": "input", "codes": "encoder", "patches": "encoder", "norm": "head", "head": "head", "code_head": "head"},
)
DIGITS = by_names(
    r"blocks\.(\d+)",
    {"attention_norm": "norm", "feed_forward_norm": "norm", "attention": "attention", "feed_forward": "ffn"},
    {"embed": "input", "patch_encoder": "encoder", "norm": "head", "head": "head"},
)
STAGES = by_names(
    r"stages\.stage_(\d+)\.0",
    {"norm1": "norm", "norm2": "norm", "attention": "attention", "mlp": "ffn"},
    {"tokens": "input", "norm": "head", "head": "head"},
)


def check(graph: tg.TaskGraph, facts: tg.TaskFacts, expected: dict[str, tuple[int | None, str]]) -> None:
    places = places_of(graph)
    assert list(places) == [node.name for node in calls(graph)]
    assert {name: place.node for name, place in places.items()} == {name: name for name in places}
    assert len(expected) > 15
    assert {name: (places[name].block, places[name].kind) for name in expected} == expected


@pytest.mark.parametrize("task", TASKS)
def test_a_fused_attention(tiny: Captured, task: str) -> None:
    check(tiny.program[task], tiny.facts[task], TINY(tiny.program[task]))


@pytest.mark.parametrize("task", TASKS)
def test_rotary_positions_and_a_gated_ffn(digits_example: Captured, task: str) -> None:
    check(digits_example.program[task], digits_example.facts[task], DIGITS(digits_example.program[task]))


MASK = (torch.ops.aten.ones.default, torch.ops.aten.tril.default, torch.ops.aten.bitwise_not.default)


def test_attention_written_out(eager: Captured) -> None:
    """Scores, softmax and weighted sum are attention; the mask it makes is left to the next test."""
    graph = eager.program["t"]
    masks = {node.name for node in calls(graph) if node.target in MASK}
    assert len(masks) == 3
    check(graph, eager.facts["t"], {n: x for n, x in STAGES(graph).items() if n not in masks})


def test_a_mask_made_in_a_block_is_no_norm(eager: Captured) -> None:
    places = places_of(eager.program["t"])
    made = [places[node.name] for node in calls(eager.program["t"]) if node.target in MASK]
    assert [(place.block, place.kind) for place in made] == [(0, "attention")] * 3


@pytest.mark.parametrize("block", [models.Parallel, models.NormAfter])
def test_other_architectures(block: Callable[[int], torch.nn.Module]) -> None:
    """An FFN beside the attention; norms after both."""
    captured = Captured.of(models.spec(block, depth=1))
    check(captured.program["t"], captured.facts["t"], STAGES(captured.program["t"]))


def test_a_second_attention_in_a_block() -> None:
    captured = Captured.of(models.spec(models.SelfAndCross, depth=1))
    places = places_of(captured.program["t"])
    cross = {place.kind for place in places.values() if ".cross" in place.module}
    assert cross == {"attention"}
    assert {place.kind for place in places.values() if ".mlp" in place.module} == {"ffn"}


def test_what_follows_the_last_block_is_head_the_loss_too(tiny: Captured) -> None:
    for task in TASKS:
        graph, places = tiny.program[task], places_of(tiny.program[task])
        order = [node.name for node in calls(graph)]
        last = max(order.index(name) for name, place in places.items() if place.block == 1)
        assert {places[name].kind for name in order[last + 1 :]} == {"head"}
        loss = next(n for n in calls(graph) if n.target is torch.ops.aten.cross_entropy_loss.default)
        assert places[loss.name].kind == "head"


@pytest.mark.parametrize("task", TASKS)
def test_what_comes_before_the_first_block_is_no_head(digits_example: Captured, task: str) -> None:
    """Tables of rotary positions are made after the embeddings and before the blocks."""
    graph = digits_example.program[task]
    places = places_of(graph)
    order = [node.name for node in calls(graph)]
    first = min(order.index(name) for name, place in places.items() if place.block == 0)
    tables = [n.name for n in calls(graph) if n.target in (torch.ops.aten.cos.default, torch.ops.aten.sin.default)]
    assert len(tables) == 2
    assert all(order.index(name) < first for name in tables)
    assert {places[name].kind for name in order[:first]} <= {"input", "encoder"}


def test_the_encoder_is_what_makes_visual_rows(digits_example: Captured) -> None:
    """Patches are cut and encoded; where they enter the stream, and what generation does, is none of the encoder's."""
    graph = digits_example.program[U]
    places = places_of(graph)
    pixels = next(n for n in graph.graph.nodes if n.name == "pixel_values")
    enters = next(n for n in calls(graph) if n.target is torch.ops.aten.masked_scatter.default)
    encoder = {node.name for node in on_tensors(graph) if places[node.name].kind == "encoder"}
    reached, stack = set(), [pixels]
    while stack:
        for user in stack.pop().users:
            if user is not enters and isinstance(user.meta["val"], torch.Tensor):
                reached.add(user.name)
                stack.append(user)
    assert encoder == reached
    assert len(encoder) > 5
    assert places[enters.name].kind == "input"
    generation = places_of(digits_example.program[G])
    assert "encoder" not in {place.kind for place in generation.values()}


def test_modules_are_modules_of_the_model(tiny: Captured, digits_example: Captured) -> None:
    for captured in (tiny, digits_example):
        names = dict(captured.model.named_modules())
        for task in TASKS:
            places = places_of(captured.program[task])
            assert {place.module for place in places.values()} <= names.keys()


# After a rewrite.


@pytest.mark.parametrize("task", TASKS)
def test_a_captured_graph_drops_nothing(tiny: Captured, digits_example: Captured, task: str) -> None:
    for captured in (tiny, digits_example):
        assert "drop" not in {p.kind for p in places_of(captured.program[task]).values()}


@pytest.mark.parametrize("task", TASKS)
def test_what_a_rewrite_adds_is_drop_and_the_rest_stays(tiny: Captured, thinned: tg.Accelerated, task: str) -> None:
    before = places_of(tiny.program[task])
    after = places_of(thinned.program[task])
    graph = thinned.program[task]
    assert list(after) == [node.name for node in calls(graph)]
    ours = {n.name for n in calls(graph) if getattr(n.target, "namespace", "") == "tokgraph"}
    dropped = {name for name, place in after.items() if place.kind == "drop"}
    assert any("restore" in name for name in ours)
    assert ours <= dropped
    assert dropped.isdisjoint(before), "nothing of the model's own drops rows"
    made_by = {node.name for node in calls(graph) if "made_by" in node.meta}
    assert dropped - ours <= made_by
    kept = [name for name in after if name in before]
    assert len(kept) > 30
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize("task", TASKS)
def test_work_of_the_model_that_a_rewrite_makes_anew_is_no_drop(
    tiny: Captured, thinned: tg.Accelerated, task: str
) -> None:
    """Contractions and norms count the same by block and kind, whatever their nodes are called."""
    aten = torch.ops.aten
    heavy = (aten.linear.default, aten.layer_norm.default, aten.scaled_dot_product_attention.default, aten.gelu.default)

    def count(graph: tg.TaskGraph) -> Counter[tuple[object, ...]]:
        places = places_of(graph)
        found = [(n.target, places[n.name]) for n in calls(graph) if n.target in heavy]
        return Counter((target, place.module, place.block, place.kind) for target, place in found)

    assert count(thinned.program[task]) == count(tiny.program[task])


@pytest.mark.parametrize("task", TASKS)
def test_drops_of_a_block_are_in_it(thinned: tg.Accelerated, tiny: Captured, task: str) -> None:
    graph = thinned.program[task]
    places = places_of(graph)
    restores = [places[n.name] for n in calls(graph) if n.target is torch.ops.tokgraph.restore.default]
    assert [place.block for place in restores] == [1]


# Without facts.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", ["captured", "thinned"])
def test_nodes_carry_their_places(tiny: Captured, thinned: tg.Accelerated, task: str, variant: str) -> None:
    """As the nodes of a loaded graph do: each has the place of the node that it was lowered from."""
    graph = tiny.program[task] if variant == "captured" else thinned.program[task]
    fresh = places_of(graph)
    lowered = lower_program(graph).module
    again = replace(graph, graph_module=lowered)
    places = places_of(again)
    origin = {node.name: place_of(node)["node"] for node in calls(again)}  # type: ignore[index]
    assert list(places) == list(origin)
    assert {name: replace(place, node=origin[name]) for name, place in places.items()} == {
        name: fresh[of] for name, of in origin.items()
    }
    tensors = {node.name for node in on_tensors(graph)}
    assert tensors <= set(origin.values()), "every node that makes a tensor has one that stands for it"


def test_a_graph_that_was_not_analysed_has_no_places() -> None:
    graph = tg.capture(small.build(layers=1, dynamic=False))[G]
    assert places_of(graph) == {}
    assert next(place_of(node) for node in calls(graph)) is None


def test_kinds_are_those_of_the_type(tiny: Captured) -> None:
    found = {p.kind for task in TASKS for p in places_of(tiny.program[task]).values()}
    assert found == {*KINDS} - {"drop", "optimizer"}
    assert isinstance(next(iter(places_of(tiny.program[U]).values())), Place)

"""FastV and PyramidDrop drop what the published rules drop, by transformers' own eager attention weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokgraph as tg
from tests import tiny
from tests.conftest import unrounded_softmax
from tests.harness import Captured, captured_tiny
from tests.planning.facts import G, U, facts
from tokgraph.ir.evaluate import evaluate
from tokgraph.ir.program import TaskGraph
from tokgraph.planning.check import check_plan

pytest.importorskip("transformers")
from tests.reference import janus

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

IMAGE, IMAGE_TOKENS = 255, 16
Inputs = dict[str, Tensor]


@pytest.fixture(scope="module")
def eager() -> Iterator[torch.nn.Module]:
    """The same weights as the captured model, with attention weights that can be looked at."""
    model = janus.tiny_janus()
    model.set_attn_implementation({"text_config": "eager"})
    with mock.patch.object(F, "softmax", unrounded_softmax):
        yield model


def batch(seed: int) -> Inputs:
    """Three samples: the image elsewhere in each, padding in the second, answers of four, five and six tokens."""
    inputs = janus.tiny_understanding_batch(3, seed=seed)
    for row in range(3):
        first = int((inputs["labels"][row] != -100).nonzero()[0])
        inputs["labels"][row, first - row : first] = inputs["input_ids"][row, first - row : first]
    return inputs


def prompts(inputs: Inputs) -> list[int]:
    """The last token before each sample's answer."""
    return [int((row != -100).nonzero()[0]) - 1 for row in inputs["labels"]]


def droppable(inputs: Inputs, row: int) -> list[int]:
    """Image positions but the last: its row predicts the word that follows."""
    return (inputs["input_ids"][row] == IMAGE).nonzero().flatten().tolist()[:-1]


def best(mass: Tensor, free: list[int], count: int) -> list[int]:
    """``count`` of the positions ``free``, those paid most; of equals the earlier."""
    return sorted(sorted(free, key=lambda i: (-float(mass[i]), i))[:count])


@torch.no_grad()
def published_fastv(model: torch.nn.Module, inputs: Inputs, k: int, keep: int) -> list[list[int]]:
    """Image positions that stay: ``keep`` of each sample, with the last one among them."""
    given = {name: x for name, x in inputs.items() if name != "labels"}
    weights = model(**given, use_cache=False, output_attentions=True).attentions[k - 1]  # [batch, heads, rows, keys]
    chosen = []
    for row, prompt in enumerate(prompts(inputs)):
        *free, last = (inputs["input_ids"][row] == IMAGE).nonzero().flatten().tolist()
        chosen.append([*best(weights[row, :, prompt].mean(0), free, keep - 1), last])
    return chosen


@torch.no_grad()
def published_pyramid(model: torch.nn.Module, inputs: Inputs, stages: dict[int, int]) -> list[list[list[int]]]:
    """Stage -> sample -> image positions that stay. ``stages``: first block -> tokens kept; rows are really removed."""
    given = {name: x for name, x in inputs.items() if name != "labels"}
    streams = model(**given, use_cache=False, output_hidden_states=True).hidden_states[0]
    decoder = model.model.language_model
    found: list[list[list[int]]] = [[] for _ in stages]
    for row, prompt in enumerate(prompts(inputs)):
        positions = torch.arange(streams.shape[1])
        stream = streams[row : row + 1]
        turns = decoder.rotary_emb(stream, positions.unsqueeze(0))
        image = set((inputs["input_ids"][row] == IMAGE).nonzero().flatten().tolist())
        real = inputs["attention_mask"][row].bool()
        mass = torch.zeros(len(positions))
        for number, layer in enumerate(decoder.layers):
            if number in stages:
                alive = [i for i in positions.tolist() if i in image]
                stay = {*best(mass, alive[:-1], stages[number] - 1), alive[-1]}
                found[list(stages).index(number)].append(sorted(stay))
                rows = torch.tensor([j for j, i in enumerate(positions.tolist()) if i not in image or i in stay])
                positions, stream = positions[rows], stream[:, rows]
                turns = tuple(x[:, rows] for x in turns)
            seen = (positions.unsqueeze(1) >= positions) & real[positions]
            mask = torch.zeros(seen.shape, dtype=stream.dtype).masked_fill(~seen, -1e30)[None, None]
            turned = {"attention_mask": mask, "position_embeddings": turns}
            weights = layer.self_attn(layer.input_layernorm(stream), **turned)[1]
            at = int((positions == prompt).nonzero())
            mass = torch.zeros(streams.shape[1], dtype=stream.dtype).scatter(0, positions, weights[0, :, at].mean(0))
            stream = layer(stream, **turned)
    return found


def kept(rewritten: TaskGraph, inputs: Inputs) -> list[list[list[int]]]:
    """Stage -> sample -> image positions that stay, by the indices that the rewritten graph computes and uses."""
    nodes = [n for n in rewritten.graph.nodes if n.target is torch.ops.tokgraph.keep_rows.default]
    asked = replace(rewritten, task=replace(rewritten.task, inputs=inputs))
    found, around = [], None
    for index in evaluate(asked, nodes):
        around = index if around is None else around.gather(1, index)
        image = inputs["input_ids"] == IMAGE
        found.append([[i for i in rows if image[b, i]] for b, rows in enumerate(around.tolist())])
    return found


@pytest.fixture(scope="module")
def fastv(captured_janus) -> dict[int, TaskGraph]:
    """The rewritten understanding task by K."""
    model: Captured = captured_janus()
    plans = {k: tg.make_plan(model.program, "fastv", facts=model.facts, k=k) for k in (1, 3)}
    return {k: model.apply(plan, U).program[U] for k, plan in plans.items()}


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_fastv_keeps_what_the_prompt_attends_to_most(eager, fastv, k: int) -> None:
    seen = set()
    for seed in range(4):
        inputs = batch(seed)
        assert len({b - a for a, b in zip(prompts(inputs), (28, 26, 28), strict=True)}) == 3  # answers differ in length
        chosen = published_fastv(eager, inputs, k, keep=8)
        assert kept(fastv[k], inputs) == [chosen]
        seen |= {tuple(i - droppable(inputs, row)[0] for i in rows) for row, rows in enumerate(chosen)}
    assert len(seen) > 6, "the choices hardly differ: this test would not notice a wrong rule"


@pytest.mark.slow
def test_the_row_and_the_block_matter(eager, fastv) -> None:
    """The comparison above is a sharp one: the rule at another row or block chooses otherwise."""
    inputs = batch(0)
    chosen = published_fastv(eager, inputs, 3, 8)
    assert published_fastv(eager, inputs, 2, 8) != chosen
    later = {**inputs, "labels": inputs["labels"].clone()}
    for row, prompt in enumerate(prompts(inputs)):
        later["labels"][row, prompt + 1] = -100  # one more token of prompt
    assert published_fastv(eager, later, 3, 8) != chosen
    assert kept(fastv[3], later) == [published_fastv(eager, later, 3, 8)]


def test_answers_do_not_choose(fastv) -> None:
    inputs = batch(1)
    other = {name: x.clone() for name, x in inputs.items()}
    for row, prompt in enumerate(prompts(inputs)):
        answer = inputs["labels"][row] != -100
        other["input_ids"][row, answer] = (inputs["input_ids"][row, answer] * 7 + 3) % 200 + 1
        other["labels"][row, answer] = other["input_ids"][row, answer]
        assert (other["input_ids"][row, prompt + 1 :] != inputs["input_ids"][row, prompt + 1 :]).any()
    assert kept(fastv[3], other) == kept(fastv[3], inputs)
    for row, prompt in enumerate(prompts(inputs)):
        other["input_ids"][row, prompt] = other["input_ids"][row, prompt] % 200 + 1
    assert kept(fastv[3], other) != kept(fastv[3], inputs), "the prompt does choose"


def test_pyramiddrop_chooses_among_what_is_left(captured_janus, eager) -> None:
    model: Captured = captured_janus()
    plan = tg.make_plan(model.program, "pyramiddrop", facts=model.facts)
    rewritten = model.apply(plan, U).program[U]
    for seed in (0, 1):
        inputs = batch(seed)
        chosen = kept(rewritten, inputs)
        assert chosen == published_pyramid(eager, inputs, {1: 8, 2: 4, 3: 2})
        for outer, inner in zip(chosen, chosen[1:], strict=False):
            assert all(set(b) < set(a) for a, b in zip(outer, inner, strict=True))


@pytest.mark.slow
def test_eager_attention_chooses_the_same(captured_janus, eager) -> None:
    model: Captured = captured_janus("eager")
    rewritten = model.apply(tg.make_plan(model.program, "fastv", facts=model.facts, k=2), U).program[U]
    inputs = batch(2)
    assert kept(rewritten, inputs) == [published_fastv(eager, inputs, 2, 8)]


# What the selectors refuse.


@pytest.mark.parametrize("selector", ["attention", "similarity", "norm"])
def test_a_selector_that_looks_ahead_is_refused_on_generation(selector: str) -> None:
    plan = tg.Plan((tg.DropSite(G, 1, 2, 0.5, selector),))
    with pytest.raises(tg.PlanError, match=f"'{selector}' is not causal, and task 'generation' predicts visual tokens"):
        check_plan(plan, facts(3))


def test_attention_needs_a_block_before_the_span() -> None:
    three = captured_tiny(3)
    with pytest.raises(tg.PlanError, match="block 0 has no block before it"):
        three.apply(tg.Plan((tg.DropSite(U, 0, 2, 0.5, "attention"),)))


def surprise(model: tiny.Unified, ids: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
    """The same loss without a cross entropy."""
    _, logits = tiny.understand(model, ids, patches, labels)
    following = F.pad(labels, (0, 1), value=-100)[:, 1:]
    known = following != -100
    paid = logits.log_softmax(-1).gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(paid * known).sum() / known.sum()


def test_attention_needs_labels() -> None:
    spec = tiny.build(layers=3)
    task = replace(spec.tasks[U], forward=surprise)
    model = Captured.of(tg.ModelSpec(spec.model, {U: task}))
    assert model.facts[U].prompt is None
    with pytest.raises(tg.PlanError, match="its loss shows no labels"):
        model.apply(tg.make_plan(model.program, "fastv", facts=model.facts, k=1))
    dart = model.apply(tg.make_plan(model.program, "dart", facts=model.facts, k=1, exact=False))
    tg.verify(model.program, dart).raise_if_failed()  # similarity needs none

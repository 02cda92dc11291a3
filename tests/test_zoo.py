"""Every model of the zoo goes all the way: captured, analysed, rewritten by every kind of plan, verified, reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tokgraph as tg
from tests.harness import Captured
from tokgraph.passes.analysis.visual import visual_mask
from tokgraph.passes.rules import ruled_operators
from tokgraph.report.report import make_report

pytest.importorskip("transformers")
from tests.zoo import LAYERS, ZOO, Attention, ZooModel, ZooTask

aten = torch.ops.aten

SLOW = (
    "chameleon",
    "llava",
    "janus",
    "emu3",
    "smolvlm",
    "qwen2_5_vl",
    "glm_image",
    "idefics3",
    "internvl",
    "qwen2_vl",
    "paligemma",
)
"""Left out of the default run: Janus has tests of its own, Emu3 and GLM-Image take longest, the others are another one but
for their encoders.
"""

OPERATORS = {
    aten.add.Tensor, aten.cat.default, aten.clone.default, aten.expand.default, aten.gelu.default,
    aten.layer_norm.default, aten.linear.default, aten.matmul.default, aten.mean.dim, aten.mul.Tensor,
    aten.neg.default, aten.pow.Tensor_Scalar, aten.reshape.default, aten.rsqrt.default,
    aten.scaled_dot_product_attention.default, aten.silu.default, aten.slice.Tensor, aten.softmax.int,
    aten.transpose.int, aten.unsqueeze.default,
}  # fmt: skip
"""Every operator on the token axis inside the blocks of the zoo's models."""

VISUAL_INPUTS = ("pixel_values", "image_ids")


def task_of(task: ZooTask, *, dynamic: bool = True, found: bool = False) -> tg.Task:
    """A task as a user writes it; ``found``: its visual tokens are left to analysis."""
    carriers = tuple(name for name in VISUAL_INPUTS if name in task.inputs)
    visual = None
    if task.visual[0] == "ids" and not found:
        _, name, low, high = task.visual
        visual = tg.VisualTokens.ids(input=name, low=low, high=high)
    return tg.Task(
        task.forward,
        task.inputs,
        dynamic=task.dynamic if dynamic else None,
        visual=visual,
        visual_inputs=carriers,
        reads=task.reads,
    )


def check_facts(zoo: ZooModel, model: Captured, attention: Attention) -> None:
    for name, task in zoo.tasks.items():
        facts = model.facts[name]
        assert len(facts.blocks) == LAYERS, name
        assert [[a.kind for a in block.attention] for block in facts.blocks] == [[attention]] * LAYERS, name
        assert (facts.visual.count, facts.visual.runs) == (task.visual_count, 1), name
        assert facts.demand.tokens > facts.demand.rows >= task.visual_count * (task.reads == "visual"), name
        paths = [block.module.split(".") for block in facts.blocks]
        assert [path[-2:] for path in paths] == [["layers", str(i)] for i in range(LAYERS)], name


def check_rules(model: Captured) -> None:
    """The zoo's models need rules for ``OPERATORS`` and no others."""
    for name, facts in model.facts.items():
        assert not facts.unruled, name
        nodes = {node.name: node for node in model.program[name].graph.nodes}
        inside = [nodes[node] for block in facts.blocks for node in block.nodes]
        on_axis = [n for n in inside if any(x.name in facts.token_axes for x in (n, *n.all_input_nodes))]
        assert {n.target for n in on_axis} <= OPERATORS, name


def check_found(zoo: ZooModel, model: Captured) -> None:
    """Without ``visual=``, analysis finds the positions that ``visual=`` declares, and the same pathways."""
    for name, task in zoo.tasks.items():
        if task.visual[0] != "ids" or not task_of(task).visual_inputs:
            continue
        declared, graph = model.facts[name], model.program[name]
        asking = replace(graph, task=task_of(task, found=True))
        if (zoo.name, name) == ("emu3", "understanding"):  # each line of codes ends in a row of the model's own
            with pytest.raises(tg.TokgraphError, match="joined with rows of the model's own"):
                tg.analyze(tg.Program(model.spec, {name: asking}))
            continue
        found = tg.analyze(tg.Program(model.spec, {name: asking}))[name]
        entry = next(node for node in graph.graph.nodes if node.name == declared.entry)
        assert found.visual.source != declared.visual.source, name
        masks = [visual_mask(graph, facts.visual, entry) for facts in (declared, found)]
        assert torch.equal(*masks), name
        assert found.profile == declared.profile, name


def plans(task: str) -> dict[str, tg.Plan]:
    last = LAYERS - 1
    return {
        "exact": tg.Plan(exact=True),
        "hide": tg.Plan((tg.DropSite(task, 0, last, 0.5),), exact=True),
        "freeze": tg.Plan((tg.DropSite(task, 0, last, 0.0, mode="freeze"),)),
    }


def check_plans(zoo: ZooModel, model: Captured) -> None:
    """The oracle agrees, and the work that a plan saves is gone."""
    for name, task in zoo.tasks.items():
        last = model.facts[name].demand.visual  # the visual rows that the last block must compute
        left = {"exact": task.visual_count, "hide": task.visual_count // 2, "freeze": 0}
        for kind, plan in plans(name).items():
            accelerated = model.apply(plan, name)
            tg.verify(accelerated.captured, accelerated).raise_if_failed()
            report = make_report(accelerated)
            assert report["tasks"][name]["tokens_per_block"]["after"] == [left[kind]] * (LAYERS - 1) + [last], kind
            assert report["flops_ratio"] < 1, f"{name}, {kind}"


def check_shared(model: Captured) -> None:
    """Both tasks thinned alike keep their parameters shared."""
    if len(model.program) < 2:
        return
    plan = tg.make_plan(model.program, "shared", facts=model.facts, span=(0, LAYERS - 1))
    report = make_report(model.apply(plan))
    assert report["sharing_index"] == 1.0
    assert 0.5 < report["coverage"] < 1
    assert report["flops_ratio"] < 1


def cases() -> list[object]:
    """Fused attention with fixed shapes; symbolic shapes, and eager attention, of models that differ there."""
    kinds: tuple[tuple[Attention, bool], ...] = (("sdpa", False), ("sdpa", True), ("eager", False))
    also = {
        kinds[1]: ("qwen2_5_vl",),
        kinds[2]: ("janus", "paligemma"),
    }
    return [
        pytest.param(
            name,
            attention,
            dynamic,
            id=f"{name}-{attention}-{'dynamic' if dynamic else 'static'}",
            marks=() if (attention, dynamic) == kinds[0] and name not in SLOW else pytest.mark.slow,
        )
        for attention, dynamic in kinds
        for name in also.get((attention, dynamic), ZOO)
    ]


@pytest.mark.parametrize(("name", "attention", "dynamic"), cases())
def test_model(name: str, attention: Attention, dynamic: bool) -> None:
    zoo = ZOO[name](attention)
    tasks = {name: task_of(task, dynamic=dynamic) for name, task in zoo.tasks.items()}
    model = Captured.of(tg.ModelSpec(zoo.model, tasks))
    check_facts(zoo, model, attention)
    check_rules(model)
    check_found(zoo, model)
    check_plans(zoo, model)
    check_shared(model)


def test_every_operator_of_the_zoo_has_a_rule() -> None:
    assert ruled_operators().keys() >= OPERATORS

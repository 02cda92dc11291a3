"""The laws of the design that concern whole programs; law 4 (the oracle) has tests of its own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokgraph as tg
from tests.harness import Captured, assert_close, assert_same_gradients, gradients
from tokgraph.ir.printer import format_graph
from tokgraph.ir.spec import split_outputs
from tokgraph.passes.cost.moves import row_moves
from tokgraph.report.report import make_report

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

ROOT = Path(__file__).parents[1]
TASKS = ("understanding", "generation")
EXAMPLES = ("digits", "janus")
EXACT = tg.Plan(exact=True)


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> Captured:
    return request.getfixturevalue(f"{request.param}_example")


def on_both_tasks(*span: int, **options: object) -> tuple[tg.DropSite, ...]:
    return tuple(tg.DropSite(task, *span, **options) for task in TASKS)


def loss_of(task, inputs) -> torch.Tensor:
    return split_outputs(task(**inputs))[0]


# Law 1: parameters are shared.


def test_parameters_are_the_models_own(example):
    accelerated = example.apply(tg.Plan(on_both_tasks(1, 3, keep=0.5), exact=True))
    own = dict(example.model.named_parameters(remove_duplicate=False))
    for task in TASKS:
        held = accelerated[task].task_graph.named_parameters()
        assert held
        assert all(own[name] is parameter for name, parameter in held.items())
    assert [id(p) for p in accelerated.parameters()] == [id(p) for p in example.model.parameters()]
    assert accelerated.state_dict().keys() == example.model.state_dict().keys()


def test_one_optimizer_trains_both_tasks(digits_example, keeping_weights):
    model = keeping_weights(digits_example.model)
    accelerated = digits_example.apply(tg.Plan(on_both_tasks(1, 3, keep=0.5), exact=True))
    tasks = digits_example.spec.tasks
    optimizer = torch.optim.AdamW(accelerated.parameters(), lr=3e-3)
    history: list[dict[str, float]] = []
    for _ in range(8):
        losses = {name: loss_of(accelerated[name], tasks[name].inputs) for name in TASKS}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert all(history[-1][name] < 0.8 * history[0][name] for name in TASKS)
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unused


def test_checkpoints_load_both_ways(digits_example, keeping_weights):
    model = keeping_weights(digits_example.model)
    accelerated = digits_example.apply(EXACT)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    inputs = digits_example.spec.tasks["generation"].inputs
    forward = digits_example.spec.tasks["generation"].forward

    accelerated.load_state_dict(other.state_dict())  # the plain model's into the accelerated program
    assert_close(loss_of(accelerated["generation"], inputs), forward(other, **inputs)["loss"], "loss", 1e-12)

    with torch.no_grad():
        for parameter in accelerated.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(accelerated.state_dict())  # and back
    assert_close(loss_of(accelerated["generation"], inputs), forward(other, **inputs)["loss"], "loss", 1e-12)


# Law 3: identity.


@pytest.mark.parametrize("exact", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "exact"])
@pytest.mark.parametrize("restore", [True, False], ids=["restore", "for good"])
@pytest.mark.parametrize("mode", ["hide", "freeze"])
@pytest.mark.parametrize("task", TASKS)
def test_keep_all_is_the_captured_graph(digits_example, task, mode, restore, exact):
    site = tg.DropSite(task, 1, 3, keep=1.0, mode=mode, restore=restore)
    accelerated = digits_example.apply(tg.Plan((site,), exact=exact), task)
    captured = digits_example.apply(tg.Plan(), task)
    inputs = digits_example.spec.tasks[task].inputs
    result, rows = accelerated[task].with_rows(**inputs)
    whole = captured[task](**inputs)
    expected = whole["logits"]
    if "['logits']" in rows:
        expected = expected.gather(1, rows["['logits']"].unsqueeze(2).expand(-1, -1, expected.shape[2]))
    assert_close(result["loss"], whole["loss"], "loss", 1e-12)
    assert_close(result["logits"], expected, "logits", 1e-12)
    model = digits_example.model
    assert_same_gradients(gradients(model, result["loss"]), gradients(model, whole["loss"]), 1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_no_plan_only_simplifies(example, task):
    """The same loss and gradients, from as many calls or fewer, none of which moves a row."""
    spec, accelerated = example.spec.tasks[task], example.apply(tg.Plan())
    eager = loss_of(lambda **inputs: spec.forward(example.model, **inputs), spec.inputs)
    none = loss_of(accelerated[task], spec.inputs)
    assert_close(none, eager, "loss", 1e-10)
    assert_same_gradients(gradients(example.model, none), gradients(example.model, eager), 1e-10)
    graph, captured = accelerated.program[task], example.program[task]
    assert len(graph.graph.nodes) <= len(captured.graph.nodes)
    assert row_moves(graph) == []


# Law 5: exactness.


@pytest.mark.parametrize("task", TASKS)
def test_exact_changes_no_loss_and_no_gradient(example, task):
    spec = example.spec.tasks[task]
    eager = loss_of(lambda **inputs: spec.forward(example.model, **inputs), spec.inputs)
    exact = loss_of(example.apply(EXACT, task)[task], spec.inputs)
    assert_close(exact, eager, "loss", 1e-10)
    assert_same_gradients(gradients(example.model, exact), gradients(example.model, eager), 1e-10)


def test_exact_costs_less_and_leaves_the_pathways(example):
    report = make_report(example.apply(EXACT))
    for task in TASKS:
        flops = report["tasks"][task]["flops"]
        assert flops["after"]["forward"] < flops["before"]["forward"]
        assert flops["after"]["backward"] < flops["before"]["backward"]
    assert (report["sharing_index"], report["coverage"]) == (1.0, 1.0)


# Law 6: the shared policy keeps the tasks on the same parameters.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"span": (0, 3), "keep": 0.25},
        {"span": (1, 2), "keep": 0.0},
        {"span": (2, 3), "keep": 1.0, "exact": False},
        {"span": (0, 2), "keep": 0.5, "mode": "freeze"},
        {"span": (1, 3), "keep": 0.75, "selector": "random", "seed": 5},
        {"span": (0, 3), "keep": 0.0, "mode": "freeze", "exact": False},
    ],
    ids=str,
)
def test_shared_keeps_a_sharing_index_of_one(digits_example, options):
    plan = tg.make_plan(digits_example.program, "shared", facts=digits_example.facts, **options)
    report = make_report(digits_example.apply(plan))
    assert report["sharing_index"] == 1.0
    assert (report["coverage"] < 1.0) == (options.get("keep") != 1.0)


@pytest.mark.parametrize("mode", ["hide", "freeze"])
def test_shared_keeps_a_sharing_index_of_one_on_janus(janus_example, mode):
    plan = tg.make_plan(janus_example.program, "shared", facts=janus_example.facts, span=(1, 3), keep=0.5, mode=mode)
    report = make_report(janus_example.apply(plan))
    assert report["sharing_index"] == 1.0
    assert report["flops_ratio"] < 1


def test_shared_keeps_demanded_positions(digits_example):
    plan = tg.make_plan(digits_example.program, "shared", facts=digits_example.facts, keep=0.0)
    for task in TASKS:
        spec = digits_example.spec.tasks[task]
        _, rows = digits_example.apply(plan, task)[task].with_rows(**spec.inputs)
        visual = spec.inputs["visual_mask"] if task == "understanding" else spec.inputs["labels"] >= 0
        read = visual if task == "generation" else ~visual
        demanded = read | torch.nn.functional.pad(read[:, 1:], (0, 1))
        assert demanded.gather(1, rows["['logits']"]).all()
        assert rows["['logits']"].shape[1] == demanded[0].sum()


def size_of(model: torch.nn.Module, *parts: str) -> int:
    """How many numbers the parameters hold whose names have one of ``parts`` in them."""
    return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in parts))


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize(
    ("mode", "thinned"),
    [
        ("hide", ("blocks.1.", "blocks.2.")),
        # Frozen rows need keys and values, which one layer makes together with the queries.
        ("freeze", tuple(f"blocks.{i}.{part}" for i in (1, 2) for part in ("attention.out", "feed_forward"))),
    ],
)
def test_thinning_one_task_diverges_by_what_it_thins(digits_example, mode, thinned, exact):
    """A quarter of the visual tokens pass the thinned parameters on one task, all of them on the other."""
    plan = tg.Plan((tg.DropSite("understanding", 1, 3, keep=0.25, mode=mode),), exact=exact)
    report = make_report(digits_example.apply(plan))
    model = digits_example.model
    both = size_of(model, "") - size_of(model, "patch_encoder")  # generation has no use for the patch encoder
    lost = 0.75 * size_of(model, *thinned)
    assert report["sharing_index"] == pytest.approx(1 - lost / both, abs=1e-9)

    # Coverage: over tasks and the parameters that visual tokens pass; the words' embedding sees none in understanding.
    passed = size_of(model, "") - size_of(model, "embed") + both
    assert report["coverage"] == pytest.approx(1 - lost / passed, abs=1e-9)


# Law 7: determinism.


def plan_and_graphs() -> str:
    """The text of a plan for a fresh capture, and of all graphs before and after it."""
    program = tg.capture(tg.load(ROOT / "tests" / "tiny.py"))
    plan = tg.make_plan(program, "shared", keep=0.5, selector="random", seed=3)
    after = tg.apply(program, plan).program
    return plan.to_json() + "".join(format_graph(p[task]) for p in (program, after) for task in TASKS)


@pytest.mark.slow
def test_another_process_makes_the_same_plan_and_graphs():
    """Byte for byte, though another process hashes strings and places objects differently."""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", "import tests.test_laws as laws; print(laws.plan_and_graphs(), end='')"]
    elsewhere = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert elsewhere.stdout == plan_and_graphs()


def test_a_plan_comes_back_from_its_file(digits_example, tmp_path):
    plan = tg.make_plan(digits_example.program, "shared", facts=digits_example.facts, keep=0.25, seed=4)
    plan.save(tmp_path / "plan.json")
    loaded = tg.Plan.load(tmp_path / "plan.json")
    assert loaded.sites == plan.sites
    assert loaded.to_json() == plan.to_json()


@pytest.mark.slow
def test_the_laws_hold_where_sizes_are_symbols(dynamic_digits: Captured) -> None:
    """Other tests of laws run on graphs whose sizes are numbers; one capture for this is enough."""
    shared = dynamic_digits.apply(tg.make_plan(dynamic_digits.facts, "shared", keep=0.5))
    tg.verify(shared).raise_if_failed()
    assert make_report(shared)["sharing_index"] == 1.0
    assert list(shared.parameters()) == list(dynamic_digits.model.parameters())
    exact = dynamic_digits.apply(EXACT)
    tg.verify(exact).raise_if_failed()
    for task in TASKS:
        inputs = {name: torch.cat([x, x.flip(0), x[:1]]) for name, x in dynamic_digits.spec.tasks[task].inputs.items()}
        eager = split_outputs(dynamic_digits.spec.tasks[task].forward(dynamic_digits.model, **inputs))[0]
        loss = split_outputs(exact[task](**inputs))[0]
        assert_close(loss, eager, "loss", 1e-10)
        assert_same_gradients(gradients(dynamic_digits.model, loss), gradients(dynamic_digits.model, eager), 1e-10)

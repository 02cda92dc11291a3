"""The cost of nodes against the counter and the hooks of real runs, and by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokgraph as tg
from tests import tiny
from tests.harness import Captured
from tests.passes.tools import TASKS, calls, captured, site, traced
from tokgraph.ir.cost import Work
from tokgraph.ir.node import fake_mode, value
from tokgraph.ir.spec import split_outputs
from tokgraph.passes.cost.attribution import task_cost
from tokgraph.passes.cost.works import _Prober, count_nodes, node_works

pytestmark = pytest.mark.xdist_group("janus")  # one process captures it

aten = torch.ops.aten
EXAMPLES = ("digits_example", pytest.param("janus_example", marks=pytest.mark.slow))


# ------------------------------------------------------------------ FLOPs, against the counter


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """Forward and backward FLOPs of a real run."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = split_outputs(run())
        forward = counter.get_total_flops()
        loss.backward()
        return forward, counter.get_total_flops() - forward


@pytest.fixture
def cleared(request: pytest.FixtureRequest) -> Iterable[Callable[[str], Captured]]:
    """A shared example by name; its gradients are removed again."""
    used: list[Captured] = []

    def get(name: str) -> Captured:
        used.append(request.getfixturevalue(name))
        return used[-1]

    yield get
    for example in used:
        example.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("model", EXAMPLES)
@pytest.mark.parametrize("task", TASKS)
def test_flops_are_those_of_the_eager_model(model: str, task: str, cleared: Callable[[str], Captured]) -> None:
    example = cleared(model)
    found, written = example.facts[task].cost.at().total(), example.spec.tasks[task]
    expected = counted(lambda: written.forward(example.model, **written.inputs))
    assert (found.forward_flops, found.backward_flops) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("model", EXAMPLES)
@pytest.mark.parametrize("task", TASKS)
def test_flops_of_a_rewritten_graph_are_those_of_its_run(
    model: str, task: str, cleared: Callable[[str], Captured]
) -> None:
    """Every other block at half of the visual tokens, one frozen, and dead work removed."""
    example = cleared(model)
    sites = (tg.DropSite(task, 1, 2, 0.5), tg.DropSite(task, 2, 3, 0.25, mode="freeze"))
    thin = example.apply(tg.Plan(sites, exact=True), task)
    found = task_cost(thin.program[task], example.facts[task]).at().total()
    expected = counted(lambda: thin[task](**example.spec.tasks[task].inputs))
    assert (found.forward_flops, found.backward_flops) == pytest.approx(expected, rel=1e-3)
    assert found.flops < example.facts[task].cost.at().total().flops


# ------------------------------------------------------------------ activations, against the hooks of autograd


def kept(run: Callable[[], Any], known: Iterable[Any]) -> int:
    """Bytes of the distinct storages that a real forward keeps for its backward, beside those known before."""
    before = {x.untyped_storage()._cdata for x in known if isinstance(x, Tensor)}
    storages: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        storages.setdefault(x.untyped_storage()._cdata, x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = run()
    assert result is not None  # what it keeps lives until here
    return sum(x.untyped_storage().nbytes() for key, x in storages.items() if key not in before)


def model_run(example: Captured, task: str) -> int:
    written = example.spec.tasks[task]
    known = (*example.model.parameters(), *example.model.buffers(), *written.inputs.values())
    return kept(lambda: written.forward(example.model, **written.inputs), known)


def graph_run(example: Captured, graph: tg.TaskGraph) -> int:
    leaves = graph.flatten(graph.example())
    known = (*example.model.parameters(), *example.model.buffers(), *graph.graph_module.buffers(), *leaves)
    return kept(lambda: graph.graph_module(*leaves), known)


def saved(example: Captured, task: str) -> int:
    found: int = example.facts[task].cost.at().total().saved
    return found


@pytest.mark.parametrize("task", TASKS)
def test_kept_activations_of_digits_are_those_of_the_model(digits_example: Captured, task: str) -> None:
    assert saved(digits_example, task) == model_run(digits_example, task)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_kept_activations_of_janus_are_those_of_its_graph(
    captured_janus: Callable[..., Captured], attention: str, task: str
) -> None:
    """Grouped queries, masks that are converted, and normalisers of two widths among them."""
    example = captured_janus(attention)
    assert saved(example, task) == graph_run(example, example.program[task])


@pytest.mark.parametrize("task", TASKS)
def test_kept_activations_of_janus_are_about_those_of_the_model(janus_example: Captured, task: str) -> None:
    """The graph repeats grouped keys and values, and has a mask where the model needs none."""
    expected = model_run(janus_example, task)
    assert expected <= saved(janus_example, task) + 64
    assert saved(janus_example, task) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("task", TASKS)
def test_kept_activations_of_a_rewritten_graph(digits_example: Captured, task: str) -> None:
    thin = digits_example.apply(tg.Plan((tg.DropSite(task, 1, 3, 0.5),), exact=True), task).program[task]
    found = task_cost(thin, digits_example.facts[task]).at().total().saved
    assert found == pytest.approx(graph_run(digits_example, thin), rel=0.01)
    assert found < saved(digits_example, task)


def test_nothing_is_kept_without_a_backward_pass() -> None:
    """Also not by what the loss is not computed from."""

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w).exp().sum(), F.linear(x, w).sigmoid()

    total = Work.sum(node_works(traced(run, torch.rand(2, 3), torch.rand(4, 3))).values())
    assert total.saved == total.backward_flops == total.backward_read == total.backward_written == 0
    assert total.forward_flops == 2 * 2 * (2 * 3 * 4)


# ------------------------------------------------------------------ bytes, by hand


def work_of(graph: tg.TaskGraph, target: object) -> Work:
    works = node_works(graph)
    (node,) = calls(graph, target)
    return works[node]


def test_views_cost_nothing() -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        y = x.transpose(0, 1)[1:].unsqueeze(1).expand(2, 5, 2).flatten(0, 0).permute(2, 0, 1)
        return (y.select(0, 1).sin().sum(),)

    works = node_works(traced(run, torch.rand(2, 3)))
    views = [n for n in works if n.target not in (aten.sin.default, aten.sum.default)]
    assert len(views) >= 5
    assert {works[n] for n in views} == {Work()}


def test_views_of_a_model_cost_nothing() -> None:
    graph = captured().graph
    works = node_works(graph)
    targets = (aten.transpose.int, aten.slice.Tensor, aten.unsqueeze.default, aten.expand.default)
    views = [n for n in works if n.target in targets]
    assert views
    assert {works[n] for n in views} == {Work()}


def test_pointwise_reads_its_operands_and_writes_its_result() -> None:
    work = work_of(traced(lambda x, y: ((x * y).sum(),), torch.rand(3, 5), torch.rand(5)), aten.mul.Tensor)
    assert (work.forward_read, work.forward_written, work.forward_flops) == (4 * (15 + 5), 4 * 15, 0)


def test_what_is_repeated_is_read_once() -> None:
    work = work_of(traced(lambda x: (x.expand(7, 5).exp().sum(),), torch.rand(1, 5)), aten.exp.default)
    assert (work.forward_read, work.forward_written) == (4 * 5, 4 * 7 * 5)


def test_a_product_by_hand() -> None:
    """Six bytes an element would be float16 beside float32: types count."""
    work = work_of(
        traced(lambda x, w: (F.linear(x, w).sum(),), torch.rand(2, 3).half(), torch.rand(4, 3).half()),
        aten.linear.default,
    )
    assert work == Work(2 * 2 * 3 * 4, 0, 2 * (6 + 12), 2 * 8, 0, 0, 0)


LOOKUPS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], object]] = {
    "embedding": (lambda i, w: F.embedding(i, w), (torch.tensor([1, 7]), torch.rand(100, 3)), aten.embedding.default),
    "index": (lambda i, w: w[i], (torch.tensor([1, 7]), torch.rand(100, 3)), aten.index.Tensor),
    "index_select": (
        lambda i, w: w.index_select(0, i),
        (torch.tensor([1, 7]), torch.rand(100, 3)),
        aten.index_select.default,
    ),
    "gather": (
        lambda i, w: w.gather(0, i),
        (torch.tensor([[1, 7, 2], [0, 0, 9]]), torch.rand(100, 3)),
        aten.gather.default,
    ),
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_look_ups_read_what_they_return(case: str) -> None:
    """And the index; not the whole table of 100 rows."""
    function, inputs, target = LOOKUPS[case]
    work = work_of(traced(lambda i, w: (function(i, w).sum(),), *inputs), target)
    assert (work.forward_read, work.forward_written) == (4 * 2 * 3 + 8 * inputs[0].numel(), 4 * 2 * 3)


def test_fused_attention_writes_no_weights() -> None:
    """Its FLOPs are those of two products; what it keeps is its operands, its result and a normaliser a row."""
    found = captured(layers=2)
    batch, heads, tokens, width = 2, 2, 11, 8
    operand = 8 * batch * heads * tokens * width
    for node in calls(found.graph, aten.scaled_dot_product_attention.default):
        work = node_works(found.graph)[node]
        assert work.forward_flops == 2 * 2 * batch * heads * tokens * tokens * width
        assert work.forward_written == operand
        assert work.forward_read == 3 * operand
        assert work.saved < 5 * operand


# ------------------------------------------------------------------ rewritten graphs, by hand


@pytest.mark.parametrize("task", TASKS)
def test_a_hidden_span_costs_the_rows_that_are_left(task: str) -> None:
    """The tiny model, 6 visual tokens of 11: at keep 0.5 the first block computes 8 rows, 3 of them visual."""
    found = captured(task, layers=3)
    hidden, batch = 16, 2

    def block(rows: int) -> int:
        return batch * (2 * rows * hidden * 8 * hidden + 2 * 2 * 2 * rows * 8 * rows)  # qkv, out, FFN; scores and sum

    cost = task_cost(found.rewritten(site(1, 2, 0.5)), found.facts).at()
    assert [w.forward_flops for w in cost.by_block()] == [block(11), block(8), block(11)]
    assert [w.backward_flops for w in cost.by_block()] == [2 * block(rows) for rows in (11, 8, 11)]
    for number, share in enumerate((6 / 11, 3 / 8, 6 / 11)):
        mine = [n for n in cost.nodes if n.block == number and n.work.flops]
        assert [n.visual for n in mine] == pytest.approx([share] * len(mine))
    whole = found.facts.cost.at()
    assert cost.by_block()[1].saved < whole.by_block()[1].saved
    assert cost.by_region()["encoder"] == whole.by_region()["encoder"]


@pytest.mark.slow
def test_a_plan_is_for_the_visual_tokens_of_its_example() -> None:
    found = captured("understanding", dynamic=True)
    cost = task_cost(found.rewritten(site(0, 1, 0.5)), found.facts)
    assert cost.at(batch=4).total().flops == 2 * cost.at().total().flops
    with pytest.raises(tg.AnalysisError, match="rows are dropped for 6 visual tokens a sample"):
        cost.at(visual=12)
    assert found.facts.cost.at(visual=12).total().flops > found.facts.cost.at().total().flops


# ------------------------------------------------------------------ counting is only looking


@pytest.mark.slow
def test_counting_leaves_no_guard() -> None:
    """No size of the graph is fixed by a kernel that asks for it: shapes stay, and other sizes still run."""
    spec = tiny.build(dynamic=True)
    program = tg.capture(spec)

    def shapes() -> list[str]:
        nodes = [n for graph in program.values() for n in graph.graph.nodes]
        return [f"{n.name}: {getattr(value(n), 'shape', value(n))}" for n in nodes]

    modes = [fake_mode(graph.graph) for graph in program.values()]
    environments = [mode.shape_env for mode in modes if mode is not None and mode.shape_env is not None]
    assert len(environments) == 2
    before, guards = shapes(), [len(e.guards) for e in environments]
    for graph in program.values():
        node_works(graph)
    assert shapes() == before
    assert [len(e.guards) for e in environments] == guards
    for name, task in tiny.build(batch=5).tasks.items():
        loss = program[name].graph_module(*program[name].flatten(task.inputs))[0]
        torch.testing.assert_close(loss, task.forward(spec.model, **task.inputs)[0])


# ------------------------------------------------------------------ what is not counted


@torch.library.custom_op("tokgraph_tests::product", mutates_args=())
def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


product.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))


def names_of_uncounted(run: Callable[..., Tensor], *inputs: Tensor) -> list[str]:
    return [op for _, op in count_nodes(traced(lambda *x: (run(*x).float().sum(),), *inputs)).uncounted]


def test_an_unknown_operator_is_listed() -> None:
    """It multiplies matrices, and nothing says so."""
    graph = traced(lambda x, w: (torch.ops.tokgraph_tests.product(x, w).sum(),), torch.rand(2, 3), torch.rand(3, 4))
    counted = count_nodes(graph)
    (node,) = calls(graph, torch.ops.tokgraph_tests.product.default)
    assert counted.uncounted == ((node.name, "tokgraph_tests.product.default"),)
    assert (counted.works[node].forward_flops, counted.works[node].forward_written) == (0, 4 * 2 * 4)


UNKNOWN: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "cdist": (torch.cdist, (torch.rand(2, 30, 4), torch.rand(2, 30, 4))),
    "bilinear": (F.bilinear, (torch.rand(2, 3), torch.rand(2, 4), torch.rand(5, 3, 4))),
    "linalg_inv": (torch.linalg.inv, (torch.rand(4, 4),)),
    "_int_mm": (torch._int_mm, (torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_hides_in_a_composite_operator_is_listed(name: str) -> None:
    """Torch takes most of these apart, and what is then left has no formula."""
    run, inputs = UNKNOWN[name]
    assert names_of_uncounted(run, *inputs) == [f"aten.{name}.default"]


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "matrix and vector": (torch.matmul, (torch.rand(3, 4), torch.rand(4)), 2 * 3 * 4),
    "vectors": (torch.dot, (torch.rand(4), torch.rand(4)), 2 * 4),
    "addmv": (torch.addmv, (torch.rand(3), torch.rand(3, 4), torch.rand(4)), 2 * 3 * 4),
    "addbmm": (torch.addbmm, (torch.rand(3, 5), torch.rand(2, 3, 4), torch.rand(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "einsum": (lambda x, y: torch.einsum("bij,bkj->bik", x, y), (torch.rand(2, 3, 4), torch.rand(2, 5, 4)), 240),
    "transposed convolution": (F.conv_transpose1d, (torch.rand(1, 3, 8), torch.rand(3, 4, 5)), 2 * 8 * 3 * 4 * 5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_are_no_matmul_are_counted(name: str) -> None:
    """Products with vectors among them, of which torch's own counter knows nothing."""
    run, inputs, flops = PRODUCTS[name]
    assert names_of_uncounted(run, *inputs) == []
    works = node_works(traced(lambda *x: (run(*x).sum(),), *inputs))
    assert Work.sum(works.values()).forward_flops == flops


def test_known_free_operators_are_not_listed() -> None:
    def run(x: Tensor) -> Tensor:
        y = torch.special.i0e(x).softmax(-1).cumsum(0) + F.layer_norm(x, (4,))
        return F.one_hot(y.argmax(-1), 4).to(y.dtype).add(y.flip(0)).masked_fill(y > 0, 0)

    assert names_of_uncounted(run, torch.rand(3, 4)) == []


@pytest.mark.parametrize("selector", ["uniform", "random", "norm"])
def test_what_a_plan_adds_is_not_listed(selector: str) -> None:
    found = captured(layers=3)
    assert task_cost(found.rewritten(site(1, 2, 0.5, selector=selector)), found.facts).uncounted == ()


def test_the_examples_are_counted_whole(digits_example: Captured, janus_example: Captured) -> None:
    for example in (digits_example, janus_example):
        assert {task: facts.cost.uncounted for task, facts in example.facts.items()} == dict.fromkeys(TASKS, ())


def test_every_call_that_makes_tensors_has_a_cost(digits_example: Captured) -> None:
    for task, graph in digits_example.program.items():
        made = [n.name for n in graph.graph.nodes if n.op == "call_function" and isinstance(value(n), Tensor)]
        costs = digits_example.facts[task].cost.nodes
        assert [n.node for n in costs] == made
        assert isinstance(graph.graph, fx.Graph)


def test_a_size_that_nothing_makes_is_refused() -> None:
    """A size of data whose maker is no part of the graph, as an image's grid in a constant."""
    known, lost = sympy.symbols("s0 u6")
    prober = _Prober(FakeTensorMode(), {known: 3})
    assert prober._numbers([2, known + 1]) == [2, 4]
    with pytest.raises(tg.AnalysisError, match="the size u6 depends on values of the batch"):
        prober._numbers([known, known * lost])

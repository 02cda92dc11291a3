"""The oracle: two tokens by hand, no code of the rewriter in it, and no wrong rewrite that gets past it."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.passes.tools import Captured, Run, calls, captured, site
from tokgraph.errors import VerificationError
from tokgraph.ir import interpreter as interpret
from tokgraph.ir.node import call, dims, rank, set_argument
from tokgraph.ir.tensors import target_of, tensor_name
from tokgraph.verification import compare, oracle
from tokgraph.verification.compare import run_oracle

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph
Edit = Callable[[tg.TaskGraph], None]


# ------------------------------------------------------------------ two tokens by hand


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))


def two_blocks(model: Table, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``x + attention(x, x, x)``, twice: an image token (0), then a text token (1)."""
    x = F.embedding(ids, model.weight)
    for _ in range(2):
        x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
    return x.sum(), x


@pytest.fixture(scope="module")
def two() -> Captured:
    task = tg.Task(
        two_blocks, {"ids": torch.tensor([[0, 1]])}, visual=tg.VisualTokens.ids(input="ids", equal=0), outputs="full"
    )
    return Captured.of(tg.ModelSpec(Table(), {"t": task}), "t")


def attend(query: list[float], keys: list[list[float]]) -> list[float]:
    """Softmax attention of one query over keys that are their own values."""
    scores = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(2)) for key in keys]
    weights = [s / sum(scores) for s in scores]
    return [sum(w * key[d] for w, key in zip(weights, keys, strict=True)) for d in range(2)]


def plus(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


IMAGE, TEXT = [1.0, 0.0], [0.0, 1.0]


def by_hand(modes: tuple[str, str]) -> list[list[float]]:
    """The stream after two blocks, in each of which the image row is ``"whole"``, ``"hide"`` or ``"freeze"``."""
    image, text = IMAGE, TEXT
    for mode in modes:
        seen = [text] if mode == "hide" else [image, text]
        text = plus(text, attend(text, seen))
        image = plus(image, attend(image, [image])) if mode == "whole" else image
    return [image, text]


@pytest.mark.parametrize(
    ("sites", "modes"),
    [
        ((), ("whole", "whole")),
        ((site(0, 1, 0.0),), ("hide", "whole")),
        ((site(1, 2, 0.0),), ("whole", "hide")),
        ((site(0, 2, 0.0),), ("hide", "hide")),
        ((site(0, 1, 0.0, mode="freeze"),), ("freeze", "whole")),
        ((site(0, 2, 0.0, mode="freeze"),), ("freeze", "freeze")),
        ((site(0, 1, 0.0, mode="freeze"), site(1, 2, 0.0)), ("freeze", "hide")),
        ((site(0, 2, 1.0),), ("whole", "whole")),
    ],
)
def test_two_tokens(two: Captured, sites: tuple[tg.DropSite, ...], modes: tuple[str, str]) -> None:
    results = run_oracle(two.graph, two.facts, two.sites(*sites), torch.float64)
    expected = torch.tensor([by_hand(modes)], dtype=torch.float64)
    torch.testing.assert_close(results.outputs[1], expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(results.outputs[0], expected.sum(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(Run.of(two.rewritten(*sites)).outputs[1], expected, rtol=1e-14, atol=1e-14)


def test_the_gradient_of_a_hidden_token_by_hand(two: Captured) -> None:
    """The text doubles twice, alone; the image passes unchanged: d sum / d table is 1 and 4."""
    results = run_oracle(two.graph, two.facts, two.sites(site(0, 2, 0.0)), torch.float64)
    expected = torch.tensor([[1.0, 1.0], [4.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(results.gradients["weight"], expected, rtol=1e-14, atol=1e-14)


def test_the_oracle_without_sites_is_the_graph(two: Captured) -> None:
    plain = Run.of(two.graph)
    results = run_oracle(two.graph, two.facts, (), torch.float64)
    assert torch.equal(results.outputs[1], plain.outputs[1])
    assert torch.equal(results.gradients["weight"], plain.gradients["weight"])


# ------------------------------------------------------------------ independence


def imports(module: ModuleType) -> set[str]:
    """The modules that a module's source imports from, written out."""
    package = module.__name__.rpartition(".")[0]
    found = set()
    for statement in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(statement, ast.Import):
            found |= {name.name for name in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            base = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
            found |= {base, *(f"{base}.{name.name}" for name in statement.names)}
    return found


def test_the_oracle_shares_no_code_with_the_rewriter() -> None:
    """Directly or through what it imports."""
    seen: set[str] = set()
    stack = [oracle]
    while stack:
        for name in imports(stack.pop()):
            try:
                module = importlib.import_module(name)
            except ImportError:  # a name inside a module
                continue
            if name.startswith("tokgraph.") and name not in seen:
                seen.add(name)
                stack.append(module)
    assert {"tokgraph.ir.plan", "tokgraph.ir.facts", "tokgraph.ir.interpreter"} <= seen
    for part in ("rewrite", "rules", "analysis"):
        assert not [name for name in seen if name.startswith(f"tokgraph.passes.{part}")]
    assert "tokgraph.ops" not in seen


def test_the_oracle_runs_none_of_our_operators() -> None:
    """It reads the captured graph, which has none, and calls none itself."""
    assert "ops.tokgraph" not in inspect.getsource(oracle)
    assert "ops.tokgraph" not in inspect.getsource(interpret)
    assert "rewrite" not in " ".join(imports(compare))


# ------------------------------------------------------------------ mutants


def replace_calls(graph: tg.TaskGraph, target: object, make: Callable[[fx.Node], fx.Node], index: int = 0) -> None:
    """Put ``make(node)`` in the place of one call of ``target``."""
    found = calls(graph, target)[index]
    users = list(found.users)
    with graph.graph.inserting_after(found):
        new = make(found)
    for user in users:
        user.replace_input_with(found, new)


def after(n: fx.Node, target: object, *args: object) -> fx.Node:
    return call(n.graph, target, n, *args, origin=n, made_by="mutant")  # type: ignore[arg-type]


def roll_index(graph: tg.TaskGraph) -> None:
    """Each sample keeps the rows of the other one."""
    replace_calls(graph, tokgraph.keep_rows.default, lambda n: after(n, aten.roll.default, [1], [0]))


def keep_the_first(graph: tg.TaskGraph) -> None:
    """The first visual tokens stay instead of evenly spaced ones."""

    def zeros(n: fx.Node) -> fx.Node:
        return after(n, aten.zeros_like.default)

    replace_calls(graph, tokgraph.uniform_score.default, zeros)


def forget_to_freeze(graph: tg.TaskGraph) -> None:
    """Dropped rows come out as the block made them."""
    restore = calls(graph, tokgraph.restore.default)[0]
    (drop,) = [x for x in restore.all_input_nodes if x.target is tokgraph.drop.default]
    restore.replace_all_uses_with(drop.args[0])  # type: ignore[arg-type]


def restore_zeros(graph: tg.TaskGraph) -> None:
    """Dropped rows come back empty."""
    restore = calls(graph, tokgraph.restore.default)[0]
    with graph.graph.inserting_before(restore):
        zeros = call(graph.graph, aten.zeros_like.default, restore.args[0], origin=restore, made_by="mutant")
    restore.update_arg(0, zeros)


def restore_one_row_late(graph: tg.TaskGraph) -> None:
    """Kept rows come back at their neighbours' places."""
    restore = calls(graph, tokgraph.restore.default)[0]
    with graph.graph.inserting_before(restore):
        rolled = call(graph.graph, aten.roll.default, restore.args[1], [1], [1], origin=restore, made_by="mutant")
    restore.update_arg(1, rolled)


def see_hidden_keys(graph: tg.TaskGraph) -> None:
    """Keys, values and mask columns are not selected."""
    for n in calls(graph, tokgraph.select.default):
        if rank(n) == 4:
            n.replace_all_uses_with(n.args[0])  # type: ignore[arg-type]


def see_the_future(graph: tg.TaskGraph) -> None:
    """The mask of the thinned attention is lost."""
    attention = calls(graph, aten.scaled_dot_product_attention.default)[0]
    set_argument(attention, "attn_mask", None)
    set_argument(attention, "is_causal", False)


def mask_of_other_rows(graph: tg.TaskGraph) -> None:
    """The mask is gathered for the rows of another sample."""
    masked = [n for n in calls(graph, aten.scaled_dot_product_attention.default) if n.args[3] is not None]
    mask = masked[0].args[3]
    assert isinstance(mask, fx.Node)
    with graph.graph.inserting_after(mask):
        masked[0].update_arg(3, after(mask, aten.roll.default, [1], [0]))


def shuffle_labels(graph: tg.TaskGraph) -> None:
    replace_calls(graph, tokgraph.select_targets.default, lambda n: after(n, aten.roll.default, [1], [1]))


def skip_the_ffn(graph: tg.TaskGraph) -> None:
    """One addition to the stream is left out."""
    n = next(n for n in calls(graph, aten.add.Tensor) if rank(n) == 3)
    n.replace_all_uses_with(n.args[0])  # type: ignore[arg-type]


def swap_weights(graph: tg.TaskGraph) -> None:
    """The second layer computes with the FFN of the first."""
    for n in graph.graph.nodes:
        if n.op == "get_attr" and tensor_name(n) == "layers.1.mlp.0.weight":
            n.target = target_of("layers.0.mlp.0.weight")


def detach_a_gradient(graph: tg.TaskGraph) -> None:
    """Right outputs, but a gradient does not flow."""
    replace_calls(graph, aten.gelu.default, lambda n: after(n, aten.detach.default))


def double_a_gradient(graph: tg.TaskGraph) -> None:
    """``2 x - detach(x)``: the same value, twice the gradient."""

    def make(n: fx.Node) -> fx.Node:
        twice, plain = after(n, aten.mul.Tensor, 2.0), after(n, aten.detach.default)
        twice.append(plain)
        with graph.graph.inserting_after(plain):
            return call(graph.graph, aten.sub.Tensor, twice, plain, origin=n, made_by="mutant")

    replace_calls(graph, aten.gelu.default, make)


def round_the_stream(graph: tg.TaskGraph) -> None:
    """A step in lower precision, which no selection needs."""

    def make(n: fx.Node) -> fx.Node:
        return call(n.graph, aten.round.decimals, n, decimals=6, origin=n, made_by="mutant")

    replace_calls(graph, tokgraph.drop.default, make)


def swap_logits(graph: tg.TaskGraph) -> None:
    """The loss is right; the logits returned beside it are those of other rows."""
    output = graph.graph.output_node()
    loss, logits, *rest = output.args[0]  # type: ignore[misc]
    with graph.graph.inserting_before(output):
        rolled = after(logits, aten.roll.default, [1], [1])
    output.args = ((loss, rolled, *rest),)


def lose_a_logit(graph: tg.TaskGraph) -> None:
    """A demanded row is missing from the outputs, and from the index beside them; the loss does not read it."""
    output = graph.graph.output_node()
    loss, logits, index = output.args[0]  # type: ignore[misc]
    with graph.graph.inserting_before(output):
        short = [after(n, aten.slice.Tensor, 1, 0, dims(n)[1] - 1) for n in (logits, index)]
    output.args = ((loss, *short),)


HIDE = (site(0, 1, 0.5),)
MUTANTS: list[tuple[Edit, bool, tuple[tg.DropSite, ...], bool]] = [
    # edit, on the seeded (not the sunk) graph, sites, exact
    (roll_index, False, HIDE, False),
    (roll_index, False, HIDE, True),
    (keep_the_first, False, HIDE, False),
    (forget_to_freeze, True, HIDE, False),
    (restore_zeros, False, HIDE, True),
    (restore_one_row_late, False, HIDE, False),
    (see_hidden_keys, True, HIDE, False),
    (see_the_future, False, HIDE, False),
    (see_the_future, False, (site(0, 1, 0.5, mode="freeze"),), False),
    (mask_of_other_rows, False, (), True),
    (shuffle_labels, False, (), True),
    (shuffle_labels, True, (site(0, 1, 0.5, restore=False),), False),
    (skip_the_ffn, False, HIDE, True),
    (swap_weights, False, HIDE, False),
    (detach_a_gradient, False, HIDE, False),
    (double_a_gradient, False, (), True),
    (round_the_stream, False, HIDE, False),
    (swap_logits, False, (), True),
    (lose_a_logit, False, (), True),
]


@pytest.mark.parametrize(
    ("edit", "seeded", "sites", "exact"),
    [pytest.param(*m, id=f"{m[0].__name__}-{i}") for i, m in enumerate(MUTANTS)],
)
def test_every_mutant_is_caught(edit: Edit, seeded: bool, sites: tuple[tg.DropSite, ...], exact: bool) -> None:
    found = captured("understanding")
    graph = found.seeded(*sites, exact=exact) if seeded else found.rewritten(*sites, exact=exact)
    plan = tg.Plan(found.sites(*sites), exact=exact)
    program = found.program.replacing({found.task: graph})
    mutant = tg.Accelerated(program, plan, found.facts_of)
    assert tg.verify(found.program, mutant).passed, "the graph is right before the edit"
    edit(graph)
    graph.graph.lint()
    graph.graph_module.recompile()
    outcome = tg.verify(found.program, mutant)
    assert not outcome.passed
    with pytest.raises(VerificationError) as caught:
        outcome.raise_if_failed()
    message = str(caught.value)
    assert "task 'understanding'" in message
    named = outcome.tasks["understanding"]
    assert named.worst_output in message or named.worst_parameter in message


@pytest.mark.parametrize("edit", [detach_a_gradient, double_a_gradient])
def test_gradients_are_checked_on_their_own(edit: Edit) -> None:
    """The outputs are right to the last bit; the parameter is named."""
    found = captured("understanding")
    accelerated = found.apply(*HIDE)
    edit(accelerated.program["understanding"])
    accelerated.program["understanding"].graph_module.recompile()
    outcome = tg.verify(found.program, accelerated)
    task = outcome.tasks["understanding"]
    assert task.output_error < 1e-12
    assert task.gradient_error > 0.1
    assert task.worst_parameter.startswith(("layers.0.mlp", "layers.0.norm2"))
    assert f"the gradient of {task.worst_parameter} differs from the oracle" in outcome.failures()[0]


def test_a_plan_that_was_not_followed_is_noticed() -> None:
    """Every field of a site that matters: span, ratio, mode, selector, seed."""
    found = captured("understanding")
    done = found.apply(site(0, 1, 0.5, "random", seed=1))
    for told in (
        site(1, 2, 0.5, "random", seed=1),
        site(0, 2, 0.5, "random", seed=1),
        site(0, 1, 0.34, "random", seed=1),
        site(0, 1, 0.5, "random", mode="freeze", seed=1),
        site(0, 1, 0.5, "uniform"),
        site(0, 1, 0.5, "random", seed=2),
    ):
        claimed = tg.Accelerated(done.program, tg.Plan(found.sites(told)), done.facts)
        assert not tg.verify(found.program, claimed).passed, told
    assert tg.verify(found.program, done).passed


def test_too_few_demanded_rows_stop_the_run() -> None:
    """An index that leaves out a label is refused by the operator itself."""
    found = captured("understanding")
    accelerated = found.apply(exact=True)
    graph = accelerated.program["understanding"]
    (mask,) = calls(graph, tokgraph.demand_mask.default)
    with graph.graph.inserting_after(mask):
        text = call(graph.graph, aten.logical_not.default, mask.args[0], origin=mask, made_by="mutant")
    mask.replace_all_uses_with(text)
    graph.graph_module.recompile()
    with pytest.raises(tg.BatchError, match=r"reads= rules out"):
        tg.verify(found.program, accelerated)

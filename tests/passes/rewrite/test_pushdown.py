"""Push-down: exact, as far as every reader allows, and no further."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx

import tokgraph as tg
from tests.passes import models
from tests.passes.programs import Drawn, Program, programs, rows
from tests.passes.tools import TASKS, Captured, Run, assert_well_formed, calls, captured, changes, listing, site
from tokgraph.ir.node import module_path, tensor
from tokgraph.passes.rewrite import PushDown
from tokgraph.passes.rewrite.pushdown import NARROWED

aten = torch.ops.aten
tokgraph = torch.ops.tokgraph


def block(graph: tg.TaskGraph, index: int) -> str:
    """The lines of one block of the tiny model."""
    return listing(graph, lambda n: module_path(n).startswith(f"layers.{index}"))


def test_a_hidden_block() -> None:
    """Everything from the first norm to the restore works on kept rows; the mask is gathered along both axes."""
    assert_expected_inline(
        block(captured(dynamic=True).rewritten(site(0, 1)), 0),
        """\
%layer_norm = layer_norm(%drop, [16], @layers.0.norm1.weight, @layers.0.norm1.bias, 1e-05, False)  # float64[batch, tokens - 3, 16] layers.0.norm1
%linear.2 = linear(%layer_norm, @layers.0.attention.qkv.weight, @layers.0.attention.qkv.bias)  # float64[batch, tokens - 3, 48] layers.0.attention.qkv
%slice_tensor = slice.Tensor(%linear.2, 2, 0, 16)  # float64[batch, tokens - 3, 16] layers.0.attention by split-to-slices
%slice_tensor.2 = slice.Tensor(%linear.2, 2, 16, 32)  # float64[batch, tokens - 3, 16] layers.0.attention by split-to-slices
%slice_tensor.3 = slice.Tensor(%linear.2, 2, 32, 48)  # float64[batch, tokens - 3, 16] layers.0.attention by split-to-slices
%view.2 = reshape(%slice_tensor, [%sym_size_int, %sym_size_int.3, 2, 8])  # float64[batch, tokens - 3, 2, 8] layers.0.attention
%transpose = transpose.int(%view.2, 1, 2)  # float64[batch, 2, tokens - 3, 8] layers.0.attention
%view.3 = reshape(%slice_tensor.2, [%sym_size_int, %sym_size_int.3, 2, 8])  # float64[batch, tokens - 3, 2, 8] layers.0.attention
%transpose.2 = transpose.int(%view.3, 1, 2)  # float64[batch, 2, tokens - 3, 8] layers.0.attention
%view.4 = reshape(%slice_tensor.3, [%sym_size_int, %sym_size_int.3, 2, 8])  # float64[batch, tokens - 3, 2, 8] layers.0.attention
%transpose.3 = transpose.int(%view.4, 1, 2)  # float64[batch, 2, tokens - 3, 8] layers.0.attention
%scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %transpose.2, %transpose.3, None, 0.0, True)  # float64[batch, 2, tokens - 3, 8] layers.0.attention
%transpose.4 = transpose.int(%scaled_dot_product_attention, 1, 2)  # float64[batch, tokens - 3, 2, 8] layers.0.attention
%view.5 = reshape(%transpose.4, [%sym_size_int, %sym_size_int.3, 16])  # float64[batch, tokens - 3, 16] layers.0.attention
%linear.3 = linear(%view.5, @layers.0.attention.out.weight, @layers.0.attention.out.bias)  # float64[batch, tokens - 3, 16] layers.0.attention.out
%add = add.Tensor(%drop, %linear.3)  # float64[batch, tokens - 3, 16] layers.0
%layer_norm.2 = layer_norm(%add, [16], @layers.0.norm2.weight, @layers.0.norm2.bias, 1e-05, False)  # float64[batch, tokens - 3, 16] layers.0.norm2
%linear.4 = linear(%layer_norm.2, @layers.0.mlp.0.weight, @layers.0.mlp.0.bias)  # float64[batch, tokens - 3, 32] layers.0.mlp.0
%gelu = gelu(%linear.4)  # float64[batch, tokens - 3, 32] layers.0.mlp.1
%linear.5 = linear(%gelu, @layers.0.mlp.2.weight, @layers.0.mlp.2.bias)  # float64[batch, tokens - 3, 16] layers.0.mlp.2
%add.2 = add.Tensor(%add, %linear.5)  # float64[batch, tokens - 3, 16] layers.0
%restore = restore(%masked_scatter, %add.2, %keep_rows)  # float64[batch, tokens, 16] layers.0 by seed-sites
""",
    )


def test_a_frozen_block() -> None:
    """Keys and values come from all rows, queries, attention output and FFN from kept ones."""
    assert_expected_inline(
        block(captured(dynamic=True).rewritten(site(0, 1, 0.0, mode="freeze")), 0),
        """\
%ones = ones([%sym_size_int.2, %sym_size_int.2], dtype=torch.bool, device=cpu)  # bool[tokens, tokens] layers.0.attention by explicit-causal-mask
%tril = tril(%ones)  # bool[tokens, tokens] layers.0.attention by explicit-causal-mask
%unsqueeze = unsqueeze(%tril, 0)  # bool[1, tokens, tokens] layers.0.attention by push-down
%unsqueeze.2 = unsqueeze(%unsqueeze, 0)  # bool[1, 1, tokens, tokens] layers.0.attention by push-down
%expand = expand(%unsqueeze.2, [%sym_size_int, -1, -1, -1])  # bool[batch, 1, tokens, tokens] layers.0.attention by push-down
%select = select(%expand, %keep_rows, 2, 0)  # bool[batch, 1, tokens - 6, tokens] layers.0.attention by push-down
%layer_norm = layer_norm(%masked_scatter, [16], @layers.0.norm1.weight, @layers.0.norm1.bias, 1e-05, False)  # float64[batch, tokens, 16] layers.0.norm1
%linear.2 = linear(%layer_norm, @layers.0.attention.qkv.weight, @layers.0.attention.qkv.bias)  # float64[batch, tokens, 48] layers.0.attention.qkv
%select.2 = select(%linear.2, %keep_rows, 1, 0)  # float64[batch, tokens - 6, 48] layers.0.attention.qkv by push-down
%slice_tensor = slice.Tensor(%select.2, 2, 0, 16)  # float64[batch, tokens - 6, 16] layers.0.attention by split-to-slices
%slice_tensor.2 = slice.Tensor(%linear.2, 2, 16, 32)  # float64[batch, tokens, 16] layers.0.attention by split-to-slices
%slice_tensor.3 = slice.Tensor(%linear.2, 2, 32, 48)  # float64[batch, tokens, 16] layers.0.attention by split-to-slices
%view.2 = reshape(%slice_tensor, [%sym_size_int, %sym_size_int.3, 2, 8])  # float64[batch, tokens - 6, 2, 8] layers.0.attention
%transpose = transpose.int(%view.2, 1, 2)  # float64[batch, 2, tokens - 6, 8] layers.0.attention
%view.3 = reshape(%slice_tensor.2, [%sym_size_int, %sym_size_int.2, 2, 8])  # float64[batch, tokens, 2, 8] layers.0.attention
%transpose.2 = transpose.int(%view.3, 1, 2)  # float64[batch, 2, tokens, 8] layers.0.attention
%view.4 = reshape(%slice_tensor.3, [%sym_size_int, %sym_size_int.2, 2, 8])  # float64[batch, tokens, 2, 8] layers.0.attention
%transpose.3 = transpose.int(%view.4, 1, 2)  # float64[batch, 2, tokens, 8] layers.0.attention
%scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %transpose.2, %transpose.3, %select, 0.0, False)  # float64[batch, 2, tokens - 6, 8] layers.0.attention
%transpose.4 = transpose.int(%scaled_dot_product_attention, 1, 2)  # float64[batch, tokens - 6, 2, 8] layers.0.attention
%view.5 = reshape(%transpose.4, [%sym_size_int, %sym_size_int.3, 16])  # float64[batch, tokens - 6, 16] layers.0.attention
%linear.3 = linear(%view.5, @layers.0.attention.out.weight, @layers.0.attention.out.bias)  # float64[batch, tokens - 6, 16] layers.0.attention.out
%add = add.Tensor(%drop, %linear.3)  # float64[batch, tokens - 6, 16] layers.0
%layer_norm.2 = layer_norm(%add, [16], @layers.0.norm2.weight, @layers.0.norm2.bias, 1e-05, False)  # float64[batch, tokens - 6, 16] layers.0.norm2
%linear.4 = linear(%layer_norm.2, @layers.0.mlp.0.weight, @layers.0.mlp.0.bias)  # float64[batch, tokens - 6, 32] layers.0.mlp.0
%gelu = gelu(%linear.4)  # float64[batch, tokens - 6, 32] layers.0.mlp.1
%linear.5 = linear(%gelu, @layers.0.mlp.2.weight, @layers.0.mlp.2.bias)  # float64[batch, tokens - 6, 16] layers.0.mlp.2
%add.2 = add.Tensor(%add, %linear.5)  # float64[batch, tokens - 6, 16] layers.0
%restore = restore(%masked_scatter, %add.2, %keep_rows)  # float64[batch, tokens, 16] layers.0 by seed-sites
""",
    )


def test_the_last_block_of_exact() -> None:
    """Queries and FFN of demanded rows, keys and values of all; head and loss follow."""
    assert_expected_inline(
        block(captured("generation", dynamic=True).rewritten(exact=True), 1),
        """\
%ones = ones([%add, %add], dtype=torch.bool, device=cpu)  # bool[tokens + 6, tokens + 6] layers.1.attention by explicit-causal-mask
%tril = tril(%ones)  # bool[tokens + 6, tokens + 6] layers.1.attention by explicit-causal-mask
%unsqueeze = unsqueeze(%tril, 0)  # bool[1, tokens + 6, tokens + 6] layers.1.attention by push-down
%unsqueeze.2 = unsqueeze(%unsqueeze, 0)  # bool[1, 1, tokens + 6, tokens + 6] layers.1.attention by push-down
%layer_norm.3 = layer_norm(%add.4, [16], @layers.1.norm1.weight, @layers.1.norm1.bias, 1e-05, False)  # float64[batch, tokens + 6, 16] layers.1.norm1
%linear.5 = linear(%layer_norm.3, @layers.1.attention.qkv.weight, @layers.1.attention.qkv.bias)  # float64[batch, tokens + 6, 48] layers.1.attention.qkv
%slice_tensor.4 = slice.Tensor(%linear.5, 2, 16, 32)  # float64[batch, tokens + 6, 16] layers.1.attention by split-to-slices
%slice_tensor.5 = slice.Tensor(%linear.5, 2, 32, 48)  # float64[batch, tokens + 6, 16] layers.1.attention by split-to-slices
%view.5 = reshape(%slice_tensor.4, [%sym_size_int, %add, 2, 8])  # float64[batch, tokens + 6, 2, 8] layers.1.attention
%transpose.5 = transpose.int(%view.5, 1, 2)  # float64[batch, 2, tokens + 6, 8] layers.1.attention
%view.6 = reshape(%slice_tensor.5, [%sym_size_int, %add, 2, 8])  # float64[batch, tokens + 6, 2, 8] layers.1.attention
%transpose.6 = transpose.int(%view.6, 1, 2)  # float64[batch, 2, tokens + 6, 8] layers.1.attention
%select_range = select_range(%linear.5, %unsqueeze.3, 1, 0, %sub)  # float64[batch, 6, 48] layers.1.attention.qkv by range-rows
%select_range.2 = select_range(%unsqueeze.2, %unsqueeze.3, 2, 0, %sub)  # bool[1, 1, 6, tokens + 6] layers.1.attention by range-rows
%slice_tensor.6 = slice.Tensor(%select_range, 2, 0, 16)  # float64[batch, 6, 16] layers.1.attention by split-to-slices
%view.7 = reshape(%slice_tensor.6, [%sym_size_int, 6, 2, 8])  # float64[batch, 6, 2, 8] layers.1.attention
%transpose.7 = transpose.int(%view.7, 1, 2)  # float64[batch, 2, 6, 8] layers.1.attention
%scaled_dot_product_attention.2 = scaled_dot_product_attention(%transpose.7, %transpose.5, %transpose.6, %select_range.2, 0.0, False)  # float64[batch, 2, 6, 8] layers.1.attention
%transpose.8 = transpose.int(%scaled_dot_product_attention.2, 1, 2)  # float64[batch, 6, 2, 8] layers.1.attention
%view.8 = reshape(%transpose.8, [%sym_size_int, 6, 16])  # float64[batch, 6, 16] layers.1.attention
%linear.6 = linear(%view.8, @layers.1.attention.out.weight, @layers.1.attention.out.bias)  # float64[batch, 6, 16] layers.1.attention.out
%add.5 = add.Tensor(%select_range.3, %linear.6)  # float64[batch, 6, 16] layers.1
%layer_norm.4 = layer_norm(%add.5, [16], @layers.1.norm2.weight, @layers.1.norm2.bias, 1e-05, False)  # float64[batch, 6, 16] layers.1.norm2
%linear.7 = linear(%layer_norm.4, @layers.1.mlp.0.weight, @layers.1.mlp.0.bias)  # float64[batch, 6, 32] layers.1.mlp.0
%gelu.2 = gelu(%linear.7)  # float64[batch, 6, 32] layers.1.mlp.1
%linear.8 = linear(%gelu.2, @layers.1.mlp.2.weight, @layers.1.mlp.2.bias)  # float64[batch, 6, 16] layers.1.mlp.2
%add.6 = add.Tensor(%add.5, %linear.8)  # float64[batch, 6, 16] layers.1
""",
    )


# ------------------------------------------------------------------ the pass contract


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "sites",
    [
        (),
        (site(0, 1),),
        (site(0, 2, 0.5), site(1, 2, 0.25)),
        (site(0, 2, 0.25, mode="freeze"),),
        (site(0, 1, 0.5, "norm"),),
    ],
    ids=["exact", "hide", "nested", "freeze", "norm"],
)
def test_twice_is_once(sites: tuple[tg.DropSite, ...], task: str) -> None:
    once = captured(task).rewritten(*sites, exact=True)
    again = once.copy()
    result = PushDown()(again.graph_module)
    assert not result.modified
    assert changes(once, again) == ""


def test_without_selections_nothing_happens() -> None:
    graph = captured().graph.copy()
    result = PushDown()(graph.graph_module)
    assert not result.modified
    assert result.graph_module is graph.graph_module
    assert changes(captured().graph, graph) == ""


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_metadata_and_parameters(task: str, dynamic: bool) -> None:
    found = captured(task, dynamic=dynamic)
    sunk = found.rewritten(site(0, 1), exact=True)
    assert_well_formed(sunk, found.graph)
    names = {n.name for n in found.graph.graph.nodes}
    kept = [n for n in sunk.graph.nodes if n.name in names and n.meta.get("nn_module_stack")]
    assert len(kept) > 40
    for n in sunk.graph.nodes:
        assert not [key for key in n.meta if key == "tokgraph.stale"], f"{n.name} keeps a mark of the pass"
    restore = calls(sunk, tokgraph.restore.default)
    assert [n.meta["made_by"] for n in restore] == ["seed-sites"]
    moved = [n for n in sunk.graph.nodes if n.target in (tokgraph.select.default, tokgraph.drop.default)]
    assert {n.meta["made_by"] for n in moved} >= {"push-down"}


def test_narrowed_calls_say_so() -> None:
    sunk = captured().rewritten(site(0, 1))
    narrowed = {module_path(n).partition(".attention")[0] for n in sunk.graph.nodes if n.meta.get(NARROWED)}
    assert {m.rpartition(".")[0] if "norm" in m or "mlp" in m else m for m in narrowed} == {"layers.0", "layers.0.mlp"}


def test_every_parameter_is_read_still() -> None:
    """Drop everything that may be dropped, and no weight is lost from the graph."""
    found = captured()
    before = {n.target for n in found.graph.graph.nodes if n.op == "get_attr"}
    sunk = found.rewritten(site(0, 2, 0.0), exact=True)
    assert {n.target for n in sunk.graph.nodes if n.op == "get_attr"} == before


@pytest.mark.parametrize("block", [models.Eager, models.Parallel, models.NormAfter])
def test_other_blocks(block: type[torch.nn.Module]) -> None:
    """Nothing but keys and values of frozen rows is computed for dropped rows, whatever the architecture."""
    found = Captured.of(models.spec(block, depth=1), "t")
    kept = models.TOKENS - models.IMAGE
    hidden, frozen = found.rewritten(site(0, 1, 0.0)), found.rewritten(site(0, 1, 0.0, mode="freeze"))
    for graph in (hidden, frozen):
        assert_well_formed(graph, found.graph)
    Run.of(hidden).assert_equals(Run.of(found.seeded(site(0, 1, 0.0))))
    Run.of(frozen).assert_equals(Run.of(found.seeded(site(0, 1, 0.0, mode="freeze"))))

    def whole(graph: tg.TaskGraph) -> set[str]:
        """Weights of the block that transform all rows."""
        linears = [n for n in calls(graph, aten.linear.default) if module_path(n).startswith("stages")]
        return {module_path(n).partition(".0.")[2] for n in linears if tensor(n).shape[1] != kept}  # type: ignore[union-attr]

    assert whole(hidden) == set()
    assert whole(frozen) == {"attention.k", "attention.v"}


def test_a_second_attention() -> None:
    """Both hide; neither freezes: the second one's keys are rows that the first one made."""
    found = Captured.of(models.spec(models.SelfAndCross, depth=1), "t")
    hidden = found.rewritten(site(0, 1, 0.0))
    assert_well_formed(hidden, found.graph)
    Run.of(hidden).assert_equals(Run.of(found.seeded(site(0, 1, 0.0))))
    with pytest.raises(tg.IllegalRewriteError, match="what the block has added"):
        found.seeded(site(0, 1, 0.0, mode="freeze"))


# ------------------------------------------------------------------ small graphs


X, Y = torch.rand(2, 4, 3), torch.rand(2, 4, 3)
I, J = rows([0, 2, 3], [1, 2, 3]), rows([0, 1], [1, 2])


class Case:
    """A program over ``x``, ``y`` and two indices, run before and after."""

    def __init__(self) -> None:
        self.p = Program()
        self.x, self.y = self.p.input("x", X), self.p.input("y", Y)
        self.i, self.j = self.p.input("i", I), self.p.input("j", J)

    def rewritten(self, *outputs: fx.Node) -> list[fx.Node]:
        """The calls after push-down."""
        module = self.p.module(*outputs)
        before = module(*self.p.inputs)
        module = PushDown()(module).graph_module
        for a, b in zip(before, module(*self.p.inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        self.sunk_calls = [n for n in module.graph.nodes if n.op == "call_function"]
        return self.sunk_calls

    def expressions(self, *outputs: fx.Node) -> list[str]:
        """The outputs after push-down, written out."""
        calls = self.rewritten(*outputs)
        return [written(n) for n in calls[-1].graph.output_node().args[0]]


def written(n: fx.Node) -> str:
    if n.op == "placeholder":
        return n.name
    return f"{str(n.target).split('.')[1]}({', '.join(written(x) for x in n.all_input_nodes)})"


def test_a_selection_passes_rowwise_operators() -> None:
    c = Case()
    out = c.p.select(c.p(aten.add.Tensor, c.p(aten.relu.default, c.x), c.y), c.i)
    assert c.expressions(out) == ["add(relu(select(x, i)), select(y, i))"]


def test_a_selection_stops_where_rows_mix() -> None:
    c = Case()
    out = c.p.select(c.p(aten.relu.default, c.p(aten.cumsum.default, c.x, 1)), c.i)
    assert c.expressions(out) == ["relu(select(cumsum(x), i))"]


def test_readers_share_their_common_prefix() -> None:
    """One wants rows i, another rows j of those: relu works on rows i."""
    c = Case()
    first = c.p.select(c.p(aten.relu.default, c.x), c.i)
    assert c.expressions(first, c.p.select(first, c.j)) == ["relu(select(x, i))", "select(relu(select(x, i)), j)"]


def test_readers_that_disagree_stop_a_selection() -> None:
    c = Case()
    h = c.p(aten.relu.default, c.x)
    assert c.expressions(c.p.select(h, c.i), c.p.select(h, c.j)) == ["select(relu(x), i)", "select(relu(x), j)"]


def test_a_reader_of_all_rows_stops_a_selection() -> None:
    c = Case()
    h = c.p(aten.relu.default, c.x)
    assert c.expressions(h, c.p.select(h, c.i)) == ["relu(x)", "select(relu(x), i)"]


def test_a_selection_undoes_its_restore() -> None:
    c = Case()
    kept = c.p(aten.relu.default, c.p.select(c.x, c.i))
    assert c.expressions(c.p.select(c.p(tokgraph.restore.default, c.y, kept, c.i), c.i)) == ["relu(select(x, i))"]


def test_a_restore_with_another_reader_stays() -> None:
    """Whoever reads kept rows reads them from where they were computed."""
    c = Case()
    kept = c.p(aten.relu.default, c.p.select(c.x, c.i))
    whole = c.p(tokgraph.restore.default, c.y, kept, c.i)
    expected = ["restore(y, relu(select(x, i)), i)", "relu(select(x, i))"]
    assert c.expressions(whole, c.p.select(whole, c.i)) == expected


def test_a_restore_is_not_undone_by_another_index() -> None:
    c = Case()
    whole = c.p(tokgraph.restore.default, c.x, c.p.select(c.y, c.i), c.i)
    assert c.expressions(c.p.select(whole, c.j)) == ["select(restore(x, select(y, i), i), j)"]


def test_an_inner_selection_goes_through_the_outer_restore() -> None:
    c = Case()
    whole = c.p(tokgraph.restore.default, c.x, c.p(aten.relu.default, c.p.select(c.y, c.i)), c.i)
    out = c.p.select(c.p.select(whole, c.i), c.j)
    assert c.expressions(out) == ["relu(select(select(y, i), j))"]


def test_equal_selections_become_one() -> None:
    c = Case()
    first, second = (c.p(op, c.p.select(c.x, c.i)) for op in (aten.relu.default, aten.exp.default))
    calls = c.rewritten(first, second)
    assert [n.target for n in calls].count(tokgraph.select.default) == 1


def test_values_without_batch_are_lifted_once() -> None:
    """Two readers of a shared ``[tokens, hidden]`` value: it is given a batch and indexed one time."""
    p = Program()
    x, y = p.input("x", X), p.input("y", Y)
    bias, i = p.input("bias", torch.rand(4, 3)), p.input("i", I)
    first, second = (p.select(p(aten.mul.Tensor, h, bias), i) for h in (x, y))
    module = p.module(first, second)
    before = module(*p.inputs)
    sunk = PushDown()(module).graph_module
    for a, b in zip(before, sunk(*p.inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    targets = [n.target for n in sunk.graph.nodes if n.op == "call_function"]
    assert targets.count(tokgraph.select.default) == 3  # x, y, and the lifted bias
    assert targets.count(aten.expand.default) == 1
    products = [n for n in sunk.graph.nodes if n.target is aten.mul.Tensor]
    assert {tuple(tensor(n).shape) for n in products} == {(2, 3, 3)}  # type: ignore[union-attr]


@pytest.mark.parametrize(("dim", "narrowed"), [(1, "x"), (2, "y")])
def test_a_product_is_narrowed_on_one_side(dim: int, narrowed: str) -> None:
    """Rows of scores are rows of the left operand, columns are rows of the right one."""
    c = Case()
    scores = c.p(aten.matmul.default, c.x, c.p(aten.transpose.int, c.y, 1, 2))
    calls = c.rewritten(c.p.select(scores, c.i, dim))
    (product,) = [n for n in calls if n.target is aten.matmul.default]
    assert tuple(tensor(product).shape) == ((2, 3, 4) if dim == 1 else (2, 4, 3))  # type: ignore[union-attr]
    (chosen,) = [n for n in calls if n.target is tokgraph.select.default]
    assert chosen.args[0].name == narrowed


def test_a_value_times_itself_is_narrowed_as_query_alone() -> None:
    """``x @ x.T`` reads the same rows as queries and as keys; only the queries may go."""
    c = Case()
    scores = c.p(aten.matmul.default, c.x, c.p(aten.transpose.int, c.x, 1, 2))
    assert c.expressions(c.p.select(scores, c.i)) == ["matmul(select(x, i), transpose(x))"]


def test_a_dead_attention_goes() -> None:
    """torch takes it for impure, since it may drop out; kept, it would read rows that are no longer there."""
    c = Case()
    h = c.p(aten.relu.default, c.x)
    heads = c.p(aten.unsqueeze.default, h, 1)
    c.p(aten.scaled_dot_product_attention.default, heads, heads, heads, None, 0.0, True)
    assert c.expressions(c.p.select(h, c.i)) == ["relu(select(x, i))"]
    assert len(c.sunk_calls) == 2


def test_sizes_of_views_follow() -> None:
    c = Case()
    split = c.p(aten.reshape.default, c.x, [2, 4, 3, 1])
    out = c.p.select(c.p(aten.expand.default, split, [2, 4, 3, 5]), c.i)
    sizes = [n.args[1] for n in c.rewritten(out) if n.target in (aten.reshape.default, aten.expand.default)]
    assert sizes == [[2, 3, 3, 1], [2, 3, 3, 5]]


def test_a_selection_that_cannot_move_is_no_modification() -> None:
    c = Case()
    out = c.p.select(c.p(aten.cumsum.default, c.x, 1), c.i)
    module = c.p.module(out)
    assert not PushDown()(module).modified


def test_selections_that_swap_with_relu_are_a_modification() -> None:
    """Same calls, other shapes."""
    c = Case()
    result = PushDown()(c.p.module(c.p.select(c.p(aten.relu.default, c.x), c.i)))
    assert result.modified
    assert not PushDown()(result.graph_module).modified


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            assert tuple(result.shape) == tuple(tensor(n).shape), n.format_node()  # type: ignore[union-attr]
        return result


def work(module: fx.GraphModule) -> int:
    """Elements that operators compute, moves of rows aside."""
    moves = (tokgraph.select.default, tokgraph.restore.default, aten.expand.default, aten.unsqueeze.default)
    computed = [n for n in module.graph.nodes if n.op == "call_function" and n.target not in moves]
    return sum(tensor(n).numel() for n in computed)  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs())
def test_random_programs(drawn: Drawn) -> None:
    """Push-down never changes a value, never adds work, and is done after one time."""
    module, inputs = drawn.module, drawn.inputs
    before, cost = module(*inputs), work(module)
    result = PushDown()(module)
    result.graph_module.graph.lint()
    for a, b in zip(before, _Shapes(result.graph_module).run(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert work(result.graph_module) <= cost
    if result.modified:
        code = result.graph_module.code
        assert not PushDown()(result.graph_module).modified
        assert result.graph_module.code == code

"""Equal calls become one; calls that only look equal do not."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.nn import functional as F

from tests.passes.programs import Program
from tests.passes.tools import assert_well_formed, changes, traced
from tokgraph.passes.pipeline import Pipeline
from tokgraph.passes.simplify import ShareDuplicates

aten = torch.ops.aten


def run(function: object, *args: Tensor) -> str:
    before = traced(function, *args)  # type: ignore[arg-type]
    after = Pipeline([ShareDuplicates()]).run_task(before)
    assert_well_formed(after, before)
    for a, b in zip(before.graph_module(*args), after.graph_module(*args), strict=True):
        assert a is not b
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    return changes(before, after)


def test_equal_chains() -> None:
    def two_layers(x: Tensor, cos: Tensor) -> tuple[Tensor, ...]:
        first = x * cos.unsqueeze(1).expand(2, 3, -1, -1)
        return (first, first * cos.unsqueeze(1).expand(2, 3, -1, -1))

    assert_expected_inline(
        run(two_layers, torch.rand(2, 3, 4, 5), torch.rand(1, 4, 5)),
        """\
-%unsqueeze.2 = unsqueeze(%args.2, 1)  # float32[1, 1, 4, 5]
-%expand.2 = expand(%unsqueeze.2, [2, 3, -1, -1])  # float32[2, 3, 4, 5]
-%mul.2 = mul.Tensor(%mul, %expand.2)  # float32[2, 3, 4, 5]
+%mul.2 = mul.Tensor(%mul, %expand)  # float32[2, 3, 4, 5]
""",
    )


def test_numbers_of_other_types() -> None:
    """``full(0)`` and ``full(False)`` are equal in Python, and hold other types."""

    def fills(x: Tensor) -> tuple[Tensor, ...]:
        return torch.full((2,), 0) + x, torch.full((2,), False) + x, torch.full((2,), 0.0) + x

    assert run(fills, torch.ones(2, dtype=torch.int64)) == ""


def test_what_draws() -> None:
    def draws(x: Tensor) -> tuple[Tensor, ...]:
        heads = x.unsqueeze(1)
        attend = [F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5) for _ in range(2)]
        return (
            F.dropout(x, 0.5) + F.dropout(x, 0.5),
            *(a + 1 for a in attend),
            torch.rand_like(x) + torch.rand_like(x),
        )

    before = traced(draws, torch.rand(2, 3, 4))
    assert changes(before, Pipeline([ShareDuplicates()]).run_task(before)) == ""


def test_what_is_returned_is_a_tensor_of_its_own() -> None:
    assert run(lambda x: (x + 1, x + 1), torch.rand(2)) == ""


def test_a_check_happens_as_often_as_it_is_written() -> None:
    p = Program()
    ok = p.input("ok", torch.tensor(True))
    for _ in range(2):
        p(torch.ops.tokgraph.check.default, ok, "no", "", "", [], [])
    assert not ShareDuplicates()(p.module(ok)).modified


def test_operators_of_users_may_draw_and_not_say_so() -> None:
    with torch.library._scoped_library("tokgraph_test_duplicates", "FRAGMENT"):

        @torch.library.custom_op("tokgraph_test_duplicates::noise", mutates_args=())
        def noise(x: Tensor) -> Tensor:
            return torch.randn_like(x)

        noise.register_fake(torch.empty_like)
        graph = fx.Graph()
        x = graph.placeholder("x")
        drawn = [graph.call_function(torch.ops.tokgraph_test_duplicates.noise.default, (x,)) for _ in range(2)]
        graph.output((graph.call_function(torch.ops.aten.sub.Tensor, tuple(drawn)),))
        module = fx.GraphModule({}, graph)
        ShareDuplicates().call(module, None)
        assert [node in module.graph.nodes for node in drawn] == [True, True]

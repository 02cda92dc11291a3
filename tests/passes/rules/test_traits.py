"""What rules say of their operators beside the axes: each trait tried out on every operator that has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.passes.rules.calls import Call, assert_same, every, numbers, shape
from tests.passes.rules.test_rules import CASES, ELEMENTWISE, RANDOM, RULED, H, S, call_of, elementwise_call, stream
from tokgraph.ir.node import rank, tensor_inputs
from tokgraph.passes.capture.apart import OF_RESULT, shifted
from tokgraph.passes.cost.operators import MORE, multiplies_nothing
from tokgraph.passes.rules import AxisMap, registry, rule, ruled_operators, traits
from tokgraph.passes.rules.registry import first_input, has_rule, identity_rows

aten, tokgraph = torch.ops.aten, torch.ops.tokgraph


def operators_with(trait: str) -> list[Any]:
    return sorted((op for op in RULED if getattr(traits(op), trait) not in (None, False)), key=str)


def calls(op: Any) -> list[Call]:
    return [elementwise_call(op)] if op in ELEMENTWISE else [call_of(op, args) for args in CASES.get(op, [])]


def calls_with(trait: str) -> list[Any]:
    """Calls of every operator that has a trait."""
    return [pytest.param(call, id=f"{op}-{i}") for op in operators_with(trait) for i, call in enumerate(calls(op))]


# products


@pytest.mark.parametrize("op", CASES, ids=str)
def test_operators_that_count_flops_say_that_they_multiply(op):
    flops = 0
    for args in CASES[op]:
        call = call_of(op, args)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call.run()
        flops += counter.get_total_flops()
    if isinstance(op, torch._ops.OpOverload):
        assert traits(op).products == (flops > 0 or op._overloadpacket in MORE)
        assert multiplies_nothing(op) != traits(op).products


# axes


def with_axis_split(call: Call, axes: tuple[str, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Results with the leading axis split in two before the call, and after it; ``None`` where no input has it."""
    sources = {x for x, axis in call.rule.rows[0] or () if axis == 0} if call.rule.rows else set()
    if not sources or set(call.rule.rows[0] or ()) != {(x, 0) for x in sources}:
        return None
    size = shape(call.values[next(iter(sources))])[0]
    split = (2, size // 2) if size % 2 == 0 else (1, size)
    before = [t.unflatten(0, split) for t in call.run() if t.dim() == len(call.rule.rows)]
    for x in sources:
        call.values[x] = every(call.values[x], lambda t: t.unflatten(0, split))
    counted = len(call.rule.rows) if call.node.target in OF_RESULT else rank(tensor_inputs(call.node)[0])
    call.node.args, call.node.kwargs = shifted(call.node, axes, (2, *[1] * (counted - 1)))
    return call.run()[: len(before)], before


@pytest.mark.parametrize("op", operators_with("axes"), ids=str)
def test_calls_on_values_with_more_leading_axes(op):
    for call in calls(op):
        found = with_axis_split(call, traits(op).axes or ())
        if found is not None:
            assert_same(*found, str(op))


def test_operators_with_named_axes_are_tried():
    tried = {
        op
        for op in operators_with("axes")
        for call in calls(op)
        if with_axis_split(call, traits(op).axes or ()) is not None
    }
    whole = {aten.sum.default, aten.mean.default, aten.prod.default, aten.all.default, aten.any.default}  # no axis left
    assert set(operators_with("axes")) - tried == whole | RANDOM.keys()


# values


@pytest.mark.parametrize("call", calls_with("copies"))
def test_copies_return_their_inputs_values(call):
    assert len(call.values) == 1
    assert torch.equal(call.run()[0].double(), stream)


@pytest.mark.parametrize("call", calls_with("shape_only"))
def test_only_the_shape_is_read(call):
    if call.node.target is not aten.new_empty.default:
        (x,) = call.values
        assert torch.equal(call.run()[0], call.run({x: call.values[x] + 1})[0])


@pytest.mark.parametrize("call", calls_with("lookup"))
def test_lookups_return_elements_of_their_first_input(call):
    assert torch.isin(call.run()[0], call.values[first_input(call.node)]).all()


@pytest.mark.parametrize("call", calls_with("sized"))
def test_sizes_are_those_of_the_result(call):
    sizes = call.node.args[1]
    (result,) = call.run()
    assert len(sizes) == result.dim()
    assert all(given in (-1, size) for given, size in zip(sizes, result.shape, strict=True))


@pytest.mark.parametrize("call", calls_with("reshape"))
def test_reshapes_keep_the_order_of_elements(call):
    assert traits(call.node.target).sized
    assert torch.equal(call.run()[0].flatten(), call.values[first_input(call.node)].flatten())


@pytest.mark.parametrize("call", calls_with("normalises"))
def test_norms_do_not_see_the_scale_of_features(call):
    x = first_input(call.node)
    torch.testing.assert_close(call.run({x: 3 * call.values[x]})[0], call.run()[0], rtol=1e-2, atol=1e-2)


# the tag


@pytest.fixture
def shop() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library("tests_shop", "FRAGMENT") as library:
        yield library


def defined(shop: torch.library.Library, name: str, schema: str, function: Any, *tags: torch.Tag) -> Any:
    shop.define(f"{name}{schema}", tags=(torch.Tag.pointwise, *tags))
    shop.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.tests_shop, name).default


def test_a_users_operator_with_the_tag_is_described(shop):
    op = defined(shop, "swish", "(Tensor x, Tensor scale, float b) -> Tensor", lambda x, scale, b: scale * x * b)
    call = Call(op, stream, numbers(S, H), 2.0)
    call.check()
    assert has_rule(call.node)
    assert op in ruled_operators()
    assert traits(op).broadcasts
    assert multiplies_nothing(op)


@pytest.mark.parametrize(
    ("name", "schema", "tags"),
    [
        ("writes", "(Tensor(a!) x) -> Tensor(a!)", ()),
        ("lists", "(Tensor x) -> Tensor[]", ()),
        ("decides", "(Tensor x) -> bool", ()),
        ("checks", "(Tensor x) -> ()", ()),
        ("draws", "(Tensor x) -> Tensor", (torch.Tag.nondeterministic_seeded,)),
    ],
)
def test_the_tag_alone_does_not_describe(shop, name, schema, tags):
    op = defined(shop, name, schema, lambda x: x, *tags)
    assert op not in ruled_operators()
    assert traits(op) == traits(None)


def test_a_rule_of_ones_own_comes_before_the_tag(shop, monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    op = defined(shop, "mine", "(Tensor x) -> Tensor", torch.abs)
    assert multiplies_nothing(op)  # seen before there is a rule: the answer is not kept

    @rule(op, products=True)
    def mine(node: torch.fx.Node) -> AxisMap:
        return AxisMap((None, *identity_rows(node, first_input(node))[1:]))

    assert Call(op, stream).rule.rows[0] is None
    assert not traits(op).broadcasts
    assert not multiplies_nothing(op)
    with pytest.raises(ValueError, match="has a rule already"):
        rule(op)(mine)


def test_a_trait_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="product"):
        rule(product=True)

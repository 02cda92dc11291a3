"""Options of policies: each states its range once; checks, `tokgraph policies` and error messages come from there."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

import tokgraph as tg
from tests.planning.facts import G, U, facts, task
from tokgraph.planning import Blocks, FastV, L, Policy, Shared, policies, policy
from tokgraph.planning.options import Option, options_of

BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def ranged() -> Iterator[tuple[str, Option]]:
    """Options of all policies that are numbers or spans."""
    for name, cls in policies().items():
        for option in options_of(cls).values():
            if option.values.get("type") in ("integer", "number", "array"):
                yield name, option


RANGED = list(ranged())


def ends(option: Option, depth: int) -> tuple[Any, Any]:
    """The least and the largest value that an option's range admits, of whole numbers or floating point numbers."""
    if option.blocks is not None:
        return option.blocks.low, option.blocks.high.at(depth)
    schema = option.values
    step = (lambda x, to: x + (1 if to > 0 else -1)) if schema["type"] == "integer" else math.nextafter
    low, high = schema.get("minimum"), schema.get("maximum")
    low = step(schema["exclusiveMinimum"], math.inf) if low is None else low
    high = step(schema["exclusiveMaximum"], -math.inf) if high is None else high
    return low, high


def outside(option: Option, depth: int) -> list[Any]:
    """Values next to the range, below and above."""
    low, high = ends(option, depth)
    if option.values["type"] == "number":
        return [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan, math.inf, -math.inf]
    if option.values["type"] == "array":
        return [(low - 1, high), (low, high + 1), (low, low), (high, low)]
    return [low - 1, high + 1]


def inside(option: Option, depth: int) -> st.SearchStrategy[Any]:
    """Values of the range, its ends among them."""
    low, high = ends(option, depth)
    if option.values["type"] == "number":
        return st.one_of(st.just(low), st.just(high), st.floats(low, high))
    if option.values["type"] == "array":
        spans = st.tuples(st.integers(low, high), st.integers(low, high)).filter(lambda span: span[0] < span[1])
        return st.one_of(st.just((low, high)), spans)
    return st.one_of(st.just(low), st.just(high), st.integers(low, high))


def admitted(known: tg.Facts, name: str, **options: Any) -> bool:
    """Whether the policy takes the options: it plans, or finds no ratio or target as near as asked."""
    try:
        policy(name, **options).plan(known)
    except tg.PlanError as error:
        return error.message.startswith(("no keep ratio near", "no plan with sharing index"))
    return True


def ids(x: object) -> str:
    return x if isinstance(x, str) else getattr(x, "name", "")


@pytest.mark.parametrize(("name", "option"), RANGED, ids=ids)
@settings(max_examples=20, deadline=None)
@given(data=st.data(), depth=st.integers(4, 40))
def test_a_range_is_what_it_says(name: str, option: Option, data: st.DataObject, depth: int) -> None:
    """Values of the range plan; those just outside are refused, with the option, the value and the range in the error."""
    known = facts(depth, visual=64)
    value = data.draw(inside(option, depth))
    assert admitted(known, name, **{option.name: value})
    for value in outside(option, depth):
        with pytest.raises(tg.PlanError) as refused:
            policies()[name](**{option.name: value}).plan(known)
        assert refused.value.code == "TG005"
        assert f"policy {name!r}: option {option.name}={value!r}" in refused.value.message
        assert f"give {option.range(depth)}" in str(refused.value.help)
        assert option.description in str(refused.value.help)


def test_every_number_has_a_range() -> None:
    assert len(RANGED) >= 15
    for name, option in RANGED:
        assert option.blocks is not None or sum(bound in option.values for bound in BOUNDS) == 2, (name, option.name)


def test_every_option_is_described() -> None:
    for name, cls in policies().items():
        assert cls.describe()["summary"], name
        for option in options_of(cls).values():
            assert option.description, (name, option.name)
            assert option.range() in policy_words(option), (name, option.name)


def policy_words(option: Option) -> str:
    """All that an error about the option says."""
    with pytest.raises(tg.PlanError) as error:
        option.checked("x", object())
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: FastV(drop=1.5), r"option drop=1.5: .*less than or equal to 1"),
        (lambda: FastV(k="two"), r"option k='two': Input should be a valid integer"),  # type: ignore[arg-type]
        (lambda: Shared(mode="hid"), r"option mode='hid': .*give 'hide' or 'freeze'"),  # type: ignore[arg-type]
        (lambda: Shared(span=(1, 2, 3)), r"option span=\(1, 2, 3\): .*give 0 <= start < end <= L - 1"),  # type: ignore[arg-type]
        (lambda: Shared(seed=2**63), r"option seed=9223372036854775808: .*give 0 <= seed < 2\*\*63"),
    ],
)
def test_a_class_checks_as_the_registry_does(make: Any, shown: str) -> None:
    with pytest.raises(tg.PlanError, match=f"(?s){shown}"):
        make()


def test_values_become_the_type_of_the_option() -> None:
    assert Shared(keep=1, span=[1, 2]) == Shared(keep=1.0, span=(1, 2))  # type: ignore[arg-type]
    assert type(policy("shared", keep=1).options()["keep"]) is float


def test_only_tasks_of_the_kind_count() -> None:
    """FastV thins understanding: the depth of generation is no matter."""
    uneven = tg.Facts({U: task(U, blocks=6), G: task(G, blocks=3)})
    assert policy("fastv", k=5).plan(uneven).sites[0].start == 5
    with pytest.raises(tg.PlanError, match="task 'generation' has 3 blocks"):
        policy("hmgen", skipped=2).plan(uneven)


def test_a_model_that_no_value_fits() -> None:
    with pytest.raises(tg.PlanError, match="no value fits; the range is 1 <= skipped <= .*choose another policy"):
        policy("hmgen", skipped=1).plan(facts(2))


@pytest.mark.parametrize(
    ("depth", "text", "at_ten"),
    [
        (L, "L", 10),
        (L - 1, "L - 1", 9),
        ((L - 1) // 2, "(L - 1) // 2", 4),
        (20 - L, "20 - L", 10),
        (2**63 + 1 - L, "2**63 + 1 - L", 2**63 - 9),
        (L - 1 - 2, "L - 3", 7),
        (L - -2, "L + 2", 12),
        (L // 2 // 2, "(L) // 4", 2),
        (7 - (L - 1), "8 - L", -2),
        ((12 - L) - 1, "11 - L", 1),
    ],
)
def test_numbers_that_depend_on_the_depth(depth: Any, text: str, at_ten: int) -> None:
    assert (str(depth), depth.at(10)) == (text, at_ten)


class Opaque:
    """A type that JSON has no word for."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("tokgraph.planning.policy")
    monkeypatch.setattr(module, "_POLICIES", dict(module._POLICIES))


def test_a_policy_of_ones_own(registry: None) -> None:
    """Plain annotations are enough; what they say is checked, and described."""

    @dataclass(frozen=True)
    class Own(Policy):
        """Mine."""

        name: ClassVar[str] = "own"

        blocks: Annotated[int, Blocks(1, L - 1, "understanding"), Field(description="how many")] = 1
        share: float = 0.25
        other: Opaque | None = None

        def decide(self, facts: tg.Facts) -> tg.Plan:
            return self.made([tg.DropSite(U, 0, self.blocks, self.share)], exact=False)

    assert policy("own", blocks=3).plan(facts()).sites == (tg.DropSite(U, 0, 3, 0.25),)
    with pytest.raises(tg.PlanError, match="option blocks=4 is out of range"):
        policy("own", blocks=4).plan(facts())
    with pytest.raises(tg.PlanError, match="option share='much': Input should be a valid number"):
        policy("own", share="much")
    options = Own.describe()["options"]
    assert options["blocks"]["x-blocks"] == {"minimum": 1, "maximum": "L - 1", "tasks": "understanding"}
    assert options["share"]["type"] == "number"
    assert options["other"]["default"] is None
    other = Opaque()
    assert policy("own", other=other).options()["other"] is other

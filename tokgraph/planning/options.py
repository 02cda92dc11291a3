"""Options of policies: types, ranges and meanings stated once, as annotations of fields; checked and described from there.

An option is a field ``keep: Annotated[float, Field(ge=0, le=1, description="...")] = 0.5``. What pydantic can say of its
values stands in ``Field``; what depends on the depth of the model is a :class:`Blocks` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from tokgraph.errors import PlanError
from tokgraph.ir.facts import Facts, TaskFacts

Kind = Literal["understanding", "generation"]
COMPARED = {"minimum": ("{} <= ", ""), "exclusiveMinimum": ("{} < ", ""), "maximum": ("", " <= {}"),
            "exclusiveMaximum": ("", " < {}")}  # fmt: skip
"""JSON Schema's words for bounds -> what stands before and after the option's name."""

WORDS = {
    "array": "a sequence",
    "boolean": "True or False",
    "integer": "a whole number",
    "number": "a number",
    "object": "a mapping",
    "string": "a text",
}


def kind_of(task: TaskFacts) -> Kind:
    """Whether a task predicts visual tokens (generation) or not (understanding)."""
    return "generation" if task.demand.reads == "visual" else "understanding"


@dataclass(frozen=True)
class Depth:
    """A number that depends on the number of blocks: ``(sign * L + plus) // over``. Write it with :data:`L`."""

    sign: Literal[1, -1] = 1
    plus: int = 0
    over: int = 1

    def at(self, blocks: int) -> int:
        """The number, for a task of so many blocks."""
        return (self.sign * blocks + self.plus) // self.over

    def __sub__(self, number: int) -> Depth:
        return Depth(self.sign, self.plus - number, self.over)

    def __rsub__(self, number: int) -> Depth:
        return Depth(-1 if self.sign == 1 else 1, number - self.plus, self.over)

    def __floordiv__(self, number: int) -> Depth:
        return Depth(self.sign, self.plus, self.over * number)

    def __str__(self) -> str:
        if self.sign == -1:
            inner = f"{shown(self.plus)} - L"
        else:
            inner = "L" + (f" {'+' if self.plus > 0 else '-'} {abs(self.plus)}" if self.plus else "")
        return inner if self.over == 1 else f"({inner}) // {self.over}"


L = Depth()
"""The number of blocks of a task, as in ``Blocks(1, L - 1)``."""


@dataclass(frozen=True)
class Blocks:
    """The range of an option that depends on the model's depth: ``low <= value <= high``; of a span, of both its ends.

    Checked when a policy plans, against every task of the kind.

    Args:
        low: the least value.
        high: the largest value.
        kind: tasks whose depth counts; ``None``: all.
    """

    low: int
    high: Depth
    kind: Kind | None = None

    def admits(self, value: Any, blocks: int) -> bool:
        """Whether a task of so many blocks takes the value: a number, or a ``(start, end)`` of which the end is later."""
        numbers = value if isinstance(value, tuple) else (value,)
        ordered = all(a < b for a, b in pairwise(numbers))
        return ordered and self.low <= numbers[0] and numbers[-1] <= self.high.at(blocks)

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> Any:
        """JSON Schema cannot say it: the bounds stand under a word of ours."""
        tasks = {} if self.kind is None else {"tasks": self.kind}
        return {**handler(core_schema), "x-blocks": {"minimum": self.low, "maximum": str(self.high), **tasks}}


@dataclass(frozen=True)
class Option:
    """One option of a policy.

    Args:
        name: its name.
        schema: its type as JSON Schema, with default and description.
        type: the same, to check values with.
        blocks: its range, where that depends on the model's depth.
    """

    name: str
    schema: Mapping[str, Any]
    type: TypeAdapter[Any]
    blocks: Blocks | None

    @property
    def description(self) -> str:
        """What it means."""
        return str(self.schema.get("description", ""))

    @property
    def default(self) -> Any:
        """What it is unless it is given; as JSON writes it."""
        return self.schema.get("default")

    @property
    def values(self) -> Mapping[str, Any]:
        """The schema of its values other than ``None``."""
        return next((s for s in self.schema.get("anyOf", ()) if s.get("type") != "null"), self.schema)

    def range(self, depth: int | None = None) -> str:
        """The values that it takes, in words of Python: ``"0 <= keep <= 1"``; its type where all values will do.

        Args:
            depth: number of blocks; ``None``: the range says ``L``.
        """
        if self.blocks is not None:
            high = self.blocks.high if depth is None else self.blocks.high.at(depth)
            inner = "start < end" if self.values.get("type") == "array" else self.name
            return f"{self.blocks.low} <= {inner} <= {shown(high)}"
        sides = [(before, after, shown(self.values[k])) for k, (before, after) in COMPARED.items() if k in self.values]
        if sides:
            start, end = ("".join(side[i].format(side[2]) for side in sides) for i in (0, 1))
            return f"{start}{self.name}{end}"
        if "enum" in self.values:
            return " or ".join(map(repr, self.values["enum"]))
        return WORDS.get(str(self.values.get("type")), "any value")

    def checked(self, policy: str, value: Any) -> Any:
        """The value as the option's type.

        Raises:
            PlanError: it is of another type, or outside of the range.
        """
        try:
            return self.type.validate_python(value)
        except ValidationError as error:
            raise PlanError(
                f"policy {policy!r}: option {self.name}={value!r}: {error.errors()[0]['msg']}", help=self._help()
            ) from None

    def check_depth(self, policy: str, value: Any, facts: Facts) -> None:
        """Check the value against the depth of the tasks.

        Raises:
            PlanError: it is outside of the range.
        """
        if self.blocks is None or value is None:
            return
        for task in facts.values():
            counts = self.blocks.kind in (None, kind_of(task))
            if counts and not self.blocks.admits(value, len(task.blocks)):
                raise PlanError(
                    f"policy {policy!r}: option {self.name}={value!r} is out of range: task {task.name!r} has "
                    f"{len(task.blocks)} blocks",
                    help=self._help(len(task.blocks)),
                )

    def _help(self, depth: int | None = None) -> str:
        if depth is not None and self.blocks is not None and self.blocks.high.at(depth) < self.blocks.low:
            return f"no value fits; the range is {self.range()}, with L blocks: choose another policy"
        return f"give {self.range(depth)}" + (f"; {self.name}: {self.description}" if self.description else "")


class _AnyType(GenerateJsonSchema):
    """Leaves open what JSON has no word for, as a class of a plugin's own."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        """Any value."""
        return {}

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Leave out a default that JSON cannot write."""


@cache
def options_of(policy: type) -> Mapping[str, Option]:
    """Option name -> option, of a policy's class."""
    schemas = TypeAdapter(policy).json_schema(schema_generator=_AnyType).get("properties", {})
    hints = get_type_hints(policy, include_extras=True)
    config = ConfigDict(arbitrary_types_allowed=True)
    return {
        name: Option(name, schema, TypeAdapter(hints[name], config=config), _blocks(hints[name]))
        for name, schema in schemas.items()
    }


def _blocks(hint: Any) -> Blocks | None:
    found = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((x for x in found if isinstance(x, Blocks)), None)


def shown(number: Any) -> str:
    """A bound as one writes it: numbers beside a large power of two by the power."""
    if not isinstance(number, int) or abs(number) < 2**32:
        return f"{number:g}" if isinstance(number, float) else str(number)
    power = abs(number).bit_length() - 1
    rest = number - 2**power
    return f"2**{power}" + (f" + {rest}" if rest else "") if 0 <= rest < 2**16 else str(number)

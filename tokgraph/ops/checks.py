"""The operator that a model's own run-time check becomes: it returns nothing, and raises where the check does not hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from tokgraph.errors import BatchError, Where

from .base import NAMESPACE, Condition

TWICE = "two positions of a list are one row, whose gradient counts twice"
"""What a check says that is none of the model's: rows are computed once, however often they are asked for."""
_SLOT = re.compile("⟦([vs])(\\d+):([^⟧]*)⟧")


def slot(kind: str, number: int, form: str = "") -> str:
    """What stands in a message for a number that only a run knows.

    Args:
        kind: ``"v"`` for one of the operator's ``values``, ``"s"`` for one of its ``sizes``.
        number: which.
        form: how it is formatted, as in an f-string.
    """
    return f"⟦{kind}{number}:{form}⟧"


def slots(message: str) -> list[tuple[str, int, str]]:
    """``(kind, number, form)`` of everything that stands for a number in a message, in order."""
    return [(kind, int(number), form) for kind, number, form in _SLOT.findall(message)]


def filled(message: str, values: Sequence[Any], sizes: Sequence[int]) -> str:
    """A message with the numbers of a run."""

    def number(found: re.Match[str]) -> str:
        kind, at, form = found.groups()
        return format(values[int(at)].item() if kind == "v" else sizes[int(at)], form)

    return _SLOT.sub(number, message)


def _without_numbers(ok: Tensor, message: str, *_: Any) -> str:
    return _SLOT.sub("...", message)


@torch.library.custom_op(f"{NAMESPACE}::check", mutates_args=())
def check(ok: Tensor, message: str, source: str, module: str, values: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """A check that the model makes on its batch: every element of ``ok`` must be true.

    On a device the check is asynchronous, as ``torch._assert_async``, so that no step waits for it.

    Args:
        ok: any shape, bool.
        message: what the model says, with slots for ``values`` and ``sizes`` (:func:`slot`).
        source: ``file:line`` of the check, or the empty text.
        module: path of the module that checks, or the empty text.
        values: 0-dimensional tensors that the message tells.
        sizes: sizes that it tells.

    Raises:
        BatchError: an element is false.
    """
    if ok.device.type == "meta":
        return
    if ok.device.type != "cpu":
        torch._assert_async(ok.all(), _without_numbers(ok, message))
    elif not bool(ok.all()):
        place = Where(module=module or None, source=source or None)
        if message == TWICE:
            raise BatchError(TWICE, where=place, help="give each position once")
        raise BatchError(
            f"a check of the model does not hold for this batch: {filled(message, values, sizes)}",
            where=place,
            help="the model's own forward refuses the batch as well: correct the batch",
        )


check.register_fake(lambda ok, message, source, module, values, sizes: None)
has_side_effect(torch.ops.tokgraph.check.default)  # nothing reads its result, and dead code elimination must leave it
LOWERED: dict[torch._ops.OpOverload, Callable[..., Any]] = {torch.ops.tokgraph.check.default: lambda *_: None}
"""Operator -> the plain ATen function it is: none, a runtime checks nothing."""
CONDITIONS = {torch.ops.tokgraph.check.default: Condition(lambda ok, *_: ok.all(), _without_numbers)}
"""Operator -> what it asks of a batch."""

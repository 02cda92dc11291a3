"""Checks that a model makes on values while it is traced: they become calls of ``tokgraph.check``, with the model's message.

``torch.export`` knows such checks as assertions on numbers that it takes out of tensors, without the model's message;
transformers gives none away while it traces. So the functions of torch that check are replaced while it runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import TensorReferenceAnalysis

from tokgraph.ir.frames import is_machinery
from tokgraph.ops.checks import slot, slots

_CHECKS = ("_check_with", "_check_tensor_all_with", "_assert", "_assert_async")
"""Functions of torch that check; ``torch._check`` and ``torch._check_tensor_all`` call the first two."""
_HELPERS = ("torch_compilable_check",)
"""Functions of libraries that check for their callers: the message is among their variables."""
_UNTOLD = "a condition on the values of the batch is false"


@contextmanager
def keeping_checks() -> Iterator[None]:
    """While it is entered, checks on traced values become nodes of the trace."""
    told = _Told()
    check_with, check_all, assert_, later = (getattr(torch, name) for name in _CHECKS)

    def on_number(error_type: Any, cond: Any, message: Any) -> None:
        if isinstance(cond, torch.SymBool) and free_unbacked_symbols(cond) and (frame := _checker()) is not None:
            _emit(told.condition(cond), message, frame, told)
        check_with(error_type, cond, message)

    def on_tensor(error_type: Any, cond: Any, message: Any = None) -> None:
        frame = _checker() if _is_traced(cond) and cond.dtype is torch.bool else None
        if frame is None:
            check_all(error_type, cond, message)
        else:
            _emit(cond, message, frame, told)

    def asserts(condition: Any, message: Any) -> None:
        frame = _checker() if _is_traced(condition) else None
        if frame is None:
            assert_(condition, message)
        else:
            _emit(condition.to(torch.bool), message, frame, told)

    def asserts_later(condition: Any, *message: Any) -> None:
        frame = _checker() if _is_traced(condition) else None
        if frame is None:
            later(condition, *message)
        else:
            _emit(condition.to(torch.bool), message[0] if message else None, frame, told)

    with ExitStack() as patches:
        for name, function in zip(_CHECKS, (on_number, on_tensor, asserts, asserts_later), strict=True):
            patches.enter_context(mock.patch.object(torch, name, function))
        patches.enter_context(mock.patch.object(Tensor, "item", told.item(Tensor.item)))
        patches.enter_context(mock.patch.object(Tensor, "__format__", told.tensor(Tensor.__format__)))
        patches.enter_context(mock.patch.object(torch.SymInt, "__format__", told.size(torch.SymInt.__format__)))
        yield


def _is_traced(x: object) -> bool:
    return isinstance(x, Tensor) and type(x) is not Tensor


def _checker() -> FrameType | None:
    """The frame that checks: the innermost one of a model, passing over helpers of libraries; ``None``: torch itself does."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in (torch.__file__, __file__):
        frame = frame.f_back  # torch._check calls torch._check_with
    return None if frame is None or is_machinery(frame.f_code.co_filename) else frame


def _emit(ok: Tensor, message: Any, frame: FrameType, told: _Told) -> None:
    """Trace a check, with the numbers that its message tells."""
    caller = frame
    if frame.f_code.co_name in _HELPERS and frame.f_back is not None:
        caller, message = frame.f_back, frame.f_locals.get("msg", message)
    text, values, sizes = told.numbered(_text(message))
    torch.ops.tokgraph.check(ok, text, f"{caller.f_code.co_filename}:{caller.f_lineno}", "", values, sizes)


def _text(message: Any) -> str:
    """What the model says; a function that makes the message is called, and may fail on values that are not there yet."""
    try:
        return str(message() if callable(message) else message) if message is not None else _UNTOLD
    except Exception:
        return _UNTOLD


class _Told:
    """Where numbers are from: those that messages tell, as f-strings ask for them, and those that are taken out of tensors."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._sizes: list[torch.SymInt] = []
        self._items: dict[Any, Tensor] = {}

    def item(self, plain: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """``Tensor.item`` that notes which tensor a number is from."""

        def item(x: Tensor) -> Any:
            number = plain(x)
            models = not is_machinery(sys._getframe(1).f_code.co_filename)
            if models and isinstance(number, (torch.SymInt, torch.SymBool)):
                self._items.update(dict.fromkeys(free_unbacked_symbols(number), x.detach().reshape(()).to(torch.int64)))
            return number

        return item

    def condition(self, cond: torch.SymBool) -> Tensor:
        """A condition on numbers as one on the tensors they are from: tracing takes what is checked of numbers for true."""
        mode = get_proxy_mode()
        known = mode.tracer.sympy_expr_tracker if mode is not None else {}
        expression, env = cond.node.expr, dict(self._items)
        for symbol in expression.free_symbols - env.keys():
            if symbol not in known:
                return torch.scalar_tensor(torch.sym_ite(cond, 1, 0)) == 1
            env[symbol] = torch.scalar_tensor(cast(int, known[symbol].value), dtype=torch.int64)
        made: Tensor = sympy_interp(TensorReferenceAnalysis, env, expression)
        return made

    def tensor(self, plain: Callable[[Tensor, str], str]) -> Callable[[Tensor, str], str]:
        """``Tensor.__format__`` that puts a slot for a traced number."""

        def form(x: Tensor, spec: str) -> str:
            if not _is_traced(x) or x.dim() or is_machinery(sys._getframe(1).f_code.co_filename):
                return plain(x, spec)
            self._values.append(x.detach())
            return slot("v", len(self._values) - 1, spec)

        return form

    def size(self, plain: Callable[[torch.SymInt, str], str]) -> Callable[[torch.SymInt, str], str]:
        """``SymInt.__format__`` that puts a slot for a size."""

        def form(x: torch.SymInt, spec: str) -> str:
            if is_machinery(sys._getframe(1).f_code.co_filename):
                return plain(x, spec)
            if x.node.expr in self._items:  # what is checked of it may make a constant of the size
                self._values.append(self._items[x.node.expr])
                return slot("v", len(self._values) - 1, spec)
            self._sizes.append(x)
            return slot("s", len(self._sizes) - 1, spec)

        return form

    def numbered(self, text: str) -> tuple[str, list[Tensor], list[torch.SymInt]]:
        """A message with its own slots counted from 0, and what they stand for."""
        values: list[Tensor] = []
        sizes: list[torch.SymInt] = []
        for kind, number, form in slots(text):
            mine: list[Any] = values if kind == "v" else sizes
            text = text.replace(slot(kind, number, form), slot(kind.upper(), len(mine), form), 1)
            mine.append((self._values if kind == "v" else self._sizes)[number])
        return re.sub("⟦([VS])", lambda found: f"⟦{found[1].lower()}", text), values, sizes

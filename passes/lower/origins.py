"""Which node of a graph each function comes from that autograd will run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

Origin = TypeVar("Origin")


class Origins(Generic[Origin]):
    """Origins of autograd's functions, told apart by the sequence numbers that autograd gives out as it records."""

    def __init__(self) -> None:
        self._by_number: dict[int, Origin] = {}

    @contextmanager
    def recording(self, origin: Origin) -> Iterator[None]:
        """What autograd records inside comes from ``origin``."""
        first = _sequence_number()
        yield
        self._by_number.update(dict.fromkeys(range(first, _sequence_number()), origin))

    def functions(self, loss: torch.Tensor) -> Iterator[tuple[Any, Origin | None]]:
        """Every function of the backward of ``loss`` with its origin; ``None`` where gradients reach a parameter."""
        stack, seen = [loss.grad_fn], set()
        while stack:
            function = stack.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            stack += [following for following, _ in function.next_functions]
            yield function, self._by_number.get(function._sequence_nr())


def _sequence_number() -> int:
    return int(torch._C._autograd._get_sequence_nr())

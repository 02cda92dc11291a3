"""What an operator takes for itself while it runs: results of the operators that it is made of, gone when it is done."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Workspace(TorchDispatchMode):
    """Follows the memory of what runs in it, on tensors without storage or with.

    Args:
        given: tensors that are there before; their storage does not count.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._given = {storage_of(x) for x in given}
        self._holders: Counter[int] = Counter()
        self._now = self._start = self._most = 0

    def begin(self) -> None:
        """What is followed from here on is a part by itself."""
        self._start = self._most = self._now

    def beside_results(self) -> int:
        """The most bytes in use at once since :meth:`begin`, beyond those in use before it or still in use now."""
        return self._most - max(self._start, self._now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(results):
            if isinstance(x, torch.Tensor) and storage_of(x) not in self._given:
                self._hold(x)
        return results

    def _hold(self, x: torch.Tensor) -> None:
        storage, known = storage_of(x), x.untyped_storage().nbytes()
        size = known if isinstance(known, int) else 0  # its size depends on data
        if not self._holders[storage]:
            self._now += size
            self._most = max(self._most, self._now)
        self._holders[storage] += 1
        weakref.finalize(x, self._let_go, storage, size)

    def _let_go(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            self._now -= size


def storage_of(x: torch.Tensor) -> int:
    """What tells a tensor's storage from others that are there."""
    return int(x.untyped_storage()._cdata)

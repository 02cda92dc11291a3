"""Steps of a plan that drops at random: each training call draws anew, a recomputed one draws what it drew."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokgraph.errors import BatchError

_REMEMBERED = 4096
"""Calls whose backward may still come; more micro-batches than this are not in flight at once."""


class Draws:
    """Counts the training calls of a task, and recognises those that ``torch.utils.checkpoint`` repeats.

    Checkpointing restores the state of PyTorch's random numbers before it repeats a call, as dropout needs: a number that
    is drawn at each call tells which call it is.
    """

    def __init__(self) -> None:
        self._steps: OrderedDict[int, torch.Tensor] = OrderedDict()

    @contextmanager
    def of_call(self, counter: torch.Tensor | None) -> Iterator[None]:
        """Run a call at its step.

        Args:
            counter: int64 scalar that the graph reads, the steps so far; ``None``: the graph does not draw, or is not in
                training.

        Raises:
            BatchError: a call is repeated during the backward pass, and it cannot be known which.
        """
        if counter is None:
            yield
            return
        mark = int(torch.randint(2**62, (), device="cpu"))
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            self._steps[mark] = counter.clone()
            if len(self._steps) > _REMEMBERED:
                self._steps.popitem(last=False)
            yield
            counter.add_(1)
            return
        if mark not in self._steps:
            raise BatchError(
                "a task that drops at random is recomputed in the backward pass with other random numbers than in the forward",
                help="leave preserve_rng_state=True of torch.utils.checkpoint as it is",
            )
        now = counter.clone()
        counter.copy_(self._steps[mark])
        try:
            yield
        finally:
            counter.copy_(now)

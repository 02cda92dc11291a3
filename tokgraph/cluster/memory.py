"""Memory of one GPU through a training step: part by part, forward and backward, and where it is the most.

In the forward pass of part ``i`` of ``n``, what the parts before it keep is there, and what the part itself has in use; in its
backward pass that, and the gradients of the parts after it. Where blocks are computed again, those before it keep what they
read only, and the block at work keeps all. What is beside (parameters, gradients of other micro-batches, the optimizer's
states) depends on the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .workload import TaskWork, Workload


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU at the moment when most are in use.

    Args:
        parameters: of the model and the plan: shards, gathered parts, and what no task reads.
        gradients: of parameters.
        optimizer: states of AdamW.
        activations: kept for the backward pass.
        working: all else that the part at work has in use, and the batch.
        at: the moment: task, part and phase.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    at: str

    @property
    def total(self) -> float:
        """All together."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working

    def to_data(self) -> dict[str, Any]:
        """As plain data, with the ``total``."""
        return {name: x if name == "at" else round(x) for name, x in asdict(self).items()} | {
            "total": round(self.total)
        }


@dataclass(frozen=True)
class Beside:
    """What a layout has on a GPU beside activations.

    Args:
        parameters: part at work -> bytes of parameters.
        gradients: bytes of gradients that are done, from those of later parts of the task: ``(part at work, bytes of
            gradients of later parts)``.
        optimizer: bytes of states.
        parts: that this GPU runs.
        in_flight: micro-batches whose forward pass is done and whose backward pass is not, with the one at work.
    """

    parameters: Callable[[int], float]
    gradients: Callable[[int, float], float]
    optimizer: float
    parts: Sequence[int]
    in_flight: int = 1


def most(work: Workload, beside: Beside, again: bool) -> Memory:
    """The moment of a step at which most bytes are in use.

    Args:
        work: what is trained.
        beside: what the layout has on the GPU.
        again: blocks are computed again in the backward pass.
    """
    found = [m for name, task in work.tasks.items() for m in _moments(name, task, beside, again)]
    return max(found, key=lambda m: m.total)


def _moments(name: str, task: TaskWork, beside: Beside, again: bool) -> Iterable[Memory]:
    mine = [task.parts[i] for i in beside.parts]
    kept = [p.kept_again if again else p.kept for p in mine]
    waiting = (beside.in_flight - 1) * sum(kept)
    for i, (number, part) in enumerate(zip(beside.parts, mine, strict=True)):
        before = waiting + sum(kept[:i])
        after = sum(p.gradients for p in mine[i + 1 :])
        parameters, done = beside.parameters(number), beside.gradients(number, after)
        at = f"{name}, {part.title}"
        working = part.forward_peak + task.input_bytes
        held = beside.gradients(number, 0)
        yield Memory(parameters, held, beside.optimizer, before, working, f"{at}, forward")
        at_work = part.kept + (part.kept_again if again and part.is_block else 0)
        working = max(0, part.backward_peak - part.kept) + task.input_bytes
        yield Memory(parameters, done, beside.optimizer, before + at_work, working, f"{at}, backward")

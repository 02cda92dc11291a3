"""How a captured graph was held against the user's own forward, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CaptureCheck:
    """What was compared with the user's forward, and what that does and the graph does not.

    Args:
        batches: how many batches were compared: the example batch, and one made of it.
        error: the largest relative difference found, of loss, outputs, gradients and buffers.
        tolerance: the largest that passes; it follows the least precise type that the graph computes in.
        outputs: how many tensors beside the loss were compared.
        gradients: how many parameters have a gradient.
        without_gradient: how many require one and have none.
        buffers: names of buffers that the forward changes.
        random: the random numbers drawn from the same seed: ``"none"``, ``"equal"``, or ``"other"``: the graph draws in
            another order, or leaves out what nothing reads. It was then compared with the forward without chance.
        skipped: why nothing was compared, ``""`` where it was.
        notes: what the forward does and the graph does not, a sentence each: attributes that it sets, recomputation.
    """

    batches: int = 0
    error: float = 0.0
    tolerance: float = 0.0
    outputs: int = 0
    gradients: int = 0
    without_gradient: int = 0
    buffers: tuple[str, ...] = ()
    random: str = "none"
    skipped: str = ""
    notes: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

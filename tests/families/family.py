"""What a row of the table of models is made of: a tiny model, its tasks as a user writes them, other batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

import tokgraph as tg


@dataclass(frozen=True)
class Example:
    """A model from a small random configuration, in the mode that its user trains it in.

    Args:
        model: any `nn.Module`; its weights are moved away from their initial values.
        tasks: by name, as a user hands them to `tg.ModelSpec`.
        batch: `(task, seed)` to inputs of that task; seed 0 is the example batch. Batches differ in their values and, where
            the task allows it, in where the image stands.
        layers: by task, the paths of the modules of its decoder layers that attend over the token axis, in their order:
            what analysis has to find.
    """

    model: nn.Module
    tasks: Mapping[str, tg.Task]
    batch: Callable[[str, int], dict[str, Tensor]]
    layers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        name: as its authors write it.
        source: a class of `transformers`, or the paper by whose description it is written.
        make: builds it; takes seconds, downloads nothing.
        notes: what a reader of the table has to know, such as a configuration that is not the default one.
    """

    name: str
    source: str
    make: Callable[[], Example]
    notes: tuple[str, ...] = field(default=())

"""Tasks as the kind of model that trainers take: a mapping with the loss comes out, the state is the user's model's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokgraph.calls.copies import Copied
from tokgraph.errors import BatchError
from tokgraph.ir.program import tied_names
from tokgraph.ir.spec import LOSS_KEY, check_tasks, split_outputs
from tokgraph.runtime import Accelerated

log = logging.getLogger(__name__)


class TrainableTask(Copied, nn.Module):
    """One task of an accelerated program, or all in one step, for trainers such as that of ``transformers``.

    Its parameters are the user's model's (and those that the plan added), its ``state_dict`` has the user's keys, tied weights
    once; ``train`` and ``eval`` reach the user's model, whose other attributes (``config``) are found on it as well.

    Args:
        accelerated: the program.
        task: the task's name; ``None``: each input is the batch of the task of its name.

    Raises:
        BatchError: there is no such task.
    """

    def __init__(self, accelerated: Accelerated, task: str | None = None) -> None:
        check_tasks(() if task is None else (task,), accelerated)
        super().__init__()
        self.model = accelerated.model
        self.added = nn.ParameterList(accelerated.own_parameters.values())
        self._program = (accelerated, task)  # a tuple: no submodule
        inputs = () if task is None else accelerated.program.spec.tasks[task].inputs
        self.accepts_loss_kwargs = "num_items_in_batch" in inputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, **inputs: Any) -> Any:
        """What the task's forward returns, as a mapping with the key ``"loss"`` where that is the loss alone.

        Args:
            inputs: of the task; or, of all, task -> its inputs by name. The loss is then the sum of the tasks' losses.

        Raises:
            BatchError: the inputs do not fit the task.
        """
        accelerated, task = self._program
        if task is None:
            check_tasks(inputs, accelerated)
            if not inputs:
                raise BatchError("a step needs the batch of a task", help=f"{next(iter(accelerated))}={{...}}")
            losses = [split_outputs(accelerated[name](**batch))[0] for name, batch in inputs.items()]
            return {LOSS_KEY: torch.stack(losses).sum()}
        result = accelerated[task](**inputs)
        return {LOSS_KEY: result} if isinstance(result, torch.Tensor) else result

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Say that there is none: the tasks' graphs keep their activations."""
        log.warning(
            "activation checkpointing has no effect: the graph of each accelerated task (%s) keeps its activations "
            "(activation_bytes in the report says how many)",
            self._program[1] or ", ".join(self._program[0]),
        )

    gradient_checkpointing_enable = activation_checkpointing_enable

    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The program's ``state_dict``, without further names of tied weights."""
        again = tied_names(self.model)
        state = {} if destination is None else destination
        state.update({f"{prefix}{k}": x for k, x in self._program[0].state_dict().items() if k not in again})
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` gave."""
        tied = {name: state_dict[first] for name, first in tied_names(self.model).items() if first in state_dict}
        return self._program[0].load_state_dict({**tied, **state_dict}, strict=strict)

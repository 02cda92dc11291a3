"""Parts of a model that run one after the other: each holds tensors of the model, and runs pieces of graphs over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tokgraph.errors import InternalError, PlanError, TokgraphError

from .diagnosis import FAILURES

Table = MutableMapping[str, Any]
"""The dictionary of a module in which a tensor is registered."""


@dataclass(frozen=True)
class Registered:
    """Where a tensor of a model is registered: read at each call, for what is there changes.

    Args:
        name: the tensor's name in the model.
        table: the module's dictionary.
        key: its name there.
    """

    name: str
    table: Table
    key: str

    def now(self) -> Any:
        """The tensor that is registered there now."""
        return self.table[self.key]


class _Some(MutableMapping[str, Any]):
    """Some entries of a module's dictionary, under names of their own: what is put here is put there."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.keys_there: dict[str, str] = {}

    def __getitem__(self, key: str) -> Any:
        return self.table[self.keys_there[key]]

    def __setitem__(self, key: str, x: Any) -> None:
        self.table[self.keys_there.setdefault(key, key)] = x

    def __delitem__(self, key: str) -> None:
        del self.table[self.keys_there.pop(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.keys_there))

    def __len__(self) -> int:
        return len(self.keys_there)


class Holder(nn.Module):
    """Registers tensors of another model under their names, in that model's own dictionaries.

    What registers another tensor here, such as a sharded one, has changed the model. Its modules are not registered: they
    would bring all their other tensors along.
    """

    def hold(self, tensors: Iterable[Registered]) -> None:
        """Register tensors under the paths that they have in the model."""
        for x in tensors:
            self._owner(x.name.rpartition(".")[0])._more(x)

    def _owner(self, path: str) -> Holder:
        found = self
        for part in filter(None, path.split(".")):
            if part not in found._modules:  # as add_module, which refuses what a module may well be called
                found._modules[part] = self._inside()
            found = found._modules[part]  # type: ignore[assignment]
        return found

    def _inside(self) -> Holder:
        return Inner() if isinstance(self, Inner) else Holder()

    def _more(self, x: Registered) -> None:
        which = "_parameters" if isinstance(x.now(), nn.Parameter) else "_buffers"
        mine = self.__dict__[which]
        if not isinstance(mine, _Some):
            mine = self.__dict__[which] = _Some(x.table)
        if mine.table is not x.table:
            raise InternalError(f"{x.name} is registered in another place than its neighbours")
        mine.keys_there[x.name.rpartition(".")[2]] = x.key


class Inner(Holder):
    """Holds tensors inside of a module that saves and loads them all under the names of the model: this one does nothing."""

    def _save_to_state_dict(self, *args: Any) -> None:
        """Nothing."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing."""


class GraphFailure(Exception):
    """An operator of a task's graph failed; ``__cause__`` says how."""

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.task = task


class Step:
    """A piece of a task's graph, to run in a part.

    No dataclass: FSDP2 looks into those that it finds among arguments, and the tensors of the part would count as values.

    Args:
        task: the task.
        function: takes the piece's inputs, gives its outputs.
        held: position among the inputs -> the tensor of the part that goes there.
        inputs: names of the values that take the other positions, in order.
        outputs: names of what comes out.
    """

    def __init__(
        self,
        task: str,
        function: Callable[..., Any],
        held: Mapping[int, Registered],
        inputs: Sequence[str],
        outputs: Sequence[str],
    ) -> None:
        self.task, self.function, self.held = task, function, held
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def __call__(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs for the values of ``inputs``.

        Raises:
            GraphFailure: an operator failed.
        """
        others = iter(values)
        count = len(self.held) + len(values)
        given = [self.held[i].now() if i in self.held else next(others) for i in range(count)]
        try:
            return tuple(self.function(*given))
        except (TokgraphError, InternalError, torch.OutOfMemoryError):
            raise
        except FAILURES as failure:
            raise GraphFailure(self.task) from failure


def passing(task: str, names: Sequence[str]) -> Step:
    """What a task does in a part that it has no work in: values go through, for those who wait for the part's gradients."""
    return Step(task, lambda *values: values, {}, names, names)


class Part(Inner):
    """What comes before the blocks, a block, or what comes after them: the tensors that only it reads, and their work.

    It is called with the steps that it has to run and the values for each, and returns the values that come out of each. It
    runs for all tasks of a call at once, so that whatever gathers its tensors does that once.

    Args:
        keep: ``None``: its values are kept for the backward pass; otherwise they are computed again there, but for those
            of these operators.
    """

    def __init__(self, keep: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, steps: Sequence[Step], values: Sequence[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
        """The outputs of each step for its values."""
        if self.keep is None or not torch.is_grad_enabled():
            return _run(steps, values)
        more: dict[str, Any] = (
            {"context_fn": partial(create_selective_checkpoint_contexts, list(self.keep))} if self.keep else {}
        )
        counts = [len(given) for given in values]
        flat = [x for given in values for x in given]  # tensors among arguments, not inside of them, count as kept

        def again(*flat: Any) -> tuple[tuple[Any, ...], ...]:
            rest = iter(flat)
            return _run(steps, [tuple(islice(rest, count)) for count in counts])

        return checkpoint(again, *flat, use_reentrant=False, **more)  # type: ignore[no-any-return]


def kept_operators(checkpoint: bool | Sequence[Any]) -> tuple[Any, ...] | None:
    """Operators whose results are kept where blocks are computed again; ``None``: they are not.

    Raises:
        PlanError: these are no operators.
    """
    if isinstance(checkpoint, bool):
        return () if checkpoint else None
    found = tuple(checkpoint) if isinstance(checkpoint, Iterable) else (checkpoint,)
    for x in found:
        if not isinstance(x, torch._ops.OpOverload) or not isinstance(checkpoint, Iterable):
            raise PlanError(
                f"checkpoint={checkpoint!r}: {x!r} is in no list of operators",
                help="checkpoint=True, or a list of overloads: [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]",
            )
    return found


def _run(steps: Sequence[Step], values: Sequence[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(step(given) for step, given in zip(steps, values, strict=True))

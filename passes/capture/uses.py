"""How a forward uses attributes of its modules: read before they are set, or after, and where."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

from torch import nn

from .state import Change


@dataclass
class Use:
    """How a forward uses one attribute.

    Args:
        before: whether it reads it before it sets it.
        after: whether it reads it after it set it.
        reads: lines that read it.
        writes: lines that set it.
    """

    before: bool = False
    after: bool = False
    reads: dict[str, None] = field(default_factory=dict)
    writes: dict[str, None] = field(default_factory=dict)

    @property
    def elsewhere(self) -> list[str]:
        """Lines that read it and do not set it."""
        return [line for line in self.reads if line not in self.writes]

    def depends(self, container: bool) -> bool:
        """Whether more than the attribute itself follows from what the call before left in it.

        ``self.step += 1`` reads it, and nothing else need; a container is read by the very line that adds to it.
        """
        return self.before and len(self.elsewhere) > (1 if container and not self.writes else 0)


@contextmanager
def tracked(model: nn.Module, changes: Sequence[Change]) -> Iterator[dict[tuple[int, str], Use]]:
    """Watch how the attributes that a forward changes are used."""
    modules = dict(model.named_modules())
    uses = {(id(modules[c.path]), c.name): Use() for c in changes}
    get, assign = nn.Module.__getattribute__, nn.Module.__setattr__

    def line(frame: FrameType) -> str:
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def tracking_get(self: nn.Module, name: str) -> Any:
        if (use := uses.get((id(self), name))) is not None:
            use.before, use.after = use.before or not use.writes, use.after or bool(use.writes)
            use.reads[line(sys._getframe(1))] = None
        return get(self, name)

    def tracking_set(self: nn.Module, name: str, value: Any) -> None:
        if (use := uses.get((id(self), name))) is not None:
            use.writes[line(sys._getframe(1))] = None
        assign(self, name, value)

    with (
        mock.patch.object(nn.Module, "__getattribute__", tracking_get),
        mock.patch.object(nn.Module, "__setattr__", tracking_set),
    ):
        yield uses

"""Programs are copied with their model, and are not pickled."""

from __future__ import annotations

import copy
from typing import Any, Self

from tokgraph.errors import FileError


class Copied:
    """What ``copy.deepcopy`` copies, as averages of weights do, with the model that it runs; pickle is told why it may not."""

    def __reduce__(self) -> Any:
        raise FileError(
            f"a {type(self).__name__} is not pickled: it holds code that was made for the model of this process",
            help="save its state_dict(), or the program by tg.save; make it in the process where it is to run",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update({key: copy.deepcopy(x, memo) for key, x in self.__dict__.items()})
        return made

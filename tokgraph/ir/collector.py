"""Python's garbage collector, held back while a graph is traced or edited."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let the collector rest: tracing makes millions of objects that stay, and it would walk all of them again and again.

    For work on fake tensors alone: what real ones leave in cycles would wait for memory that others need. A collector
    that rests already goes on resting.
    """
    resting = not gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not resting:
            gc.enable()

"""Models whose gradients are measured once for all tests."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.harness import Captured
from tests.measurement.gradients import (
    Measure,
    Measured,
)


@pytest.fixture(scope="session")
def measured(janus_example: Captured, digits_example: Captured) -> Measure:
    """The examples and the tiny model, in float64, measured once."""
    found: dict[str, Measured] = {}
    made = {
        "janus": lambda: janus_example,
        "digits": lambda: digits_example,
        "tiny": lambda: Captured.of(tiny.build(dtype="float64", dynamic=True)),
        "conv": lambda: Captured.of(tiny.build(dtype="float64", token_mixer="conv")),
        "cumsum": lambda: Captured.of(tiny.build(dtype="float64", token_mixer="cumsum")),
    }

    def get(name: str) -> Measured:
        if name not in found:
            found[name] = Measured.of(made[name]())
        return found[name]

    return get

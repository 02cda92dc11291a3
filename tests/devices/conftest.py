"""The devices that tests run on: the CPU, a second device that is made of it, and a GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

from tests.devices import second


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        "second",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has; on the CPU a test shows that it is right where nothing is moved."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return torch.device("cuda", 0)
    if request.param == "second":
        if reason := second.missing():
            pytest.skip(reason)
        if not os.environ.get(second.OWN_PROCESS):
            pytest.skip("in a process of its own, by test_second.py")
        return second.device()
    return torch.device("cpu")

"""A second device for tests on machines without a GPU (``second.cpp``): mixing it with the CPU is an error, as with CUDA."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch.utils import backend_registration, cpp_extension

NAME = "second"
OWN_PROCESS = "TOKGRAPH_TESTS_ON_A_SECOND_DEVICE"
"""Set where the device may be made: autograd counts devices at its first backward pass, and knows no later ones."""
_SOURCE = Path(__file__).with_name("second.cpp")


class _Backend(backend_registration._DummyBackendModule):
    """What PyTorch asks of a device's module; random numbers are drawn by the CPU's generator."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


def missing() -> str | None:
    """Why this machine cannot have the device, ``None`` where it can."""
    return "no C++ compiler" if shutil.which("g++") is None or shutil.which("ninja") is None else None


@cache
def device() -> torch.device:
    """The device, compiled when it is first asked for (half a minute), and kept for this version of PyTorch."""
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"tokgraph-second-device-{key}"
    folder.mkdir(exist_ok=True)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    cpp_extension.load(f"second_device_{key}", [str(_SOURCE)], extra_cflags=["-O0"], build_directory=str(folder))
    return torch.device(NAME, 0)

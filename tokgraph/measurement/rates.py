"""Measures how fast a machine multiplies matrices and copies memory: the ceilings that a plan's promise is held under."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from time import perf_counter

import torch

from tokgraph.errors import AnalysisError
from tokgraph.ir.node import value
from tokgraph.ir.program import Program, model_device
from tokgraph.ir.rates import Rates

_LONG = 5e-3
"""Seconds that a product must take, so that neither its launch nor the clock counts."""
_LARGEST = {"cpu": 2048, "cuda": 16384}
_COPIED = {"cpu": 2**26, "cuda": 2**29}
"""Bytes: several times what caches hold."""
_RUNS = 5


def measure_rates(device: torch.device | str, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> Rates:
    """The rates of a device, each the median of five runs on random numbers; a second or less.

    Args:
        device: where to measure, with the threads and settings in force.
        dtypes: floating-point types to multiply in.

    Raises:
        AnalysisError: the device computes nothing (``meta``), or no types are given.
    """
    device, dtypes = torch.device(device), tuple(dtypes)
    if device.type == "meta" or not dtypes:
        raise AnalysisError(
            f"there are no rates to measure on {device}" if dtypes else "no types to multiply in were given",
            help="measure on a device that computes, in the types of the model; or write tg.Rates(...) down",
        )
    with torch.no_grad():
        matmul = {dtype: _matmul(device, dtype) for dtype in dtypes}
        copy = _copy(device)
    return Rates(_name(device), matmul, copy)


def program_rates(program: Program) -> Rates:
    """The rates of the device that a program's model is on, in the types that its graphs compute in."""
    found = {
        x.dtype: None
        for graph in program.values()
        for x in map(value, graph.graph.nodes)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    return measure_rates(model_device(program.model), found)


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    size, largest = 256, _LARGEST.get(device.type, 2048)
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _seconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        if seconds >= _LONG or size >= largest:
            return 2 * size**3 / seconds
        size *= 2


def _copy(device: torch.device) -> float:
    size = _COPIED.get(device.type, 2**26)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    taken = []
    for turn in range(_RUNS + 1):
        _wait(device)
        start = perf_counter()
        run()
        _wait(device)
        if turn:
            taken.append(perf_counter() - start)
    return median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"

"""A cluster of GPUs, and how a training run uses it, as data; read from text with units, as ``gpus=64,memory=80GB``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from tokgraph.errors import PlanError

_NUMBER = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*(.*)", re.IGNORECASE)
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_BYTES = re.compile(r"(?P<prefix>[kKmMgGtTpP]?)(?P<binary>i?)(?P<unit>B|bit|bps)?(?P<rate>/s)?")
_FLOPS = re.compile(r"(?P<prefix>[kmgtpe]?)(?:flops?)?(?:/s)?", re.IGNORECASE)
_COUNT = re.compile(r"(?P<prefix>[kmbgt]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Cluster:
    """GPUs that are alike, what connects them, and what is trained on them.

    Args:
        gpus: how many there are.
        memory: bytes of each.
        flops: FLOPs a second of each, of matrix products in the type of the model's parameters.
        bandwidth: bytes a second that each reads and writes in its memory.
        node: GPUs of a machine; fewer GPUs are one machine.
        link: bytes a second that a GPU sends to others of its machine, in one direction. The default is that of fourth
            generation NVLink (900 GB/s in both directions together).
        network: bytes a second that a GPU sends to other machines; the default is a port of 400 Gbit/s for each.
        reserve: bytes of each GPU that are not for the run: the driver's context, buffers of collectives, fragments.
        micro_batches: batches, each as large as the example batch, that a GPU takes in an optimizer step.
        stages: of a pipeline; ``None``: the fewest that fit.
        tokens: to train on, text and image; ``None``: there is no budget.

    Raises:
        PlanError: a number is out of range, or there are machines that are not full.
    """

    gpus: int
    memory: float
    flops: float
    bandwidth: float
    node: int = 8
    link: float = 450e9
    network: float = 50e9
    reserve: float = 0.0
    micro_batches: int = 1
    stages: int | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        for name, x in asdict(self).items():
            if x is not None:
                self._check(name, x)
        if self.gpus > self.node and self.gpus % self.node:
            raise PlanError(
                f"cluster: {self.gpus} GPUs do not fill machines of {self.node}",
                help="give the GPUs of a machine: node=4",
            )
        if self.reserve >= self.memory:
            raise PlanError("cluster: the reserve leaves no memory", help="reserve is bytes of each GPU, as 4GB")
        if self.stages is not None and (self.stages < 2 or self.gpus % self.stages):
            raise PlanError(
                f"cluster: {self.gpus} GPUs are no whole number of pipelines of {self.stages} stages",
                help="give a divisor of the number of GPUs, 2 or more",
            )

    def _check(self, name: str, x: Any) -> None:
        whole = name in _WHOLE
        least = 0 if name == "reserve" else 1 if whole else None
        fits = isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
        if not fits or (whole and (x != int(x) or x > _MOST)) or (x < least if least is not None else x <= 0):
            kind = (
                f"a whole number from 1 to {_MOST:,}"
                if whole
                else "a number of 0 or more"
                if least == 0
                else "a number above 0"
            )
            raise PlanError(f"cluster: {name}={_shown(x)} is not {kind}")
        object.__setattr__(self, name, int(x) if whole else float(x))

    @property
    def machine(self) -> int:
        """GPUs of a machine."""
        return min(self.node, self.gpus)

    def to_data(self) -> dict[str, Any]:
        """As plain data, in bytes, FLOPs and seconds."""
        return asdict(self)

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read ``"gpus=64,memory=80GB,flops=989TFLOPS,bandwidth=3.35TB/s"``.

        Bytes are ``80GB``, ``80GiB``, ``400Gbit/s``, ``400Gbps``; FLOPs ``989TFLOPS``, ``989TFLOP/s``; tokens ``1T``, ``300B``;
        all of them plain numbers as well.

        Raises:
            PlanError: a name or a unit is unknown, a name is given twice or missing, or a number is out of range.
        """
        found: dict[str, Any] = {}
        names = [f.name for f in fields(cls)]
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, separator, value = (x.strip() for x in part.partition("="))
            if not separator or name not in names:
                raise PlanError(f"cluster: {part!r} is not NAME=VALUE with a name of {', '.join(names)}")
            if name in found:
                raise PlanError(f"cluster: {name} is given twice")
            found[name] = _READ[name](name, value)
        missing = [name for name in names[:4] if name not in found]
        if missing:
            raise PlanError(
                f"cluster: {', '.join(missing)} must be given",
                help="as gpus=64,memory=80GB,flops=989TFLOPS,bandwidth=3.35TB/s",
            )
        return cls(**found)


def _shown(x: Any) -> str:
    return f"{x:g}" if isinstance(x, (int, float)) else repr(x)


_MOST = 10_000_000
_WHOLE = ("gpus", "node", "micro_batches", "stages")


def _amount(units: re.Pattern[str], example: str) -> Callable[[str, str], float]:
    """Reads a number with a unit of a kind."""

    def read(name: str, text: str) -> float:
        number = _NUMBER.fullmatch(text)
        unit = units.fullmatch(number[2].strip()) if number else None
        if number is None or unit is None:
            raise PlanError(f"cluster: {name}={text} is no amount", help=f"write it as {example}")
        parts = unit.groupdict()
        if parts.get("rate") and name in _STORED:
            raise PlanError(f"cluster: {name}={text} is a rate", help=f"write it as {example}")
        prefix = parts["prefix"].lower()
        scale = 1024.0 ** (len("kmgtp"[: "kmgtp".find(prefix) + 1])) if parts.get("binary") else _PREFIX[prefix]
        if parts.get("binary") and not prefix:
            raise PlanError(f"cluster: {name}={text} is no amount", help=f"write it as {example}")
        if units is not _COUNT and scale == 1 and 0 < float(number[1]) < _LEAST:
            raise PlanError(
                f"cluster: {name}={text} is less than any GPU has, a unit is missing", help=f"write it as {example}"
            )
        return float(number[1]) * scale / (8 if parts.get("unit") in ("bit", "bps") else 1)

    return read


_STORED = ("memory", "reserve")
_LEAST = 1e6
"""A plain number of bytes or FLOPs below this is one whose unit was forgotten."""
_READ: dict[str, Callable[[str, str], float]] = {
    **{name: _amount(_BYTES, "80GB or 80GiB; bits are Gbit") for name in _STORED},
    **{name: _amount(_BYTES, "3.35TB/s; bits are 400Gbit/s") for name in ("bandwidth", "link", "network")},
    "flops": _amount(_FLOPS, "989TFLOPS"),
    **{name: _amount(_COUNT, "64, 300B or 1T") for name in (*_WHOLE, "tokens")},
}

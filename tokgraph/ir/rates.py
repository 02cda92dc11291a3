"""How fast a machine multiplies matrices and copies memory, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rates:
    """The two ceilings of a machine's roofline (Williams et al., 2009, doi 10.1145/1498765.1498785).

    Args:
        device: what it is, for people.
        matmul: floating-point type -> FLOPs a second of a large matrix product.
        copy: bytes a second, read and written, of a large copy.
    """

    device: str
    matmul: Mapping[torch.dtype, float]
    copy: float

    def flops(self, dtype: torch.dtype) -> float:
        """FLOPs a second in a type; where it was not measured, in the one measured that is nearest in width."""
        if dtype in self.matmul:
            return self.matmul[dtype]
        return min(self.matmul.items(), key=lambda known: abs(known[0].itemsize - dtype.itemsize))[1]

    def to_data(self) -> dict[str, Any]:
        """As plain data: ``{"device", "matmul_flops_per_second": {type: number}, "copy_bytes_per_second"}``."""
        matmul = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.matmul.items()}
        return {"device": self.device, "matmul_flops_per_second": matmul, "copy_bytes_per_second": self.copy}

"""Casts that autocast makes inside of operators, on a CUDA device that is only imagined."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tokgraph.passes.capture.autocast import CastsInside

aten = torch.ops.aten
Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def cuda_region() -> Iterator[None]:
    """What ``torch.autocast("cuda", torch.bfloat16)`` sets, which does nothing where there is no such device."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


class Classes(nn.Module):
    """A projection, which is computed in bfloat16, and a loss."""

    def __init__(self, loss: Loss, device: str) -> None:
        super().__init__()
        self.project = nn.Parameter(torch.empty(16, 8, device=device))
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(F.linear(x, self.project), y)


def into_loss(loss: Loss, operator: str, device: str) -> torch.dtype:
    """Type of what an operator of the loss reads in a trace."""
    with FakeTensorMode():
        x, y = torch.empty(4, 8, device=device), torch.zeros(4, dtype=torch.int64, device=device)
        with CastsInside(device), torch.no_grad():
            exported = torch.export.export(Classes(loss, device), (x, y), strict=False)
    node = next(n for n in exported.graph.nodes if operator in str(n.target))
    found: torch.dtype = node.args[0].meta["val"].dtype
    return found


@pytest.mark.usefixtures("cuda_region")
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()], ids=["function", "module"])
def test_the_loss_of_classes_is_computed_in_float32(loss: Loss) -> None:
    assert into_loss(loss, "cross_entropy", "cuda") is torch.float32


@pytest.mark.usefixtures("cuda_region")
def test_another_device_has_a_region_of_its_own() -> None:
    with FakeTensorMode(), CastsInside("cpu"):
        logits = torch.zeros(4, 8, dtype=torch.bfloat16)
        assert F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).dtype is torch.bfloat16


def test_without_a_region_nothing_is_cast() -> None:
    with FakeTensorMode(), CastsInside("cuda"):
        logits, labels = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
        assert F.cross_entropy(logits, labels).dtype is torch.bfloat16


def test_a_device_without_autocast() -> None:
    with CastsInside("meta"):
        logits = torch.zeros(4, 8, dtype=torch.bfloat16, device="meta")
        assert F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device="meta")).dtype is torch.bfloat16
